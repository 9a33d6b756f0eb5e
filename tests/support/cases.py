"""Groups on a random model, whatever computes them: what `torch_cases` and `mlx_cases` share.

Both have the same names for the same things, so that a test runs over them as `twin`.
"""

from __future__ import annotations

import json
import pkgutil
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file, save_file

from opd.objective import log_softmax
from opd.prompts.encoder import PromptEncoder
from opd.prompts.processor import open_encoder
from opd.types import Completion, Group, ModelOptions, TokenStatistics

SIZES = [[(64, 64)], [(96, 64), (64, 64)], [(48, 80)], [(64, 64), (48, 48), (64, 64)], [(64, 64)]]
"""Widths and heights of the images of each group's student; the teacher's are the next group's."""

LENGTHS = [(5, 3, 7), (1,), (4, 6), (), (2, 2, 2)]
"""Tokens of each group's completions."""

WEIGHTED_SIZES = [[(64, 64)], [(96, 64), (48, 48)], [(40, 88)]]
WEIGHTED_LENGTHS = [(5, 3, 9), (1, 4), (6, 2)]
WEIGHTED_QUESTIONS = ("What digit is on the red tile?", "digit?", "What is red?")
"""What `weighted_groups` has in place of `SIZES`, `LENGTHS` and `QUESTIONS`."""

QUESTIONS = ("What digit is on the red tile?", "digit?", "What?")


@dataclass
class Case:
    """A model folder, groups for it, and a state whose teacher differs from the student."""

    folder: Path
    encoder: PromptEncoder
    groups: list[Group]
    state: Path


def make_case(
    kind: type[Case],
    load: Callable[[ModelOptions], Any],
    root: Path,
    folder: Path,
    questions: Sequence[str] = QUESTIONS,
) -> Any:
    """A case of the class `kind`, whose state a backend that `load` opens has written."""
    rng = np.random.default_rng(0)
    encoder = open_encoder(folder)

    def image(width: int, height: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    prompts = [
        encoder.encode([image(*size) for size in sizes], questions[index % len(questions)])
        for index, sizes in enumerate(SIZES)
    ]
    prompts[4] = prompts[0]  # one image under two groups: its features are computed once
    groups, allowed = [], np.setdiff1d(np.arange(250), encoder.banned)
    for index, lengths in enumerate(LENGTHS):
        completions = tuple(
            Completion(
                rng.choice(allowed, size=length).astype(np.int32),
                rng.normal(-5, 1.5, size=length).astype(np.float32),
                False,
            )
            for length in lengths
        )
        weights = [rng.uniform(0.01, 0.1, size=length).astype(np.float32) for length in lengths]
        for values in weights[:1]:
            values[0] = 0
        teacher = prompts[(index + 1) % len(prompts)]
        groups.append(Group(prompts[index], teacher, completions, tuple(weights)))
    state = root / "state"
    load(ModelOptions(folder)).save(state)
    path = state / "teacher.safetensors"
    moved = {
        name: value + rng.normal(0, 0.1 * value.std() + 1e-3, size=value.shape).astype(np.float32)
        for name, value in load_file(path).items()
    }
    save_file(moved, path, metadata={"format": "pt"})
    return kind(folder, encoder, groups, state)


def weighted_groups(encoder: PromptEncoder) -> list[Group]:
    """Three groups without empty completions or zero weights, whose teachers see other images."""
    rng, prompts, groups = np.random.default_rng(0), [], []
    for sizes, question in zip(WEIGHTED_SIZES, WEIGHTED_QUESTIONS, strict=True):
        pixels = [rng.integers(0, 255, (high, wide, 3), dtype=np.uint8) for wide, high in sizes]
        prompts.append(encoder.encode([Image.fromarray(one) for one in pixels], question))
    for index, lengths in enumerate(WEIGHTED_LENGTHS):
        completions = tuple(
            Completion(
                rng.integers(10, 250, size=length).astype(np.int32),
                rng.normal(-5, 1.5, size=length).astype(np.float32),
                False,
            )
            for length in lengths
        )
        weights = tuple(rng.uniform(0.01, 0.1, size=n).astype(np.float32) for n in lengths)
        teacher = prompts[(index + 1) % len(prompts)]
        groups.append(Group(prompts[index], teacher, completions, weights))
    return groups


def half_precision(folder: Path, source: Path) -> Path:
    """A copy of a model folder whose weights are cut to bfloat16; no framework is needed for it."""
    shutil.copytree(source, folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, value in load_file(source / "model.safetensors").items():
        data = (value.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        places = [len(content), len(content) + len(data)]
        header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": places}
        content += data
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return folder


def stored(file: Path) -> dict[str, dict[str, Any]]:
    """Every tensor of a safetensors file as it stands there: "dtype", "shape" and "data"."""
    return dict(deserialize(file.read_bytes()))


def state_of(backend: Any, folder: Path) -> dict[str, NDArray[np.float32]]:
    """All that a checkpoint of the backend says: both policies, the moments and the step."""
    backend.save(folder)
    found = {}
    for file in ("student", "teacher", "optimizer"):
        with safe_open(folder / f"{file}.safetensors", "np") as tensors:
            names = list(tensors.keys())
            found |= {f"{file}.{name}": tensors.get_tensor(name) for name in names}
            if file == "optimizer":
                found["step"] = np.array(int(tensors.metadata()["step"]))
    return found


def watch(monkeypatch: pytest.MonkeyPatch, name: str, seen: Callable[..., Any]) -> None:
    """Calls `seen` with the arguments of every call of a function, before it runs.

    `name`: where its caller looks it up, as "opd_torch.gradient.divergence_head".
    """
    real = pkgutil.resolve_name(name)

    @wraps(real)
    def watched(*arguments: Any, **options: Any) -> Any:
        seen(*arguments, **options)
        return real(*arguments, **options)

    monkeypatch.setattr(name, watched)


def distribution_of(
    logits: NDArray[Any], temperature: float = 1.0, banned: Sequence[int] = ()
) -> NDArray[np.float64]:
    """The log-probabilities [T, V] that a sampler draws from."""
    logits = np.array(logits, np.float64) / temperature
    logits[:, list(banned)] = -np.inf
    return log_softmax(logits)


def loss_of(groups: Sequence[Group], statistics: Sequence[Sequence[TokenStatistics]]) -> float:
    """The step's loss from per-token statistics."""
    return sum(
        float((weights.astype(np.float64) * one.ratio * one.divergence).sum())
        for group, row in zip(groups, statistics, strict=True)
        for weights, one in zip(group.weights, row, strict=True)
    )


def norm_of(tensors: Mapping[str, NDArray[Any]]) -> float:
    """The Euclidean norm of all tensors together."""
    return float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in tensors.values())))


def relative_error(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> float:
    """Largest ||a - b|| / max(||b||, 1e-3 * global norm) over tensors of equal names."""
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * norm_of(theirs)
    return max(
        norm_of({name: ours[name].astype(np.float64) - value}) / max(norm_of({name: value}), floor)
        for name, value in theirs.items()
    )
