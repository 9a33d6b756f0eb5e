"""Committed results of the embedded model on the CPU, against which `opd backends --check` compares
any device.

`python -m opd.testing.fixtures` computes them with the torch backend on the CPU and overwrites the
file; run it when the embedded model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd import registry
from opd.backend import Backend
from opd.errors import BackendError
from opd.objective import Objective
from opd.prompts.encoder import PromptEncoder
from opd.randomness import uniforms
from opd.testing.conformance import GRADIENT, VALUE, Result, check
from opd.tiny import MODEL, Scenes
from opd.types import STATISTICS, Completion, Group, ModelOptions, Prompt, Sampling, Update
from opd.views import usable
from opd.views.view import ViewOptions

PATH = Path(__file__).parent / "fixtures.npz"
SCENES, COMPLETIONS, MAX_TOKENS, STEPS = 4, 3, 10, 10

Numbers = dict[str, NDArray[Any]]


def check_backend(name: str) -> list[Result]:
    """The results of all checks of a backend on this device: the conformance suite, then the
    committed numbers. Raises BackendError, ModelError."""
    encoder, pairs = material()
    make = partial(registry.load, name, ModelOptions(MODEL))
    return [
        *check(make, pairs, encoder.stop, encoder.banned),
        *against_fixtures(make, encoder, pairs),
    ]


def against_fixtures(
    make: Callable[[], Backend], encoder: PromptEncoder, pairs: list[tuple[Prompt, Prompt]]
) -> list[Result]:
    """Compares the backend with the committed numbers; errors are relative. Raises BackendError if
    the file cannot be read."""
    try:
        with np.load(PATH) as stored:
            expected = dict(stored)
    except OSError as error:
        raise BackendError(f"the committed numbers cannot be read: {PATH}: {error}") from error
    computed = numbers(make(), encoder, pairs, expected)
    unequal = (computed["sampled"] != expected["sampled"]).mean()
    largest = np.abs(expected["gradient"]).max()
    gradients = np.abs(computed["gradient"] - expected["gradient"]).max() / largest
    statistics = _error(computed["statistics"], expected["statistics"])
    losses = _error(computed["losses"], expected["losses"])
    attention = 0.0
    if "attention" in computed:
        attention = _error(computed["attention"], expected["attention"])
    return [
        Result("statistics equal the CPU's", statistics, 5 * VALUE),
        Result("attention equals the CPU's", attention, VALUE),
        Result("gradients equal the CPU's", float(gradients), GRADIENT),
        Result("sampled tokens equal the CPU's", float(unequal), 0.0),
        Result("losses of ten steps equal the CPU's", losses, GRADIENT),
    ]


def material() -> tuple[PromptEncoder, list[tuple[Prompt, Prompt]]]:
    """The embedded model's encoder, and prompts of full image and crop, of unequal lengths."""
    encoder, view = PromptEncoder(MODEL), ViewOptions()
    scenes = [scene for size in (128, 96) for scene in Scenes("choice", SCENES // 2, size=size)]
    return encoder, [
        (usable.encode_student(encoder, scene), usable.encode_teacher(encoder, scene, view))
        for scene in scenes
    ]


def numbers(
    backend: Backend,
    encoder: PromptEncoder,
    pairs: list[tuple[Prompt, Prompt]],
    stored: Mapping[str, NDArray[Any]],
) -> Numbers:
    """The numbers that are compared, by name. Scored completions are those in `stored` if it has
    any, else the sampled ones.

    `statistics` [6, tokens]; `gradient` [parameters, 2]: the norm of each parameter's gradient and
    its product with a fixed random direction, both divided by the global norm; `attention` [L,
    rows], if the backend attends: each row's product with a fixed random direction; `sampled` [B,
    n, max_tokens]: token ids, padded with -1; `logprobs`: the same, padded with 0; `losses` [STEPS]
    of AdamW and EMA steps on the same completions.
    """
    drawn = uniforms(0, 1, range(len(pairs)), COMPLETIONS, MAX_TOKENS)
    sampled = backend.sample(
        [student for student, _ in pairs], drawn, Sampling(1.0, encoder.stop, encoder.banned)
    )
    tokens = np.full(drawn.shape, -1, np.int32)
    logprobs = np.zeros(drawn.shape, np.float32)
    for row, completions in enumerate(sampled):
        for place, completion in enumerate(completions):
            tokens[row, place, : len(completion)] = completion.tokens
            logprobs[row, place, : len(completion)] = completion.logprobs
    computed: Numbers = {"sampled": tokens, "logprobs": logprobs}
    groups = _groups(pairs, {**computed, **stored})
    objective = Objective()
    statistics = list(chain.from_iterable(backend.accumulate(groups, objective)))
    computed["statistics"] = np.stack(
        [np.concatenate([getattr(record, name) for record in statistics]) for name in STATISTICS]
    )
    if backend.attends:
        computed["attention"] = _attention(backend, groups)
    computed["gradient"] = _projected(backend.tensors("gradient"))
    weights = [weight for group in groups for weight in group.weights]
    losses = []
    for _ in range(STEPS):
        backend.apply(Update(1e-3))
        backend.move_teacher(0.05)
        loss = 0.0
        statistics = list(chain.from_iterable(backend.accumulate(groups, objective)))
        for weight, record in zip(weights, statistics, strict=True):
            loss += float((weight * record.ratio * record.divergence).sum())
        losses.append(loss)
    computed["losses"] = np.array(losses)
    return computed


def _groups(pairs: list[tuple[Prompt, Prompt]], stored: Mapping[str, NDArray[Any]]) -> list[Group]:
    """Groups of `pairs` with the stored completions; the weights make the loss a mean over all
    tokens."""
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


def _attention(backend: Backend, groups: Sequence[Group]) -> NDArray[np.float64]:
    """The attention of all completion rows to visual tokens, projected to [L, rows]."""
    weights = backend.attend(
        [group.student for group in groups], [group.completions for group in groups]
    )
    rng = np.random.Generator(np.random.Philox(0))
    rows = [one @ rng.choice([-1.0, 1.0], size=one.shape[-1]) for one in chain(*weights)]
    return np.concatenate(rows, axis=1)


def _projected(tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """Norm and random projection of every tensor, over the global norm: [tensors, 2], by name."""
    global_norm = np.sqrt(
        sum(float((value.astype(np.float64) ** 2).sum()) for value in tensors.values())
    )
    rng = np.random.Generator(np.random.Philox(0))
    rows = []
    for name in sorted(tensors):
        value = tensors[name].astype(np.float64).ravel()
        rows.append([np.linalg.norm(value), value @ rng.choice([-1.0, 1.0], size=value.size)])
    return np.asarray(np.array(rows) / global_norm)


def _error(computed: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest error, relative where `expected` is above 1; infinite if the shapes differ."""
    if computed.shape != expected.shape:
        return np.inf
    return float((np.abs(computed - expected) / np.maximum(1, np.abs(expected))).max())


def main() -> None:
    """Computes the committed numbers and overwrites the file."""
    encoder, pairs = material()
    backend = registry.load("cpu", ModelOptions(MODEL))
    computed: dict[str, Any] = numbers(backend, encoder, pairs, {})
    np.savez_compressed(PATH, **computed)


if __name__ == "__main__":
    main()
