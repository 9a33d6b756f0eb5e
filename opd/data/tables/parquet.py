"""Parquet: row groups are read when one of their rows is needed, and few stay in memory.

A file whose row groups are large is copied once into the cache folder, in small ones: to read a row
means to read its whole group.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.data.fields import Row, cut
from opd.data.tables.kept import kept_copy, no_room
from opd.data.tables.table import Table
from opd.errors import DataError, one_line
from opd.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_BYTES, GROUP_ROWS = 32 * 2**20, 1 << 16
"""A row group with more bytes or rows is large."""

SMALL_BYTES = 2**18
"""Bytes of a row group of a copy, about; it has at least one row."""

DECODED_BYTES = 2**30
"""Largest row group once it is decoded: a few bytes can stand for many."""

CACHE_BYTES = 64 * 2**20
"""Bytes of decoded row groups that stay in memory; the last one stays in any case."""

BATCH_ROWS = 256
"""Number of rows that are decoded at once."""

MOST_ROWS = 1 << 31


class Parquet(Table):
    """The rows of a Parquet file."""

    kind = "Parquet"

    def __init__(self, path: Path, progress: Progress) -> None:
        """Raises DataError if the file cannot be read, or pyarrow is missing."""
        self.path = path
        self.content = [path]
        self._file = _opened(path, path)
        groups = self._groups()
        if any(size > GROUP_BYTES or rows > GROUP_ROWS for rows, size in groups):
            copy = kept_copy(path, ".parquet", lambda copy, room: self._copy(copy, room, progress))
            self._file.close()
            self._file = _opened(copy, path)
            groups = self._groups()
        self.columns = [str(name) for name in self._file.schema_arrow.names]
        self._ends = list(accumulate(rows for rows, _ in groups))
        if not self._ends or not self._ends[-1]:
            raise DataError(f"{path}: the file has no rows")
        if self._ends[-1] > MOST_ROWS:
            raise DataError(f"{path}: the file has {self._ends[-1]:,} rows, above {MOST_ROWS:,}")
        twice = {name for name in self.columns if self.columns.count(name) > 1}
        if twice:
            raise DataError(f"{path}: column '{cut(min(twice))}' stands twice")
        self._schema = self._file.schema_arrow
        self._cache: OrderedDict[int, tuple[pa.Table, int]] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def number(self, place: int) -> int:
        """The number of the row, from 1."""
        return place + 1

    def row(self, place: int) -> Row:
        """The values of a row as plain Python values. Raises DataError."""
        group = bisect_right(self._ends, place)
        start = self._ends[group - 1] if group else 0
        try:
            (row,) = self._group(group).slice(place - start, 1).to_pylist()
        except DataError:
            raise
        except Exception as error:  # pyarrow's own errors have many classes
            raise DataError(f"the row cannot be read: {one_line(error)}") from error
        return {name: plain(value) for name, value in row.items()}

    def _groups(self) -> list[tuple[int, int]]:
        """Rows and bytes of each row group."""
        metadata = self._file.metadata
        groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]

    def _group(self, number: int) -> pa.Table:
        """A row group, from the file or the cache."""
        import pyarrow as pa

        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number][0]
            batches, size = [], 0
            for batch in self._file.iter_batches(
                BATCH_ROWS, row_groups=[number], use_threads=False
            ):
                batches.append(batch)
                size += batch.nbytes
                if size > DECODED_BYTES:
                    raise DataError(f"row group {number} has more than {DECODED_BYTES:,} bytes")
            group = pa.Table.from_batches(batches, self._schema)
            self._cache[number] = group, size
            self._cached += size
            while self._cached > CACHE_BYTES and len(self._cache) > 1:
                _, (_, dropped) = self._cache.popitem(last=False)
                self._cached -= dropped
            return group

    def _copy(self, copy: Path, room: int, progress: Progress) -> None:
        """Writes the file with small row groups. Raises DataError."""
        import pyarrow.parquet as pq

        progress.note(
            f"{self.path}: rows of large row groups cannot be read one by one; a copy with small"
            f" ones is made in {copy.parent}, once"
        )
        rows, size = map(sum, zip(*self._groups(), strict=True))
        together = max(1, min(BATCH_ROWS * 4, SMALL_BYTES * rows // max(1, size)))
        try:
            # Pictures are compressed already, and nobody looks for values by statistics.
            with pq.ParquetWriter(
                copy,
                self._file.schema_arrow,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
            ) as writer:
                for batch in self._file.iter_batches(together * 16):
                    writer.write_batch(batch, row_group_size=together)
                    if copy.stat().st_size > room:
                        raise no_room(self.path, room)
        except (DataError, OSError):
            raise
        except Exception as error:
            raise DataError(f"{self.path}: the file is damaged: {one_line(error)}") from error


def _opened(path: Path, shown: Path) -> Any:
    """An open Parquet file; `shown` is its path in messages. Raises DataError."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"{shown}: Parquet is read with pyarrow: pip install 'vision-opd[data]'"
        ) from error
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except Exception as error:  # pyarrow's own errors have many classes
        raise DataError(f"{shown}: the file is damaged Parquet: {one_line(error)}") from error


def plain(value: Any) -> Any:
    """A value as JSON would hold it, but bytes as they are: times become texts, decimals numbers,
    maps objects."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        pairs = bool(value) and all(isinstance(entry, tuple) and len(entry) == 2 for entry in value)
        return {str(k): plain(v) for k, v in value} if pairs else [plain(v) for v in value]
    if isinstance(value, str | int | float | bytes | None):
        return value
    if type(value).__name__ == "Decimal":
        return float(value)
    return str(value)
