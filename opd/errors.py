"""Everything that goes wrong on purpose.

OpdError
├── UserError            the input is wrong: one line, exit code 2
│   ├── RecipeError      a recipe, an option, a value
│   ├── DataError        a data file, or a row where rows are not skipped
│   ├── ModelError       a model folder
│   ├── BackendError     a backend that is unknown, not installed, or has no device
│   └── FolderError      a run folder: taken, missing, unwritable
├── RunError             the run failed on its own: one line, exit code 1
│   └── OutOfMemory      the device's memory does not suffice; nothing half done is left
└── Stopped              a person stopped the run: one line, exit code 130
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SPECIFIC = re.compile(r"(?<!\bfield )'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\S*\d\S*|\S+\.\w+:?")
"""Matches parts of a message that differ from row to row: quotations other than the name of a
field, paths, names of files and numbers."""


class OpdError(Exception):
    """Base of all errors that `opd` raises for a person to read. The message is one line that says
    what is wrong, where, and what to do."""


class UserError(OpdError):
    """The input is wrong; the command line exits with 2."""


class RecipeError(UserError):
    """A recipe, an option or one of their values is wrong."""


class DataError(UserError):
    """A data file cannot be used, or a row cannot where rows are not skipped."""

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self._kind = kind

    @property
    def kind(self) -> str:
        """The reason without quotations, paths and numbers, so that rows with the same fault can be
        counted."""
        return self._kind or kind_of(str(self))


class ModelError(UserError):
    """A model folder is missing, incomplete, or of an architecture that is not supported."""


class BackendError(UserError):
    """A backend is unknown, not installed, or has no device on this machine."""


class FolderError(UserError):
    """A run folder is taken, is missing, does not hold a run, or cannot be written."""


class Stopped(OpdError):
    """The run was asked to stop; everything up to the last whole step is saved, and the command
    line exits with 130."""


class RunError(OpdError):
    """The run failed although the input was right; the command line exits with 1."""


class OutOfMemory(RunError):
    """The device's memory does not suffice for a call of the backend. No gradient is left, and the
    step may be taken again."""


def out_of_memory(error: BaseException) -> OutOfMemory:
    """The OutOfMemory for `error`, with which a framework says that it cannot allocate."""
    advice = "lower model.max_pixels or rollout.max_tokens, or see what takes it: opd plan"
    return OutOfMemory(f"out of memory: {one_line(error)}; {advice}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause for a message about the misspelt `name`: the nearest known name, or a list of all
    known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """The message of another library's error in one line of at most 300 characters: the first line,
    and the second too if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return shortened(line, 300)


def kind_of(reason: str) -> str:
    """A reason without quotations, paths and numbers."""
    kind = re.sub(r"(\.\.\.[\s,x:;]*)+", "... ", SPECIFIC.sub("...", reason))
    return kind.strip(" .:;,") or reason


def plural(count: int, noun: str) -> str:
    """`count` and `noun`, which takes an s unless `count` is 1: 1 row, 1,200 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shortened(text: str, most: int) -> str:
    """`text` for a message, cut to at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: Any) -> str:
    """`value` for a message, as JSON of at most 80 characters."""
    return shortened(json.dumps(value, default=str), 80)


def no_weights(folder: Path, part: str) -> ModelError:
    """The ModelError for a model folder in which `part` of the weights is missing."""
    pickled = next(iter(sorted(folder.glob("*.bin"))), None)
    if pickled:
        return ModelError(
            f"{folder}: no {part}, and {pickled.name} is pickled, so that to read it would run what"
            " is in it; save the model again as safetensors, with save_pretrained of transformers"
        )
    return ModelError(
        f"{folder}: no {part}; a model folder holds config.json and its weights as safetensors"
    )


def holds_nan(folder: Path, tensor: str) -> ModelError:
    """The ModelError for a model folder in which `tensor` holds NaN or infinity."""
    return ModelError(
        f"{folder}: weights hold NaN or infinity, in tensor {tensor}; fetch or save this model"
        " again"
    )


def no_attention(model: Path | str) -> BackendError:
    """The error for a model of which the backend cannot say where it looks."""
    return BackendError(
        f"{model}: this architecture has no family file, so that its attention cannot be read"
    )


def not_finite(folder: Path, tensor: str | None, steps: int) -> OpdError:
    """The error for logits that are not finite after `steps` optimizer steps of the model in
    `folder`.

    `tensor`: the weight that holds NaN or infinity; None if all weights are finite.
    """
    if tensor and not steps:
        return holds_nan(folder, tensor)
    if tensor:
        what = f"weights hold NaN or infinity, in tensor {tensor}"
        return RunError(
            f"after step {steps} {what}; train again from {folder} with a smaller"
            " optimizer.learning_rate"
        )
    when = f"after step {steps} " if steps else ""
    what = (
        f"the logits of {folder} are not finite although the weights are, so numbers became too"
        " large"
    )
    return RunError(
        f"{when}{what}; try --set"
        f" model.dtype=float32{', or a smaller optimizer.learning_rate' if steps else ''}"
    )
