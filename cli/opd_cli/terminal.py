"""The only way to the terminal: text that cannot steer it, on any console, whether or not somebody
reads.

Questions, answers, names, paths and other programs' messages may hold control sequences. Every line
that `opd` writes passes `visible`: results through `opd_cli.console` or `say_json`, errors through
`one_line`, and whatever libraries write to stderr through `Stderr`.
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
"""Characters of an error, a note or a table's cell; a longer one is cut in the middle."""

HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Unicode categories that are escaped: controls, formats such as bidi marks, unassigned, private,
surrogates, separators of lines."""

FILLERS = set("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0") | {
    chr(0xE0100 + n) for n in range(240)
}
"""Letters and marks that show nothing."""

SIGNS = set(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)
"""Formats that show something: signs under which Arabic, Syriac and Kaithi numbers stand."""

JOINERS = {"\u200c", "\u200d"}
"""They make one emoji of several, and spell Persian and Indic words: shown raw between two letters
or symbols beyond ASCII."""

SELECTORS = {chr(0xFE00 + n) for n in range(16)}
"""They choose the look of the letter before: shown raw where there is one."""

UP = "\x1b[A"
"""The one sequence that other programs' bars need beside carriage returns: a line up."""


def visible(text: str, keep: str = "", longest: int | None = LONGEST) -> str:
    r"""`text` on one line, with an escape such as \x1b or \u202e for everything that steers a
    terminal or shows nothing.

    Letters, marks and emoji of all languages stay, and so do the characters of `keep`. A text above
    `longest` characters is cut.
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
    """An error or a note as one line: line breaks of a cause are spaces."""
    return visible(
        " ".join(
            part.strip() for part in re.split(r"[\r\n]+", _cut(message, LONGEST)) if part.strip()
        )
    )


def say(text: str) -> None:
    """Writes one line of a result to stdout."""
    sys.stdout.write(visible(text) + "\n")


def say_json(value: Mapping[str, Any]) -> None:
    r"""Writes one JSON object to stdout, in ASCII: everything else is \uXXXX, and what is not
    finite is null."""
    from opd.run.strict_json import dumps

    sys.stdout.write(dumps(value, ascii_only=True) + "\n")


def say_error(message: str) -> None:
    """Writes `opd: message` to stderr, as one line."""
    with suppress(OSError, ValueError):  # nobody reads: the exit code tells
        sys.stderr.write(f"opd: {one_line(message)}\n")


def say_bug(error: BaseException) -> None:
    """Writes the traceback of an error that nobody expected, and what to do with it."""
    text = "".join(traceback.format_exception(error))
    with suppress(OSError, ValueError):
        sys.stderr.write(visible(text.rstrip("\n"), keep="\n", longest=20 * LONGEST) + "\n")
    say_error(
        "this is a fault of opd, not of your input; please report it with the lines above"
        f" ({type(error).__name__})"
    )


class StdoutError(Exception):
    """Stdout cannot take a result: full, or nobody reads it any more."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause.strerror or str(cause))
        self.unread = isinstance(cause, BrokenPipeError)
        """Whether the reader went, as after `| head`: no failure of anybody's."""


class _Stream(io.TextIOBase):
    """Stands for one of the console's streams. It offers no `buffer`: bytes would go past it."""

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
    """Stands for sys.stdout while a command runs: what cannot be written raises StdoutError."""

    def write(self, text: str) -> int:
        """Writes the text."""
        with _told():
            return self.stream.write(text)

    def flush(self) -> None:
        """Writes what waits."""
        with _told():
            self.stream.flush()

    def give_up(self) -> None:
        """Throws away what waits, so that the interpreter's own flush at its end has no cause to
        complain."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


class Stderr(_Stream):
    """Stands for sys.stderr while a command runs: whole lines, visible, and above the bars where
    there are some.

    A console that is full or gone never ends a run.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.bars = False
        """Whether other programs' bars may draw themselves: no line is waited for."""
        self.note: Callable[[str], None] = self._line
        """Takes each whole line."""
        self._begun = ""

    def write(self, text: str) -> int:
        """Passes on what are whole lines; of a bar that drew over itself, the last state."""
        if self.bars:
            self.raw(UP.join(visible(part, keep="\r\n", longest=None) for part in text.split(UP)))
            return len(text)
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self.note(line.rstrip("\r").rpartition("\r")[2])
        self._begun = self._begun[-2 * LONGEST :]
        return len(text)

    def raw(self, text: str) -> None:
        """Writes to the console as it is."""
        # gone, closed, or a signal came while something was being written
        with suppress(OSError, ValueError, RuntimeError):
            self.stream.write(text)
            self.stream.flush()

    def flush(self) -> None:
        """Nothing waits but a line that has not ended."""

    def finish(self) -> None:
        """Passes on a line that has not ended."""
        if self._begun:
            self.write("\n")

    def _line(self, line: str) -> None:
        self.raw(visible(line) + "\n")


@contextmanager
def prepared() -> Iterator[Stdout]:
    """Makes the streams fit to be written to while a command runs, whatever they are.

    Closed ones are thrown away, characters that a console lacks become escapes, and libraries'
    warnings are one line each.
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
    # Theirs would come in several lines, each time a part of a library is loaded.
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
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StdoutError(error) from error


class _OneLine(logging.Handler):
    """Log records of libraries: a warning is one line that names the library, without its trace."""

    def emit(self, record: logging.LogRecord) -> None:
        package = record.name.partition(".")[0]
        # that it has no GPU: a run that needs one is refused in our own words
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
    """A library's warning as one line that names the library."""
    parts = filename.replace("\\", "/").split("site-packages/")[-1].split("/")
    package = (
        parts[0].removesuffix(".py")
        if len(parts) > 1 and "site-packages" in filename
        else category.__name__
    )
    sys.stderr.write(f"{package}: {one_line(str(message))}\n")


def _cut(text: str, longest: int | None, length: int | None = None) -> str:
    """The text without its middle where it is above `longest`; `length` is told, the text's own if
    none."""
    if longest is None or len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 4
    return f"{text[:head]} ... ({length or len(text)} characters) ... {text[-tail:]}"


def _shows(text: str, place: int) -> bool:
    """Whether a character shows, or belongs to one beside it that does."""
    letter = text[place]
    if letter in SELECTORS:
        return place > 0 and text[place - 1] not in SELECTORS and not _hidden(text[place - 1])
    if letter in JOINERS:
        around = text[place - 1 : place] + text[place + 1 : place + 2]
        return len(around) == 2 and not any(other.isascii() or _hidden(other) for other in around)
    return not _hidden(letter)


def _hidden(letter: str) -> bool:
    return letter in FILLERS or (unicodedata.category(letter) in HIDDEN and letter not in SIGNS)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _open_closed() -> None:
    """Opens what the shell closed of stdin, stdout and stderr: a file of the run's would get its
    number, and everybody's lines."""
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
