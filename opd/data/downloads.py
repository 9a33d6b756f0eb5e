"""Downloads pictures at http and https addresses into the user's cache folder.

The standard library's urllib is used, since huggingface_hub brings another client with each of its
major versions.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)
from uuid import uuid4

from opd.data.images import opened, short
from opd.data.pictures import Loaded
from opd.errors import DataError, one_line, shortened
from opd.paths import cache_folder
from opd.progress import Progress
from opd.types import Picture
from opd.version import __version__

MAX_BYTES = 1 << 26
"""Largest download in bytes: 64 MiB."""

WAIT = 10.0
"""Seconds after which a server that sends nothing is given up."""

SECONDS = 60.0
"""Seconds after which a download is given up."""

PAUSE = 1.0
"""Seconds before a server that is too busy is asked once more."""

GIVEN_UP = 5
"""A host that did not answer so many times in a row is not asked again."""

PIXELS = 1 << 62
"""More pixels than any picture has: sizes are checked by those who open the picture."""

BUSY = {429, 500, 502, 503, 504}
"""Status codes of a server that may answer a moment later."""


@dataclass(frozen=True)
class Remote(Picture):
    """A picture at an address, whose only file is that of the download."""

    downloads: Downloads = field(compare=False, repr=False)

    def read(self) -> bytes:
        """The content, downloaded unless it was before. Raises DataError."""
        (file,) = self.files
        try:
            if not file.is_file():
                self.downloads.fetch(self.name, file)
            return file.read_bytes()
        except DataError as error:
            raise DataError(f"image cannot be read: {short(self)}: {error}") from error
        except OSError as error:
            raise DataError(
                f"image cannot be kept: {short(self)}: {file.parent}: {error.strerror}"
            ) from error


class Downloads:
    """Downloads pictures; safe for threads. `progress` hears where they are kept."""

    def __init__(self, progress: Progress) -> None:
        self.folder = cache_folder() / "pictures"
        self._progress = progress
        self._silent: Counter[str] = Counter()
        self._told = False
        self._lock = threading.Lock()

    def picture(self, url: str) -> Remote:
        """The picture at an address, which is downloaded when it is opened."""
        key = hashlib.sha256(url.encode()).hexdigest()
        return Remote(url, (self.folder / key[:2] / key,), self)

    def fetch(self, url: str, file: Path) -> None:
        """Downloads a picture into a file. Raises DataError if that fails or takes too long, or if
        it is not a picture; OSError if the file cannot be written."""
        with self._lock:
            first, self._told = not self._told, True
        if first:
            self._progress.note(f"pictures are downloaded into {self.folder}, once")
        host = _host(url)
        if self._silent[host] >= GIVEN_UP:
            raise DataError(f"{host} did not answer {GIVEN_UP} times, and is not asked again")
        try:
            content = _within(SECONDS, url)
        except Silent as error:
            self._silent[host] += 1
            raise DataError(str(error)) from error
        self._silent[host] = 0
        try:
            with opened(Loaded(url, (), content), PIXELS):
                pass
        except DataError as error:
            raise DataError(str(error).rpartition(f"{short(url)}: ")[2]) from error
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{uuid4().hex[:8]}.partial")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, file)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


class Silent(Exception):
    """A host cannot be reached, or does not answer in time."""


class _OnlyHttp(HTTPRedirectHandler):
    """Follows redirects to http and https alone."""

    def redirect_request(self, *given: Any) -> Request | None:
        """The request of a redirect. Raises DataError for another kind of address."""
        _, response, *_, url = given
        if urlsplit(url).scheme not in ("http", "https"):
            response.close()
            raise DataError(f"it leads to {url[:80]}, which is not read")
        return super().redirect_request(*given)


def _host(url: str) -> str:
    """The host of an address. Raises DataError for an address that is wrong."""
    try:
        return urlsplit(url).netloc
    except ValueError as error:
        raise DataError(f"the address is wrong: {error}") from error


def _within(seconds: float, url: str) -> bytes:
    """The content at an address. Raises Silent after `seconds`, whatever the server does."""
    result: list[bytes | BaseException] = []

    def run() -> None:
        try:
            result.append(_download(url, time.monotonic() + seconds))
        except BaseException as error:  # raised again by whoever waits
            result.append(error)

    # A thread that still waits then, for a server that sends byte by byte, ends with the process.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    (outcome,) = result or [Silent(f"no answer in {seconds:.0f} s")]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _download(url: str, deadline: float, again: bool = True) -> bytes:
    """The content at an address. Raises DataError, or Silent if there is no answer in time."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler,
        HTTPHandler,
        HTTPSHandler,
        HTTPDefaultErrorHandler,
        HTTPErrorProcessor,
        _OnlyHttp,
    ):
        opener.add_handler(handler())
    address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    request = Request(address, headers={"User-Agent": f"opd/{__version__}"})
    try:
        with opener.open(request, timeout=WAIT) as response:
            return _body(response, deadline)
    except HTTPError as error:
        with error:
            if error.code in BUSY and again and time.monotonic() + PAUSE < deadline:
                time.sleep(PAUSE)
                return _download(url, deadline, again=False)
            raise DataError(f"the server says: {shortened(one_line(error), 150)}") from error
    except URLError as error:
        raise Silent(f"the server cannot be reached: {error.reason}") from error
    except TimeoutError as error:
        raise Silent(f"no answer in {WAIT:.0f} s") from error
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(f"the download failed: {one_line(error)}") from error


def _body(response: Any, deadline: float) -> bytes:
    """The content of a response. Raises DataError if it is cut off or above MAX_BYTES, and Silent
    after `deadline`."""
    length = response.headers.get("Content-Length", "")
    stated = int(length) if length.isdecimal() else None
    content = bytearray()
    while part := response.read1(1 << 16):
        content += part
        if max(len(content), stated or 0) > MAX_BYTES:
            raise DataError(f"a download of more than {MAX_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise Silent("the download takes too long")
    if stated is not None and len(content) < stated:
        raise DataError(f"cut off after {len(content):,} of {stated:,} bytes")
    return bytes(content)
