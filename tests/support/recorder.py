"""A backend that computes nothing and writes down every call with its arguments: what reaches the
protocol is all that it shows.

It is installed as other people's backends are, by an entry point, so nothing of the product is
patched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd.backend import Prefill
from opd.types import Completion, ModelOptions, TokenStatistics, UpdateResult

NAME = "recorder"
DIVERGENCE, RATIO, ENTROPIES, GAP, NORM = 2.0, 0.5, (0.75, 0.25), 1.5, 3.0
"""What the recorder says of every token, and of every gradient."""


@dataclass(frozen=True)
class Call:
    """One call of the protocol: its name, its arguments by their names in the protocol, and what it
    returned."""

    name: str
    arguments: dict[str, Any]
    result: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None


def letters(prompt, uniforms, sampling) -> Completion:
    """A completion of its uniforms alone: its length is of the first one, its tokens (printable
    characters) of each; then it stops."""
    length = 1 + int(uniforms[0] * len(uniforms))
    tokens = [int(32 + 60 * uniform) for uniform in uniforms[:length]]
    stops = length < len(uniforms) and bool(sampling.stop)
    tokens += list(sampling.stop[:1]) * stops
    return Completion(
        np.array(tokens, np.int32), -np.arange(1, len(tokens) + 1, dtype=np.float32), stops
    )


def endless(prompt, uniforms, sampling) -> Completion:
    """A completion that never stops."""
    return Completion(
        np.full(len(uniforms), 65, np.int32), np.full(len(uniforms), -1, np.float32), False
    )


@dataclass
class Recorder:
    """The protocol's verbs, written down."""

    options: ModelOptions
    write: Callable[..., Completion]
    calls: list[Call] = field(default_factory=list)
    rank = 0
    size = 1
    device = "nothing"
    peak_memory = 7

    def total(self, values):
        return values.copy()

    def prefill(self, prompts):
        return self.called("prefill", Prefill(prompts, "read"), prompts=list(prompts))

    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        found = [
            [self.write(prompt, row, sampling) for row in rows]
            for prompt, rows in zip(prompts, uniforms, strict=True)
        ]
        given = {"prompts": list(prompts), "uniforms": uniforms.copy(), "sampling": sampling}
        return self.called("sample", found, **given, policy=policy, prefill=prefill)

    def accumulate(self, groups, objective, split=0, prefill=None):
        rows = [[_statistics(one) for one in group.completions] for group in groups]
        return self.called(
            "accumulate",
            rows,
            groups=list(groups),
            objective=objective,
            split=split,
            prefill=prefill,
        )

    def score(self, groups, objective, top=0):
        rows = [[_statistics(one) for one in group.completions] for group in groups]
        return self.called("score", rows, groups=list(groups), objective=objective, top=top)

    def apply(self, update):
        return self.called("apply", UpdateResult(NORM, True), update=update)

    def move_teacher(self, rate):
        self.called("move_teacher", None, rate=rate)

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.txt").write_text("state")
        self.called("save", None, folder=folder)

    def load(self, folder):
        assert (folder / "state.txt").read_text() == "state"
        self.called("load", None, folder=folder)

    def export(self, folder, kind):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.txt").write_text("weights")
        if kind == "model":
            shutil.copyfile(self.options.path / "config.json", folder / "config.json")
        self.called("export", None, folder=folder, kind=kind)

    def tensors(self, kind):
        return {}

    def called(self, name, result, **arguments):
        self.calls.append(Call(name, arguments, result))
        return result


LOADED: list[Recorder] = []
WRITE = [letters]


def load(options: ModelOptions) -> Recorder:
    """What the entry point names."""
    LOADED.append(Recorder(options, WRITE[-1]))
    return LOADED[-1]


@contextmanager
def writing(write):
    """Completions are those of `write(prompt, uniforms, sampling)` meanwhile."""
    WRITE.append(write)
    yield
    WRITE.pop()


def _statistics(completion):
    ones = np.ones(len(completion), np.float32)
    student = completion.logprobs
    return TokenStatistics(
        student,
        student - GAP * ones,
        ENTROPIES[0] * ones,
        ENTROPIES[1] * ones,
        RATIO * ones,
        DIVERGENCE * ones,
    )
