"""Renders chat templates in a child process with bounds: `render_child.py PATH SECONDS MEMORY`.

The sandbox of transformers keeps a template from files and from the interpreter, but does not bound
time and memory, and Jinja has loops, recursion and `*`. PATH: the list of import folders, as JSON;
SECONDS: processor time of one template; MEMORY: bytes. Each line of the input is a request, each
line of the output is the answer, both JSON. `opd.prompts.renderer` runs this file as a script.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

UNHEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that this process ignores. A terminal or scheduler sends them to the whole process group,
but the parent finishes the current step first, which may need a prompt."""

CHARACTERS = 2**20
"""Bound on the characters of a rendered text, in addition to eight times the bytes of the
request."""


def answer(request: dict[str, Any], length: int, memory: int) -> dict[str, str]:
    """The answer to a request of `length` bytes: "text" holds the rendered text, "error" the reason
    of a failure, "bound" the bound that was exceeded; `memory` in bytes is for the message."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        conversation = [{"role": "user", "content": request["content"]}]
        (text, *_), _ = render_jinja_template(
            conversations=[conversation],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["variables"],
        )
        if len(text) > CHARACTERS + 8 * length:
            return {"bound": f"writes {len(text):,} characters"}
        return {"text": text}
    except MemoryError:
        return {"bound": f"takes more than {memory >> 20} MiB of memory"}
    except RecursionError:
        return {"bound": "calls itself without an end"}
    except Exception as error:  # templates raise errors of many classes
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return {"error": reason[:1000]}


def watch(busy: threading.Event, memory: int) -> None:
    """Ends this process when it takes `memory` bytes more than now while `busy` is set. Needed
    where the operating system does not limit memory, as on a Mac."""
    scale = 1 if sys.platform == "darwin" else 1024
    limit = _peak() * scale + memory
    while busy.wait():
        if _peak() * scale > limit:
            os._exit(resource.RLIMIT_AS)
        time.sleep(0.01)


def limit_memory(memory: int) -> None:
    """Limits this process to `memory` bytes more than now, on systems that can."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):
        pass  # `watch` remains


def limit_time(seconds: int) -> None:
    """Lets the system end this process after `seconds` more of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Answers requests until the input ends."""
    for number in UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    sys.path[:] = json.loads(sys.argv[1])
    seconds, memory = int(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # an import may print
    import transformers.utils.chat_template_utils  # noqa: F401  loaded before the bounds apply

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(memory)
    busy = threading.Event()
    threading.Thread(target=watch, args=(busy, memory), daemon=True).start()
    for line in sys.stdin.buffer:
        limit_time(seconds)
        busy.set()
        try:
            answers.write(json.dumps(answer(json.loads(line), len(line), memory)).encode() + b"\n")
        except MemoryError:
            os._exit(resource.RLIMIT_AS)
        answers.flush()
        busy.clear()


if __name__ == "__main__":
    main()
