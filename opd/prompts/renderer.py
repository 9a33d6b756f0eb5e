"""Renders chat templates as transformers does, with bounds on time, memory and length.

A template comes from the author of the model folder. It may loop forever or fill the memory, even
for one question only. So a child process with bounds renders every prompt; it is started once and
serves all requests (`opd.prompts.render_child`).
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
"""Bound on the processor time of one rendering, in seconds; a usual prompt takes a millisecond."""

MEMORY = 512 * 2**20
"""Bound on the memory of a rendering, in bytes."""

PATIENCE = 120.0
"""Seconds to wait for an answer. It is far above SECONDS, since a busy machine may give the child
little processor time."""


class TemplateError(Exception):
    """A template refuses the question, or is broken; the message is one line."""


class TemplateBoundError(TemplateError):
    """A template exceeds a bound on time, memory or length; the message is one line."""


def start() -> subprocess.Popen[bytes]:
    """The child process; starts it if there is none. Called early, since the child needs about a
    second until it can answer, while the caller loads other files."""
    with _lock:
        return _process()


def render(
    template: str, content: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """The text of one user's turn by `template`, with the generation prompt.

    `content`: the parts of the turn. `variables`: the tokenizer's special tokens by name. Raises
    TemplateError if the template fails, TemplateBoundError if it exceeds a bound.
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
"""The child process, with the id of the process that started it: a fork must not use it. Empty or
one entry."""


def _process() -> subprocess.Popen[bytes]:
    """The running child process; starts it if there is none."""
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
    """The answer of the child process to one request, as in `render_child.answer`."""
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
    except BaseException:  # an unread answer would be taken for that of the next request
        _stop(process)
        raise
    if line.endswith(b"\n"):
        answer: dict[str, str] = json.loads(line)
        return answer
    return {"bound": _stop(process)}


def _line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line of the child's output; it lacks the newline if the child ended or takes too
    long."""
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
    """Ends the child process. Returns the reason why it gave no answer, as the end of a message."""
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
    if code > 0 and code != resource.RLIMIT_AS:  # the child failed before any bound
        return f"ended its process with exit code {code}"
    return f"takes more than {MEMORY >> 20} MiB of memory"


@atexit.register
def stop() -> None:
    """Ends the child process; the next rendering starts a new one."""
    if _running and _running[0][0] == os.getpid():
        _running[0][1].kill()
        _stop(_running[0][1])
