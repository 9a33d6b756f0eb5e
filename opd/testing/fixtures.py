"""Numbers of the embedded model, committed from the CPU, against which any device can be checked:
`opd backends --check`.

`python -m opd.testing.fixtures` writes them anew from the torch backend on the CPU; it is run when
the embedded model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd import registry as backends
from opd.backend import Backend
from opd.errors import BackendError
from opd.objective import Objective
from opd.prompts.encoder import PromptEncoder
from opd.randomness import uniforms
from opd.testing.conformance import GRADIENT, VALUE, Result, check
from opd.tiny import MODEL, Scenes
from opd.types import STATISTICS, Completion, Group, ModelOptions, Prompt, Sampling, Update
from opd.views import usable
from opd.views.crop import ViewOptions

PATH = Path(__file__).parent / "fixtures.npz"
SCENES, COMPLETIONS, MAX_TOKENS, STEPS = 4, 3, 10, 10

Numbers = dict[str, NDArray[Any]]


def check_backend(name: str) -> list[Result]:
    """All checks of a backend on this device: the conformance suite, then the committed numbers.
    Raises BackendError, ModelError."""
    encoder, pairs = material()
    make = partial(backends.load, name, ModelOptions(MODEL))
    return [
        *check(make, pairs, encoder.stop, encoder.banned),
        *against_fixtures(make, encoder, pairs),
    ]


def against_fixtures(
    make: Callable[[], Backend], encoder: PromptEncoder, pairs: list[tuple[Prompt, Prompt]]
) -> list[Result]:
    """Relative errors to the committed numbers."""
    try:
        with np.load(PATH) as stored:
            expected = dict(stored)
    except OSError as error:
        raise BackendError(f"the committed numbers cannot be read: {PATH}: {error}") from error
    found = numbers(make(), encoder, pairs, expected)
    unequal = (found["sampled"] != expected["sampled"]).mean()
    gradients = (
        np.abs(found["gradient"] - expected["gradient"]).max() / np.abs(expected["gradient"]).max()
    )
    return [
        Result(
            "statistics equal the CPU's",
            _error(found["statistics"], expected["statistics"]),
            5 * VALUE,
        ),
        Result("gradients equal the CPU's", float(gradients), GRADIENT),
        Result("sampled tokens equal the CPU's", float(unequal), 0.0),
        Result(
            "losses of ten steps equal the CPU's",
            _error(found["losses"], expected["losses"]),
            GRADIENT,
        ),
    ]


def material() -> tuple[PromptEncoder, list[tuple[Prompt, Prompt]]]:
    """The embedded model's encoder, and pairs of full image and crop of unequal lengths."""
    encoder, view = PromptEncoder(MODEL), ViewOptions()
    sizes = [scene for size in (128, 96) for scene in Scenes("choice", SCENES // 2, size=size)]
    return encoder, [
        (usable.encode_student(encoder, scene), usable.encode_teacher(encoder, scene, view))
        for scene in sizes
    ]


def numbers(
    backend: Backend,
    encoder: PromptEncoder,
    pairs: list[tuple[Prompt, Prompt]],
    stored: Mapping[str, NDArray[Any]],
) -> Numbers:
    """What is compared. The completions come from `stored` where it has them, else they are sampled
    now.

    `statistics` [6, tokens]; `gradient` [parameters, 2], each one's norm and its product with a
    fixed random direction, over the global norm; `sampled` [B, n, max_tokens], padded with -1;
    `losses` of ten AdamW and EMA steps on the same completions.
    """
    drawn = uniforms(0, 1, range(len(pairs)), COMPLETIONS, MAX_TOKENS)
    sampled = backend.sample(
        [student for student, _ in pairs], drawn, Sampling(1.0, encoder.stop, encoder.banned)
    )
    tokens, logprobs = (
        np.full(drawn.shape, fill, kind) for fill, kind in ((-1, np.int32), (0, np.float32))
    )
    for row, group in enumerate(sampled):
        for place, one in enumerate(group):
            tokens[row, place, : len(one)], logprobs[row, place, : len(one)] = (
                one.tokens,
                one.logprobs,
            )
    found: Numbers = {"sampled": tokens, "logprobs": logprobs}
    groups = _groups(pairs, {**found, **stored})
    objective = Objective()
    statistics = [one for row in backend.accumulate(groups, objective) for one in row]
    found["statistics"] = np.stack(
        [np.concatenate([getattr(one, name) for one in statistics]) for name in STATISTICS]
    )
    found["gradient"] = _projected(backend.tensors("gradient"))
    losses = []
    for _ in range(STEPS):
        backend.apply(Update(1e-3))
        backend.move_teacher(0.05)
        rows = backend.accumulate(groups, objective)
        pairs_of = [
            (weight, one)
            for group, row in zip(groups, rows, strict=True)
            for weight, one in zip(group.weights, row, strict=True)
        ]
        losses.append(
            sum(float((weight * one.ratio * one.divergence).sum()) for weight, one in pairs_of)
        )
    found["losses"] = np.array(losses)
    return found


def _groups(pairs: list[tuple[Prompt, Prompt]], stored: Mapping[str, NDArray[Any]]) -> list[Group]:
    """The stored completions, of weights that are the mean over all tokens."""
    groups = []
    for (student, teacher), tokens, logprobs in zip(
        pairs, stored["sampled"], stored["logprobs"], strict=True
    ):
        lengths = (tokens >= 0).sum(-1)
        completions = tuple(
            Completion(ids[:length], values[:length], finished=True)
            for ids, values, length in zip(tokens, logprobs, lengths, strict=True)
        )
        total = (stored["sampled"] >= 0).sum()
        groups.append(
            Group(
                student,
                teacher,
                completions,
                tuple(np.full(length, 1 / total, np.float32) for length in lengths),
            )
        )
    return groups


def _projected(tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    everything = np.sqrt(
        sum(float((value.astype(np.float64) ** 2).sum()) for value in tensors.values())
    )
    rng = np.random.Generator(np.random.Philox(0))
    rows = []
    for name in sorted(tensors):
        value = tensors[name].astype(np.float64).ravel()
        rows.append([np.linalg.norm(value), value @ rng.choice([-1.0, 1.0], size=value.size)])
    return np.asarray(np.array(rows) / everything)


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return np.inf
    return float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max())


def main() -> None:
    """Writes the committed numbers."""
    encoder, pairs = material()
    found: dict[str, Any] = numbers(backends.load("cpu", ModelOptions(MODEL)), encoder, pairs, {})
    np.savez_compressed(PATH, **found)


if __name__ == "__main__":
    main()
