"""Folders: one data file, the parts of one, or pictures each with a JSON file beside it."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

from opd.data.archive_files import ArchiveFiles, archives_in
from opd.data.fields import Row
from opd.data.jsonl import parse
from opd.data.tables.table import ROW_BYTES, Table
from opd.errors import DataError, plural
from opd.paths import read_file

DATA = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
"""Suffixes of data files; each also with .gz."""

PICTURES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".jxl", ".png", ".tif", ".tiff", ".webp"),
}
"""Suffixes of pictures."""

ABOUT = {"dataset_info.json", "dataset_infos.json", "state.json", "config.json"}
"""Names of files that describe a data set."""

DEEPEST = 32
"""Number of folders inside one another that are looked into."""

LISTED = 6
"""Number of files that a message lists."""

_PART = re.compile(r"(.*?)[-_.]?\d+(?:-of-\d+)?(?:-[0-9a-f]{8,})?$")
"""The name of a part of a file without its number: "train" of train-00000-of-00004."""


class Parts(Table):
    """Several tables of one kind, one after the other."""

    def __init__(self, path: Path, parts: Sequence[Table]) -> None:
        self.path, self.parts = path, parts
        self.kind, self.columns = parts[0].kind, parts[0].columns
        self.content = [file for part in parts for file in part.files(0)]
        self.notes = [note for part in parts for note in part.notes]
        self._ends = list(accumulate(map(len, parts)))
        for part in parts:
            if (part.kind, part.columns) != (self.kind, self.columns):
                raise DataError(
                    f"{path}: {parts[0].path.name} and {part.path.name} have different columns;"
                    " name one of them"
                )

    @property
    def folder(self) -> Path:
        """The folder that holds the parts."""
        return self.parts[0].folder

    def __len__(self) -> int:
        return self._ends[-1]

    def number(self, place: int) -> int:
        """The number of the row in its part."""
        part, inner = self._part(place)
        return part.number(inner)

    def row(self, place: int) -> Row:
        """A row of one of the parts."""
        part, inner = self._part(place)
        return part.row(inner)

    def source(self, place: int) -> str:
        """The name of the part, and the number of the row."""
        part, inner = self._part(place)
        return part.source(inner)

    def files(self, place: int) -> tuple[Path, ...]:
        """The files of the part."""
        part, inner = self._part(place)
        return part.files(inner)

    def _part(self, place: int) -> tuple[Table, int]:
        number = bisect_right(self._ends, place)
        return self.parts[number], place - (self._ends[number - 1] if number else 0)


class PictureFolder(Table):
    """Pictures, each with a JSON file of the same name beside it, which holds the fields of its
    row; `image` is the path of the picture, which is also the row's id if the file gives none."""

    kind = "a folder of pictures"

    def __init__(self, path: Path, pictures: Sequence[Path]) -> None:
        self.path, self._pictures = path, pictures
        self.content = [picture.with_suffix(".json") for picture in pictures]

    @property
    def folder(self) -> Path:
        """The folder itself."""
        return self.path

    def __len__(self) -> int:
        return len(self._pictures)

    def number(self, place: int) -> int:
        """The number of the picture, from 1."""
        return place + 1

    def row(self, place: int) -> Row:
        """The object in the JSON file, with the path of the picture."""
        picture = self._pictures[place]
        file = picture.with_suffix(".json")
        try:
            if file.stat().st_size > ROW_BYTES:
                raise DataError(f"the row has more than {ROW_BYTES:,} bytes")
            row = parse(read_file(file).decode("utf-8-sig"))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError("the file is not UTF-8 text; save it as UTF-8") from error
        name = picture.relative_to(self.path).as_posix()
        return {"id": name, **row, "image": name}

    def source(self, place: int) -> str:
        """The path of the JSON file."""
        inner = self._pictures[place].with_suffix(".json").relative_to(self.path)
        return f"{self.path.name}/{inner.as_posix()}"

    def files(self, place: int) -> tuple[Path, ...]:
        """The JSON file."""
        return (self._pictures[place].with_suffix(".json"),)


def open_folder(
    path: Path,
    split: str,
    open_file: Callable[[Path], Table],
    open_archive: Callable[[ArchiveFiles], Table],
) -> Table:
    """The rows of a folder; `split` names the parts of one among several files. A folder that holds
    nothing but an archive is that archive. Raises DataError if the folder holds no data, or several
    data sets."""
    groups = _groups(data_files(path))
    if not groups:
        if pictures := [*_with_json(path)]:
            return PictureFolder(path, pictures)
        inner = [*_inner_files(path)]
        if not inner and len(archives := archives_in(path)) == 1:
            return open_archive(archives[0])
        if not inner:
            raise DataError(
                f"{path} is a folder without data: it holds no file that ends in"
                f" {', '.join(DATA)}, and no picture with a .json file beside it"
            )
        groups = _groups(inner)
    if split:
        named = [name for name in groups if name[1].split("/")[-1] in (split, f"{split}s")]
        if not named:
            raise DataError(
                f"{path}: no file of the split '{split}'; there are {_listed(path, groups)}"
            )
        groups = {name: groups[name] for name in named}
    if len(groups) > 1:
        raise DataError(
            f"{path} holds several data files: {_listed(path, groups)}; name one of them, or"
            " a split with data.split"
        )
    ((files),) = groups.values()
    _allow_open_files(len(files))
    tables = [open_file(file) for file in files]
    return tables[0] if len(tables) == 1 else Parts(path, tables)


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder, by name, without JSON files that belong to a picture."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    pictures = {entry.stem for entry in entries if entry.suffix.lower() in PICTURES}
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".")
        and suffix_of(entry) in DATA
        and entry.name not in ABOUT
        and not (entry.suffix.lower() == ".json" and entry.stem in pictures)
        and entry.is_file()
    ]


def suffix_of(path: Path) -> str:
    """The suffix of a data file, without that of gzip."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _groups(files: Sequence[Path]) -> dict[tuple[str, str], list[Path]]:
    """Files that are parts of one, by their suffix and common name, in the order of their
    numbers."""
    groups: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
    for file in files:
        stem = Path(file.name.removesuffix(".gz")).stem
        match = _PART.fullmatch(stem)
        name = match[1] if match else stem
        groups[suffix_of(file), f"{file.parent}/{name}"].append(file)
    return {name: sorted(group, key=_by_number) for name, group in groups.items()}


def _by_number(path: Path) -> list[tuple[int, str]]:
    """A key that sorts part-2 before part-10."""
    words = re.split(r"(\d+)", path.name)
    return [(int(word), "") if word.isdigit() else (0, word) for word in words]


def _listed(path: Path, groups: dict[tuple[str, str], list[Path]]) -> str:
    """The first file of each group, for a message."""
    names = []
    for files in groups.values():
        more = f" (of {plural(len(files), 'part')})" if len(files) > 1 else ""
        names.append(f"{files[0].relative_to(path)}{more}")
    left = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + left


def _inner_files(path: Path) -> Iterator[Path]:
    """The data files in the folders of a folder, such as data/train-00000-of-00004.parquet."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            with suppress(DataError):
                yield from data_files(entry)


def _with_json(path: Path) -> Iterator[Path]:
    """All pictures below a folder with a JSON file beside them, by name. A folder is entered once,
    so that a circle of links ends."""
    seen: set[tuple[int, int]] = set()

    def walk(folder: Path, depth: int) -> Iterator[Path]:
        try:
            state = folder.stat()
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            return
        if (state.st_dev, state.st_ino) in seen or depth > DEEPEST:
            return
        seen.add((state.st_dev, state.st_ino))
        names = {entry.name for entry in entries}
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in PICTURES and f"{stem}.json" in names:
                yield folder / entry.name
            elif not entry.name.startswith("."):
                with suppress(OSError):  # a link to itself
                    if entry.is_dir():
                        yield from walk(folder / entry.name, depth + 1)

    yield from walk(path, 0)


def _allow_open_files(count: int) -> None:
    """Raises the limit of open files, as far as it may be raised, since every part stays open."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 256
        if 0 <= soft < wanted and (hard < 0 or hard >= wanted):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
