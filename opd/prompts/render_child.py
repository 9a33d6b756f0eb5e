"""Renders chat templates in a process of its own, with bounds: `render_child.py PATH SECONDS
MEMORY`.

A template comes from a model folder, and its language has loops, recursion and `*`. The sandbox of
transformers keeps a template from files and from Python's inside, not from time and memory. PATH:
the list of import folders, as JSON; SECONDS of processor time a template; MEMORY in bytes. Each
line of the input is a request, each line of the output its answer, both JSON; see
`opd.prompts.renderer`, which starts this file. Nobody imports it.
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
"""Signals that a terminal or a scheduler sends to the whole group: the parent finishes its step,
which may need a prompt."""

CHARACTERS = 2**20
"""Length of a text, beyond eight times the length of the request."""


def answer(request: dict[str, Any], length: int, memory: int) -> dict[str, str]:
    """The text of a request under "text", or a reason under "error" or, for a bound, "bound"."""
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
    except Exception as error:  # whatever a template does
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return {"error": reason[:1000]}


def watch(busy: threading.Event, memory: int) -> None:
    """Ends the process where the memory has no limit of the system's, as on a Mac."""
    scale = 1 if sys.platform == "darwin" else 1024
    limit = _peak() * scale + memory
    while busy.wait():
        if _peak() * scale > limit:
            os._exit(resource.RLIMIT_AS)
        time.sleep(0.01)


def limit_memory(memory: int) -> None:
    """At most `memory` more than now, where the system can hold a process to that."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):
        pass  # `watch` remains


def limit_time(seconds: int) -> None:
    """`seconds` of processor time from now on, after which the system ends the process."""
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
    import transformers.utils.chat_template_utils  # noqa: F401  before the bounds

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
