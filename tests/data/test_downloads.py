"""Pictures at addresses, from a server of this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opd.data import Reading, downloads, read_dataset
from opd.data.sources import Sources
from opd.errors import DataError
from opd.types import Picture
from tests.data.test_archives import Notes
from tests.data.test_embedded import encoded

PNG = encoded()


class Server(ThreadingHTTPServer):
    """Answers every path in its own way; `asked` are the paths that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *given: Any) -> None:
        """Writes nothing."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.partition("?")[0].strip("/")
        to = {
            "moved.png": "/a.png",
            "file.png": "file:///etc/passwd",
            "ftp.png": f"ftp://127.0.0.1:{self.server.server_port}/a.png",
            "circle.png": "/circle.png",
            "nowhere.png": "",
        }
        if name in to:
            self.send_response(302)
            self.send_header("Location", to[name])
            self.end_headers()
        elif name == "busy.png" and self.server.asked.count(self.path) == 1:
            self.send_error(503)
        elif name in ("missing.png", "forbidden.png", "broken.png"):
            self.send_error({"missing.png": 404, "forbidden.png": 403, "broken.png": 500}[name])
        else:
            self._send(name)

    def _send(self, name: str) -> None:
        content = {
            "page.png": b"<!doctype html><html>Log in</html>",
            "text.png": b"hello",
            "empty.png": b"",
            "svg.png": b"<svg/>",
            "large.png": PNG + bytes(1 << 20),
        }.get(name, PNG)
        self.send_response(200)
        if name == "claims.png":
            self.send_header("Content-Length", str(10**12))
        elif name != "endless.png" and name != "large.png":
            length = len(content) + (1000 if name == "cut.png" else 0)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if name == "silent.png":
            time.sleep(1)
        self.wfile.write(content)
        while name == "endless.png":
            try:
                self.wfile.write(b"x")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    return tmp_path / "cache" / "opd" / "pictures"


def picture(url: str, sources: Sources | None = None) -> Picture:
    sources = sources or Sources(Path(), allow_download=True)
    (source,) = sources.of_row({"image": url}, "image", None)  # type: ignore[arg-type]
    assert isinstance(source, Picture)
    return source


def kept(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["a.png", "moved.png", "busy.png", "ä b.png?x=1&y=%20", "a.png#x"])
def test_a_picture_is_downloaded_once(server: Server, cache: Path, name: str) -> None:
    url, notes = f"{server.url}/{name}", Notes()
    one = picture(url, Sources(Path(), allow_download=True, progress=notes))
    assert one == picture(url)
    assert server.asked == []
    assert one.read() == PNG
    asked = len(server.asked)
    assert one.read() == picture(url).read() == PNG
    assert len(server.asked) == asked
    assert kept(cache) == [*one.files]
    assert notes.lines == [f"pictures are downloaded into {cache}, once"]
    one.files[0].unlink()
    assert one.read() == PNG


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "the server says: HTTP Error 404: "),
        ("forbidden.png", "the server says: HTTP Error 403: "),
        ("broken.png", "the server says: HTTP Error 500: "),
        ("page.png", "a web page, not an image: its download failed"),
        ("text.png", "not an image, or of an unknown format"),
        ("empty.png", "not an image, or of an unknown format"),
        ("svg.png", "an SVG drawing"),
        ("cut.png", "cut off after "),
        ("claims.png", "a download of more than 1,000,000 bytes"),
        ("large.png", "a download of more than 1,000,000 bytes"),
        ("silent.png", "no answer in 0 s"),
        ("endless.png", "the download takes too long"),
        ("file.png", "the server says: HTTP Error 302: Found - Redirection to url 'file:///etc/"),
        ("ftp.png", "it leads to ftp://127.0.0.1"),
        ("circle.png", "the server says: HTTP Error 302: "),
    ],
)
def test_a_download_that_fails_says_why_and_leaves_nothing(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(downloads, "MAX_BYTES", 1_000_000)
    monkeypatch.setattr(downloads, "WAIT", 0.3)
    monkeypatch.setattr(downloads, "SECONDS", 0.6)
    url, began = f"{server.url}/{name}", time.monotonic()
    with pytest.raises(DataError) as caught:
        picture(url).read()
    said = str(caught.value)
    assert said.startswith(f"image cannot be read: {url}: {message}")
    assert "\n" not in said
    assert time.monotonic() - began < 5
    assert kept(cache) == []


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///a.png", "http://[::1/a.png", "http://127.0.0.1:99999/a.png", "http://a b/",
     "http://127.0.0.1:x/", "http://x\r\nHost: y/", "http://\x00/", "https://127.0.0.1:1/a.png",
     "http://" + "a" * 300 + "/", "HTTP://127.0.0.1:1/"],
    ids=lambda url: ascii(url)[:30],
)  # fmt: skip
def test_addresses_that_are_none_end_in_one_line(url: str) -> None:
    with pytest.raises(DataError) as caught:
        picture(url).read()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("image cannot be read: ")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a/b.png", "s3://bucket/a.png"])
def test_other_kinds_of_addresses_are_not_read(url: str) -> None:
    for allowed in (True, False):
        with pytest.raises(DataError, match="is a URL of a kind that is not read; give a path"):
            picture(url, Sources(Path(), allow_download=allowed))


def test_nothing_is_downloaded_without_leave(server: Server) -> None:
    with pytest.raises(DataError, match=r"let opd do it: data\.allow_download=true"):
        picture(f"{server.url}/a.png", Sources(Path()))
    assert server.asked == []


def test_a_host_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Sources(Path(), allow_download=True)
    said = []
    for number in range(8):
        with pytest.raises(DataError) as caught:
            picture(f"http://127.0.0.1:1/{number}.png", sources).read()
        said.append(str(caught.value))
    assert all("the server cannot be reached: " in line for line in said[: downloads.GIVEN_UP])
    assert all("127.0.0.1:1 did not answer 5 times" in line for line in said[downloads.GIVEN_UP :])


def test_a_server_that_sends_byte_after_byte_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its headers never end, and each byte comes in time."""
    monkeypatch.setattr(downloads, "_download", lambda *given: time.sleep(20))
    monkeypatch.setattr(downloads, "SECONDS", -0.9)
    with pytest.raises(DataError, match="no answer in"):
        picture("http://127.0.0.1:1/").read()


def test_a_cache_that_cannot_be_written_is_told(server: Server, cache: Path) -> None:
    cache.parent.parent.write_text("a file")
    with pytest.raises(DataError, match=r"image cannot be kept: .*Not a directory"):
        picture(f"{server.url}/a.png").read()


def test_rows_with_addresses_are_read(server: Server, tmp_path: Path, cache: Path) -> None:
    row = {"question": "?", "boxes": [[1, 2, 11, 12]]}
    names = ["a.png", "missing.png", "b.png", "a.png"]
    rows = [{**row, "image": f"{server.url}/{name}"} for name in names]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    reading = Reading(allow_download=True)
    data = read_dataset(tmp_path / "data.jsonl", reading=reading)
    assert len(data) == 3
    ((source, reason),) = data.skipped
    assert source == "data.jsonl:2"
    assert "missing.png: the server says: HTTP Error 404: " in reason
    assert sorted(server.asked) == ["/a.png", "/b.png", "/missing.png"]
    assert len(kept(cache)) == 2
    again = read_dataset(tmp_path / "data.jsonl", reading=reading)
    assert again.fingerprint == data.fingerprint
    assert sorted(server.asked)[2:] == ["/missing.png", "/missing.png"]
    with pytest.raises(DataError, match="no usable row of 4"):
        read_dataset(tmp_path / "data.jsonl")
