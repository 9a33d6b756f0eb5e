"""Chat templates rendered with bounds on time, memory and length, as transformers renders them.

A template comes from whoever made the model folder. It may loop, or double a text until the memory
is full, and not before a certain question: so each rendering happens in one other process, which
stays and has bounds. See `opd.prompts.render_child`.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 4
"""Processor time of one template; a prompt takes a thousandth of a second."""

MEMORY = 512 * 2**20
"""Bytes that a template may take."""

PATIENCE = 120.0
"""Seconds by the clock for one answer, on a machine that is busy; the bound is processor time."""


class TemplateError(Exception):
    """A template refuses what it is given, or is broken; one line."""


class TemplateBoundError(TemplateError):
    """A template takes more time or memory than any prompt needs; one line."""


def start() -> None:
    """Starts the process, which needs a second before its first answer, while others are loaded."""
    with _lock:
        _process()


def render(
    template: str, content: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """The prompt of one user's turn by `template`; `variables`: the tokenizer's special tokens.

    Raises TemplateError, and TemplateBoundError where the template comes to a bound.
    """
    request = (
        json.dumps({"template": template, "content": content, "variables": variables}).encode()
        + b"\n"
    )
    with _lock:
        answer = _ask(request)
    if "bound" in answer:
        raise TemplateBoundError(f"it {answer['bound']}")
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


_lock = threading.Lock()
_running: list[tuple[int, subprocess.Popen[bytes]]] = []
"""The process, behind the id of the process that started it: a fork has no share in it."""


def _process() -> subprocess.Popen[bytes]:
    if _running and _running[0][0] == os.getpid() and _running[0][1].poll() is None:
        return _running[0][1]
    child = Path(__file__).with_name("render_child.py")
    paths = [os.path.abspath(path) for path in sys.path]
    process = subprocess.Popen(
        [sys.executable, "-I", str(child), json.dumps(paths), str(SECONDS), str(MEMORY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )
    _running[:] = [(os.getpid(), process)]
    return process


def _ask(request: bytes) -> dict[str, str]:
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        view = memoryview(request)
        while view:
            view = view[process.stdin.write(view) :]
        line = _line(process)
    except BrokenPipeError:
        line = b""
    except BaseException:  # an answer left in the pipe would be taken for the next one's
        _stop(process)
        raise
    if line.endswith(b"\n"):
        answer: dict[str, str] = json.loads(line)
        return answer
    return {"bound": _stop(process)}


def _line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line of the process; without its end where the process ended or takes too long."""
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
        while not line.endswith(b"\n") and selector.select(PATIENCE):
            part = os.read(process.stdout.fileno(), 2**20)  # type: ignore[union-attr]
            if not part:
                break
            line += part
    return line


def _stop(process: subprocess.Popen[bytes]) -> str:
    """Ends the process, and says why it had ended."""
    _running.clear()
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.5)
    code = process.poll()
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    if code is None:
        return f"gave no answer in {PATIENCE:.0f} seconds"
    if code == -signal.SIGXCPU:
        return f"takes more than {SECONDS} seconds"
    if code > 0 and code != resource.RLIMIT_AS:  # no bound: the process itself failed
        return f"ended its process with exit code {code}"
    return f"takes more than {MEMORY >> 20} MiB of memory"


@atexit.register
def stop() -> None:
    """Ends the process; the next rendering starts another one."""
    if _running and _running[0][0] == os.getpid():
        _running[0][1].kill()
        _stop(_running[0][1])
