"""Pictures in archives beside the rows: where they are looked for, and what a damaged or hostile
archive does."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from opd.data import archives, read_dataset, tar, unpack
from opd.data.archive_files import archive_at, archives_in
from opd.data.archives import Unpacked, open_archive
from opd.data.images import open_image
from opd.data.sources import Sources
from opd.errors import DataError
from opd.progress import Quiet
from opd.types import EncodedImage, Picture
from tests.data.test_embedded import encoded

PNG, OTHER = encoded(), encoded(size=(30, 20))
Files = Mapping[str, bytes]


class Notes(Quiet):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "opd" / "archives"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def zipped(path: Path, files: Files, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def tarred(path: Path, files: Files, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def gzipped(path: Path, files: Files) -> None:
    tarred(path, files, "w:gz")


def parted(path: Path, files: Files) -> None:
    """Three parts of one gzip stream, whose numbers follow the name."""
    gzipped(path, files)
    content = path.read_bytes()
    path.unlink()
    third = len(content) // 3
    for number, start in enumerate((0, third, 2 * third)):
        end = start + third if number < 2 else len(content)
        path.with_name(f"{path.name}0{number}").write_bytes(content[start:end])


KINDS: dict[str, Callable[[Path, Files], None]] = {
    ".zip": zipped,
    ".tar": tarred,
    ".tar.gz": gzipped,
    ".tgz": gzipped,
    ".tar.gz*": parted,
}


def write(folder: Path, suffix: str, files: Files, stem: str = "images") -> None:
    KINDS[suffix](folder / f"{stem}{suffix.rstrip('*')}", files)


def content(source: EncodedImage) -> bytes:
    return source.read() if isinstance(source, Picture) else source.read_bytes()


def find(sources: Sources, name: str) -> bytes:
    (source,) = sources.of_row({"image": name}, "image", None)  # type: ignore[arg-type]
    return content(source)


def refused(sources: Sources, name: str = "images/17.png") -> str:
    with pytest.raises(DataError) as caught:
        find(sources, name)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("field 'image': image not found: ")
    return said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "members",
    [
        ["images/17.png", "images/18.png"],
        ["./images/17.png", "./images/18.png"],
        ["17.png", "18.png"],
        ["export/images/17.png", "export/images/18.png"],
        ["a/b/images/17.png", "a/b/images/18.png", "a/b/images/deep/er/1.png"],
        ["images\\17.png", "images\\18.png"],
        ["/images/17.png", "/images/18.png"],
    ],
    ids=lambda members: members[0],
)
def test_a_picture_is_found_in_an_archive_beside_the_rows(
    folder: Path, kind: str, members: list[str]
) -> None:
    write(folder, kind, {name: PNG if "17" in name else OTHER for name in members})
    notes = Notes()
    sources = Sources(folder, progress=notes)
    assert find(sources, "images/17.png") == PNG
    assert find(sources, "./images/18.png") == OTHER
    assert "images/99.png; it is not in " in refused(sources, "images/99.png")
    if "gz" in kind:
        assert len(notes.lines) == 3
        assert notes.lines[0].endswith(", once")
        assert f"unpacked {archives_in(folder)[0]}: {len(members)} files, " in notes.lines[1]
    assert notes.lines[-1].startswith(f"pictures are read from {folder / 'images.'}")


def test_files_come_before_archives(folder: Path) -> None:
    zipped(folder / "images.zip", {"images/17.png": PNG, "images/18.png": PNG})
    (folder / "images").mkdir()
    (folder / "images" / "17.png").write_bytes(OTHER)
    notes = Notes()
    sources = Sources(folder, progress=notes)
    assert find(sources, "images/17.png") == OTHER
    assert notes.lines == []
    assert find(sources, "images/18.png") == PNG
    assert notes.lines == [f"pictures are read from {folder / 'images.zip'}"]


def test_an_archive_of_the_paths_first_folder_comes_first_and_others_are_not_unpacked(
    folder: Path, cache: Path
) -> None:
    """As in Vision-OPD-6K, of which 29 GB need not be unpacked."""
    parted(folder / "original_images.tar.gz", {"17.png": PNG})
    parted(folder / "images.tar.gz", {"17.png": OTHER})
    sources = Sources(folder)
    assert find(sources, "original_images/17.png") == PNG
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    assert find(sources, "images/17.png") == OTHER


def test_a_picture_in_several_archives_is_not_guessed(folder: Path) -> None:
    zipped(folder / "a.zip", {"17.png": PNG})
    tarred(folder / "b.tar", {"17.png": OTHER})
    with pytest.raises(DataError, match=r"'17.png' is in .*a.zip and .*b.tar; say which: data.im"):
        find(Sources(folder), "17.png")
    assert find(Sources(folder), "b/17.png") == OTHER
    assert find(Sources(folder, folder / "b.tar"), "17.png") == OTHER


@pytest.mark.parametrize("name", ["images.tar.gz", "images.tar.gz00", "images.tar.gz02"])
def test_the_pictures_may_be_said_to_be_in_an_archive_or_a_folder(
    folder: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    parted(elsewhere / "images.tar.gz", {"17.png": PNG})
    (folder / "17.png").write_bytes(OTHER)
    assert find(Sources(folder, elsewhere / name), "17.png") == PNG
    assert find(Sources(folder, elsewhere), "17.png") == PNG
    assert find(Sources(folder), "17.png") == OTHER
    assert "18.png; it is not in " in refused(Sources(folder, elsewhere / name), "18.png")
    with pytest.raises(DataError, match=r"^data\.images: .*none is not there$"):
        Sources(folder, elsewhere / "none")
    with pytest.raises(DataError, match=r"^data\.images: .*17.png is neither a folder nor an arch"):
        Sources(folder, folder / "17.png")


def test_an_archive_is_unpacked_once(folder: Path, cache: Path) -> None:
    gzipped(folder / "images.tar.gz", {"17.png": PNG})
    first, second, third = Notes(), Notes(), Notes()
    assert find(Sources(folder, progress=first), "17.png") == PNG
    assert find(Sources(folder, progress=second), "17.png") == PNG
    assert second.lines == first.lines[2:]
    os.utime(folder / "images.tar.gz", (1, 1))
    assert find(Sources(folder, progress=third), "17.png") == PNG
    assert len(third.lines) == 3
    gzipped(folder / "images.tar.gz", {"17.png": OTHER})
    assert find(Sources(folder, progress=third), "17.png") == OTHER
    (cache / "images-x.partial").mkdir()
    assert {path.suffix for path in cache.iterdir()} == {"", ".lock", ".partial"}


def test_threads_and_processes_unpack_it_once(folder: Path, cache: Path) -> None:
    gzipped(folder / "images.tar.gz", {f"{number}.png": PNG for number in range(50)})
    (files,) = archives_in(folder)
    notes, opened = Notes(), []
    threads = [
        threading.Thread(target=lambda: opened.append(open_archive(files, notes, NEVER)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({archive.folder for archive in opened}) == 1  # type: ignore[attr-defined]
    assert len(notes.lines) == 2


NEVER = threading.Event()


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz", ".tar.gz*"])
def test_the_names_in_an_archive_are_listed(folder: Path, kind: str) -> None:
    """For whoever looks for rows in it."""
    write(folder, kind, {"a/rows.jsonl": b"{}", "a/b/1.png": PNG})
    (files,) = archives_in(folder)
    archive = open_archive(files, Quiet(), NEVER)
    assert sorted(archive.names()) == ["a/b/1.png", "a/rows.jsonl"]
    assert archive.top == "a"


def test_names_of_archives() -> None:
    for names, expected in (
        ("a.zip", ["a.zip"]),
        ("a.tar.gz01 a.tar.gz00 b.tgz", ["a.tar.gz00 ... a.tar.gz01", "b.tgz"]),
        ("a.tar.gz.part-ab a.tar.gz.part-aa", ["a.tar.gz.part-aa ... a.tar.gz.part-ab"]),
        ("a.tar.gz a.tar.gz00", ["a.tar.gz", "a.tar.gz00"]),
        ("a.tar.gz9 a.tar.gz10 a.tar.gz8", ["a.tar.gz8 ... a.tar.gz10"]),
        ("a.tar.xz a.tar.bz2 a.tar.bz a.zip01 a.gz tar.gz .zip a.jsonl", []),
    ):
        listed(names.split(), expected)


def listed(names: list[str], expected: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).touch()
        shown = [str(files).replace(f"{folder}/", "") for files in archives_in(Path(folder))]
        assert shown == expected
        assert archive_at(Path(folder) / "none.zip") is None


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def overwritten(path: Path) -> None:
    """Zeros in the middle."""
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes(200) + whole[1200:])


def wrong_header(path: Path) -> None:
    """A header in the middle whose checksum is wrong, at which tarfile ends without a word."""
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"images/9.png\0", b"images/x.png\0"))


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        (".zip", cut, "images.zip cannot be read: File is not a zip file"),
        (".tar", cut, "images.tar cannot be read: unexpected end of data"),
        (".tar", wrong_header, "images.tar cannot be read: it is damaged or cut off"),
        (".tar.gz", cut, "images.tar.gz cannot be read: it is cut off"),
        (".tar.gz", overwritten, "images.tar.gz cannot be read: "),
        (".zip", lambda path: path.write_bytes(b""), "images.zip is neither zip nor tar: an empty"),
        (
            ".zip",
            lambda path: path.write_bytes(b"<!doctype html><html>"),
            "images.zip is neither zip nor tar: a web page, not an image: its download failed",
        ),
        (
            ".tar",
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "images.tar is neither zip nor tar: a pointer of Git LFS",
        ),
        (".tar", lambda path: path.write_bytes(bytes(10240)), "images.tar is neither zip nor tar"),
        (
            ".tar.gz",
            lambda path: path.write_bytes(gzip.compress(b"x" * 2000)),
            "images.tar.gz cannot be read: ",
        ),
    ],
)
def test_a_damaged_archive_is_told_in_one_line(
    folder: Path, cache: Path, kind: str, damage: Callable[[Path], Any], message: str
) -> None:
    write(folder, kind, {f"images/{number}.png": PNG for number in range(20)})
    damage(folder / f"images{kind}")
    assert message in refused(Sources(folder))
    assert not cache.exists() or [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("0", "images.tar.gz01: the part before it is missing"),
        ("1", "images.tar.gz02: the part before it is missing"),
        ("2", "it is cut off, or its last part is missing"),
    ],
)
def test_a_missing_part_is_told(folder: Path, missing: str, message: str) -> None:
    parted(folder / "images.tar.gz", {f"images/{number}.png": PNG for number in range(20)})
    (folder / f"images.tar.gz0{missing}").unlink()
    if missing == "0":  # else the numbers may begin at 1
        (folder / "images.tar.gz01").rename(folder / "images.tar.gz03")
        message = message.replace("01", "02")
    assert message in refused(Sources(folder))


def test_members_that_lead_out_are_left_out(folder: Path, tmp_path: Path, cache: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(PNG)
    members = {"../../victim": OTHER, "/../x.png": OTHER, "17.png": PNG, "a/../../../y.png": OTHER}
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.CHRTYPE, "device.png"),
            (tarfile.FIFOTYPE, "pipe.png"),
            (tarfile.SYMTYPE, "folder"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(victim if name != "folder" else tmp_path)
            archive.addfile(member)
        member = tarfile.TarInfo("folder/victim")
        member.size = len(OTHER)
        archive.addfile(member, io.BytesIO(OTHER))
    notes = Notes()
    assert find(Sources(folder, progress=notes), "17.png") == PNG
    assert "2 files" in notes.lines[1]
    assert notes.lines[1].endswith("; 8 members left out, which are no files")
    assert victim.read_bytes() == PNG
    unpacked = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert sorted(path.name for path in unpacked) == ["17.png", "victim"]
    for name in ("../../victim", "link.png", "device.png", "pipe.png", "y.png"):
        refused(Sources(folder), name)


def test_a_tar_that_is_read_in_place_has_no_links_either(folder: Path) -> None:
    with tarfile.open(folder / "images.tar", "w") as archive:
        member = tarfile.TarInfo("link.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    refused(Sources(folder), "link.png")


def test_an_archive_larger_than_the_disk_is_refused_before_it_is_written(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gzipped(folder / "images.tar.gz", {"a.png": PNG, "b.png": bytes(50_000_000)})
    free = unpack.shutil.disk_usage(folder).free
    monkeypatch.setattr(unpack, "RESERVE", free - 40_000_000)
    said = refused(Sources(folder), "a.png")
    assert "it holds more than the 0.0 GB" in said or "it holds more than the 4" in said
    assert "unpack it elsewhere, and say where: data.images=FOLDER" in said
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_told(folder: Path, cache: Path) -> None:
    gzipped(folder / "images.tar.gz", {"a.png": PNG})
    cache.parent.parent.write_text("a file")
    assert "unpacking into " in (said := refused(Sources(folder), "a.png"))
    assert said.endswith("Not a directory")


def test_unpacking_stops_when_it_is_asked_to(folder: Path, cache: Path) -> None:
    gzipped(folder / "images.tar.gz", {"a.png": PNG})
    stop = threading.Event()
    stop.set()
    assert "was stopped" in refused(Sources(folder, stop=stop), "a.png")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def patched(path: Path, old: bytes, new: bytes, times: int = -1) -> None:
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new, times))


def encrypted(path: Path) -> None:
    zipped(path, {"images/17.png": PNG})
    whole = bytearray(path.read_bytes())
    for start in (whole.find(b"PK\x03\x04") + 6, whole.find(b"PK\x01\x02") + 8):
        whole[start] |= 1
    path.write_bytes(whole)


def wrong_checksum(path: Path) -> None:
    zipped(path, {"images/17.png": PNG}, zipfile.ZIP_STORED)
    patched(path, PNG[200:210], bytes(10))


def jpeg_that_is_cut(path: Path) -> None:
    zipped(path, {"images/17.png": encoded("jpeg", (200, 200))[:5000]})


def huge(path: Path) -> None:
    """A member that claims to have 4 GB."""
    zipped(path, {"images/17.png": PNG})
    whole = bytearray(path.read_bytes())
    start = whole.find(b"PK\x01\x02") + 24
    whole[start : start + 4] = b"\xf0\xff\xff\xff"
    path.write_bytes(whole)


def lying(path: Path) -> None:
    """A member of 100 MB that claims to have 100 bytes."""
    zipped(path, {"images/17.png": bytes(100_000_000)})
    whole = bytearray(path.read_bytes())
    start = whole.find(b"PK\x01\x02") + 24
    whole[start : start + 4] = b"\x64\0\0\0"
    path.write_bytes(whole)


def bzip(path: Path) -> None:
    zipped(path, {"images/17.png": PNG}, zipfile.ZIP_BZIP2)


def no_picture(path: Path) -> None:
    zipped(path, {"images/17.png": b"../../../etc/passwd"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (encrypted, "images.zip/images/17.png: it is encrypted; unpack the archive"),
        (wrong_checksum, "images.zip/images/17.png: Bad CRC-32"),
        (jpeg_that_is_cut, "images.zip/images/17.png: image file is truncated"),
        (huge, "images.zip/images/17.png: 4,294,967,280 bytes, above 536,870,912; unpack the"),
        (lying, "images.zip/images/17.png: "),
        (bzip, "images.zip/images/17.png: it is compressed in a way that is not read"),
        (no_picture, "images.zip/images/17.png: not an image"),
    ],
)
def test_a_faulty_picture_in_a_zip_is_a_faulty_row(
    folder: Path, make: Callable[[Path], None], message: str
) -> None:
    make(folder / "images.zip")
    (folder / "a.png").write_bytes(PNG)
    row = {"question": "?", "boxes": [[1, 2, 11, 12]]}
    path = folder / "data.jsonl"
    rows = [{**row, "image": "a.png"}, {**row, "image": "images/17.png"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = read_dataset(path)
    assert len(data) == 1
    ((source, reason),) = data.skipped
    assert source == "data.jsonl:2"
    assert message in reason


def test_a_member_that_lies_about_its_size_takes_no_memory(folder: Path) -> None:
    lying(folder / "images.zip")
    (picture,) = Sources(folder).of_row({"image": "17.png"}, "image", None)  # type: ignore[arg-type]
    tracemalloc.start()
    with pytest.raises(DataError, match="Bad CRC-32"):
        content(picture)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header of a tar archive, with a size in its own words."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "content",
    [
        # Sizes below zero, of which the last leads back to the second header for ever.
        header("a.png", b"\xff" * 11 + b"\0"),
        header("a", b"0") + header("b", b"0") + header("c", b"\xff" * 10 + b"\xfc\0"),
        header("a.png", b"\x80" + b"\xff" * 11),
        header("a.png", b"77777777777") + bytes(1024),
        header("pax", b"77777777777", b"x") + bytes(4096),
        header("pax", b"\xff" * 12, b"x") + bytes(4096),
        header("long", b"77777777777", b"L") + bytes(4096),
        header("pax", b"00000001000", b"x") * 5000,
        header("pax", b"13", b"x") + b"11 size=-512\n".ljust(512, b"\0") + header("a", b"0"),
        header("a.png", b"zzzzzzzzzzz") + bytes(1024),
        header("a.png", b"00000000000") + b"garbage" * 500,
        header("sparse", b"00000000000", b"S") + bytes(512),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_hostile_headers_of_tar_end_in_one_line(folder: Path, content: bytes, suffix: str) -> None:
    path = folder / f"images{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
    began = time.monotonic()
    refused(Sources(folder))
    assert time.monotonic() - began < 5


def test_a_gzip_bomb_of_headers_is_bounded(folder: Path) -> None:
    """Ten megabytes that unpack to ten gigabytes of one header."""
    block = gzip.compress(bytes(100_000_000), 9)
    head = header("pax", b"70000000000", b"x")
    (folder / "images.tar.gz").write_bytes(gzip.compress(head) + block * 20)
    assert "it asks for " in refused(Sources(folder))


def test_the_number_of_members_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBERS", 5)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    monkeypatch.setattr(archives, "DIRECTORY", 2000)
    names = {f"{number}.png": b"" for number in range(6)}
    for kind in (".zip", ".tar", ".tar.gz"):
        write(folder, kind, names, kind[1:].replace(".", "-"))
        said = refused(Sources(folder, folder / f"{kind[1:].replace('.', '-')}{kind}"), "none.png")
        assert "it has more than 5 members; unpack it" in said
    zipped(folder / "large.zip", {"x" * 3000: b""})
    assert "it asks for " in refused(Sources(folder, folder / "large.zip"), "none.png")


def test_rows_train_on_pictures_in_archives(folder: Path) -> None:
    """The same data from files, and from each kind of archive, with one fingerprint."""
    row = {"image": "images/17.png", "question": "?", "boxes": [[1, 2, 11, 12]]}
    (folder / "data.jsonl").write_text(json.dumps(row))
    fingerprints = set()
    (folder / "images").mkdir()
    (folder / "images" / "17.png").write_bytes(PNG)
    for kind in ("", *KINDS):
        if kind:
            for path in folder.glob("images.*"):
                path.unlink()
            write(folder, kind, {"images/17.png": PNG})
        data = read_dataset(folder / "data.jsonl")
        assert open_image(data[0].images[0]).size == (40, 20)
        fingerprints.add(data.fingerprint)
        (folder / "images" / "17.png").unlink(missing_ok=True)
    assert len(fingerprints) == 1


def test_an_unpacked_archive_that_is_removed_is_unpacked_again(folder: Path, cache: Path) -> None:
    gzipped(folder / "images.tar.gz", {"images/17.png": PNG})
    (files,) = archives_in(folder)
    archive = open_archive(files, Quiet(), NEVER)
    assert isinstance(archive, Unpacked)
    os.rename(archive.folder, cache / "elsewhere")
    assert find(Sources(folder), "images/17.png") == PNG
