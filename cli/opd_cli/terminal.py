"""Writes to the terminal. Text is escaped, so that it cannot steer the terminal, and a console that
is closed or lacks characters does not end a run.

Questions, answers, names, paths and messages of libraries may hold control sequences. Every line
that `opd` writes passes `visible`: results through `opd_cli.console` or `say_json`, errors through
`one_line`, and everything that libraries write to stderr through `Stderr`.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

LONGEST = 2000
"""Largest number of characters in an error, a note or a table's cell; a longer text loses its
middle."""

HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Unicode categories that are escaped: control characters, formats such as bidi marks, unassigned,
private use, surrogates, line separators."""

FILLERS = set("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0") | {
    chr(0xE0100 + n) for n in range(240)
}
"""Letters and marks without a visible glyph; they are escaped."""

SIGNS = set(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)
"""Format characters with a visible glyph: signs over Arabic, Syriac and Kaithi numbers."""

JOINERS = {"\u200c", "\u200d"}
"""Joiners combine emoji, and occur in Persian and Indic words. They are not escaped between two
visible characters beyond ASCII."""

SELECTORS = {chr(0xFE00 + n) for n in range(16)}
"""Variation selectors choose the glyph of the character before. They are not escaped after a
visible character."""

UP = "\x1b[A"
"""Moves the cursor a line up; with carriage returns, all that progress bars of libraries need."""


def visible(text: str, keep: str = "", longest: int | None = LONGEST) -> str:
    r"""`text` on one line, with an escape such as \x1b or \u202e for every character that steers a
    terminal or is invisible.

    Letters, marks and emoji of all languages stay, and so do the characters in `keep`. A text of
    more than `longest` characters loses its middle; None: it is not cut.
    """
    length, text = len(text), _cut(text, longest)
    if text.isascii() and text.isprintable():
        return text
    shown = [
        letter if letter in keep or _shows(text, place) else _escape(letter)
        for place, letter in enumerate(text)
    ]
    return _cut("".join(shown), longest, length)


def one_line(message: str) -> str:
    """`message` as one visible line; line breaks become spaces."""
    parts = [part.strip() for part in re.split(r"[\r\n]+", _cut(message, LONGEST))]
    return visible(" ".join(part for part in parts if part))


def say(text: str) -> None:
    """Writes one line of a result to stdout."""
    sys.stdout.write(visible(text) + "\n")


def say_json(value: Mapping[str, Any]) -> None:
    r"""Writes one JSON object to stdout, in ASCII with \uXXXX for other characters, and null for
    numbers that are not finite."""
    from opd.run.strict_json import dumps

    sys.stdout.write(dumps(value, ascii_only=True) + "\n")


def say_error(message: str) -> None:
    """Writes `opd: message` to stderr, as one line."""
    with suppress(OSError, ValueError):  # stderr is closed: the exit code remains
        sys.stderr.write(f"opd: {one_line(message)}\n")


def say_bug(error: BaseException) -> None:
    """Writes the traceback of an unexpected error, and asks the user to report it."""
    text = "".join(traceback.format_exception(error))
    with suppress(OSError, ValueError):
        sys.stderr.write(visible(text.rstrip("\n"), keep="\n", longest=20 * LONGEST) + "\n")
    say_error(
        "this is a fault of opd, not of your input; please report it with the lines above"
        f" ({type(error).__name__})"
    )


class StdoutError(Exception):
    """Stdout cannot be written: the disk is full, or the reader has gone."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause.strerror or str(cause))
        self.unread = isinstance(cause, BrokenPipeError)
        """Whether the reader has gone, as after `| head`, which is not an error."""


class _Stream(io.TextIOBase):
    """Replaces a standard stream. It has no `buffer`, since bytes would bypass the escapes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


class Stdout(_Stream):
    """Replaces sys.stdout while a command runs. Raises StdoutError if a write fails."""

    def write(self, text: str) -> int:
        """Writes the text. Raises StdoutError."""
        with _as_stdout_error():
            return self.stream.write(text)

    def flush(self) -> None:
        """Writes buffered text. Raises StdoutError."""
        with _as_stdout_error():
            self.stream.flush()

    def give_up(self) -> None:
        """Discards buffered text, so that the interpreter's flush at exit does not fail."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


class Stderr(_Stream):
    """Replaces sys.stderr while a command runs: passes on whole lines, escaped, which appear above
    the progress bars if there are any.

    A console that cannot be written never ends a run.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.bars = False
        """Whether libraries may draw progress bars now: text is then written at once."""
        self.note: Callable[[str], None] = self._line
        """Receives each whole line."""
        self._begun = ""

    def write(self, text: str) -> int:
        """Passes on whole lines; of a line with carriage returns, only the last state."""
        if self.bars:
            self.raw(UP.join(visible(part, keep="\r\n", longest=None) for part in text.split(UP)))
            return len(text)
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self.note(line.rstrip("\r").rpartition("\r")[2])
        self._begun = self._begun[-2 * LONGEST :]
        return len(text)

    def raw(self, text: str) -> None:
        """Writes text to the console without escapes."""
        # The console is gone or closed, or a signal has interrupted another write.
        with suppress(OSError, ValueError, RuntimeError):
            self.stream.write(text)
            self.stream.flush()

    def flush(self) -> None:
        """Does nothing, since only an unfinished line is buffered."""

    def finish(self) -> None:
        """Passes on an unfinished line."""
        if self._begun:
            self.write("\n")

    def _line(self, line: str) -> None:
        self.raw(visible(line) + "\n")


@contextmanager
def prepared() -> Iterator[Stdout]:
    """Replaces the standard streams while a command runs, so that writing works on any console.

    Output to a closed stream is discarded, characters that a console lacks become escapes, and
    warnings of libraries are one line each.
    """
    _open_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  it stays open
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stdout, stderr, showwarning, handler = (
        sys.stdout,
        sys.stderr,
        warnings.showwarning,
        _OneLine(logging.WARNING),
    )
    # Warnings of transformers have several lines, and come whenever a part of it is loaded.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.stdout, sys.stderr = results, lines = Stdout(stdout), Stderr(stderr)
    warnings.showwarning = _warning
    logging.getLogger().addHandler(handler)
    try:
        yield results
    finally:
        lines.finish()
        logging.getLogger().removeHandler(handler)
        warnings.showwarning = showwarning
        sys.stdout, sys.stderr = stdout, stderr


@contextmanager
def _as_stdout_error() -> Iterator[None]:
    """Turns an OSError into a StdoutError."""
    try:
        yield
    except OSError as error:
        raise StdoutError(error) from error


class _OneLine(logging.Handler):
    """Writes log records as one line that names the library, without a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        package = record.name.partition(".")[0]
        # bitsandbytes warns that there is no GPU; opd raises an error if a run needs one.
        if package == "bitsandbytes":
            return
        message = one_line(record.getMessage())
        sys.stderr.write(message + "\n" if package.startswith("opd") else f"{package}: {message}\n")


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Writes a warning as one line that names the library."""
    parts = filename.replace("\\", "/").split("site-packages/")[-1].split("/")
    package = (
        parts[0].removesuffix(".py")
        if len(parts) > 1 and "site-packages" in filename
        else category.__name__
    )
    sys.stderr.write(f"{package}: {one_line(str(message))}\n")


def _cut(text: str, longest: int | None, length: int | None = None) -> str:
    """The text without its middle if it has more than `longest` characters. `length`: the number of
    characters to name in the gap; None: those of `text`."""
    if longest is None or len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 4
    return f"{text[:head]} ... ({length or len(text)} characters) ... {text[-tail:]}"


def _shows(text: str, place: int) -> bool:
    """Whether the character at `place` is visible, or modifies a visible character beside it."""
    letter = text[place]
    if letter in SELECTORS:
        return place > 0 and text[place - 1] not in SELECTORS and not _hidden(text[place - 1])
    if letter in JOINERS:
        around = text[place - 1 : place] + text[place + 1 : place + 2]
        return len(around) == 2 and not any(other.isascii() or _hidden(other) for other in around)
    return not _hidden(letter)


def _hidden(letter: str) -> bool:
    """Whether a character steers the terminal or is invisible."""
    return letter in FILLERS or (unicodedata.category(letter) in HIDDEN and letter not in SIGNS)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _open_closed() -> None:
    """Opens those of stdin, stdout and stderr that the shell has closed. Otherwise a file of the
    run would get their number, and receive all output."""
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
