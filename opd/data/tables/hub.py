"""Data sets of the Hugging Face Hub, and those that `datasets` has saved in a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from opd.data.fields import Row
from opd.data.tables.folder import DATA, suffix_of
from opd.data.tables.parquet import plain
from opd.data.tables.table import Table
from opd.errors import DataError, nearest, one_line
from opd.progress import Progress

TRAIN = "train"

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubTable(Table):
    """The rows of a split, which `datasets` keeps in files and reads when they are needed."""

    kind = "a Hugging Face data set"

    def __init__(self, path: Path, split: Any, notes: list[str]) -> None:
        self.path, self.notes = path, notes
        self.columns = list(split.column_names)
        files = [Path(file["filename"]) for file in split.cache_files]
        self.content = files or str(split._fingerprint).encode()
        self.store = files[0] if files else None
        # As Arrow holds them, pictures are bytes or paths, and nothing is decoded.
        self._rows = split.with_format("arrow")
        if not len(self._rows):
            raise DataError(f"{path}: the data set has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, place: int) -> int:
        """The number of the row, from 1."""
        return place + 1

    def row(self, place: int) -> Row:
        """The values of a row as plain Python values. Raises DataError."""
        try:
            (row,) = self._rows[place : place + 1].to_pylist()
        except Exception as error:  # pyarrow's own errors have many classes
            raise DataError(f"the row cannot be read: {one_line(error)}") from error
        return {name: plain(value) for name, value in row.items()}

    def files(self, place: int) -> tuple[Path, ...]:
        """The first file of the split: all of them are written together."""
        return () if self.store is None else (self.store,)


def is_id(path: str | Path) -> bool:
    """Whether a path that does not exist may be the id of a data set, "org/name"."""
    text = Path(path).as_posix()
    return (
        _ID.fullmatch(text) is not None
        and suffix_of(Path(text)) not in DATA
        and not Path(text).parent.exists()
    )


def is_saved(path: Path) -> bool:
    """Whether `datasets` has saved a data set in a folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def open_hub(path: Path, split: str, revision: str, progress: Progress) -> Table:
    """The rows of a data set with an id, or of one that is saved in the folder `path`. `split`: its
    name, after "name/" that of a configuration. Raises DataError."""
    saved = path.is_dir() and is_saved(path)
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path}: a data set of Hugging Face is read with datasets: pip install"
            " 'vision-opd[data]'"
        ) from error
    configuration, _, split = split.rpartition("/")
    try:
        with progress.pause():  # a download shows progress bars of its own
            found = (
                datasets.load_from_disk(str(path))
                if saved
                else datasets.load_dataset(
                    path.as_posix(), configuration or None, revision=revision or None
                )
            )
    except Exception as error:  # of the network, of files, and of datasets' own classes
        what = "" if saved else "neither a file, nor a Hugging Face data set that can be read: "
        raise DataError(f"{path}: {what}{one_line(error)}") from error
    if not isinstance(found, dict):
        return HubTable(path, found, [])
    names = list(found)
    if split and split not in found:
        raise DataError(f"{path}: data.split = {split!r}: unknown; {nearest(split, names)}")
    notes = []
    if not split:
        split = TRAIN if TRAIN in found else names[0]
        if others := ", ".join(name for name in names if name != split):
            notes = [f"{path}: its split {split} is read; data.split names another: {others}"]
    return HubTable(path, found[split], notes)
