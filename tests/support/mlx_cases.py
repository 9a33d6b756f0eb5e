"""Groups on a random model, and the same numbers computed the plain way: stock mlx-vlm, row by row,
and the numpy objective."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_vlm.models.qwen3_vl import VisionModel
from mlx_vlm.utils import load_model
from numpy.typing import NDArray
from safetensors.numpy import load_file

import opd_mlx
from opd.objective import evaluate
from opd.types import ModelOptions, Prompt
from opd_mlx.backend import MlxBackend
from opd_mlx.device import this_device
from opd_mlx.model import Model
from tests.support import cases
from tests.support.cases import loss_of, relative_error

__all__ = ["loss_of", "relative_error"]

NAME, PACKAGE = "mlx", "opd_mlx"
DTYPE = "float32"
"""The most exact that the backend computes in; the bounds are for it."""

LOSS, GRADIENT = 1e-5, 1e-4
"""Bounds for the relative error of the loss, and of every gradient (`relative_error`)."""

PAIRS = 3
"""Pairs of prompts that the conformance suite runs on; fewer, since a delta net takes MLX's CPU
long."""

STATISTICS = {"rtol": 2e-5, "atol": 1e-6}
"""Bounds for statistics of completions that run a few at a time."""

LOGPROB = {"atol": 1e-5}
"""Bounds for log-probabilities, as `assert_allclose` takes them."""

SPLIT = 2e-5
"""Bound for the relative error of a gradient whose sums are taken in another order."""

HALF = {False: 0.2, True: 0.6}
"""Bounds for the relative error of a gradient in bfloat16; of the delta net."""

SELDOM = {"steps_ahead": 3}
"""Settings with which tokens are looked at some steps late, as on a GPU."""

SEGMENTS = {"delta_segment": 5}
"""Settings with which rows of a delta net are recomputed in pieces."""

FULL_MEMORY = RuntimeError("[malloc] Unable to allocate 8 bytes.")

MAC = {
    "fused_attention": True,
    "score_block_rows": 1024,
    "score_block_bytes": 2**28,
    "head_block_bytes": 2**26,
    "pixel_bytes": 2**62,
}
"""Settings with which a CPU runs what a Mac runs, but for what MLX would have compiled."""

GPU = {**MAC, "steps_ahead": 1}


@dataclass
class Case(cases.Case):
    """A case that MLX's backend and stock mlx-vlm compute."""

    def backend(self, dtype: str = DTYPE, **options: bool) -> MlxBackend:
        return backend(self, dtype, **options)

    def stock(self, policy: str = "student"):
        """The policy as mlx-vlm has it."""
        model = load_model(self.folder)
        weights = load_file(self.state / f"{policy}.safetensors")
        named = model.sanitize({name: mx.array(value) for name, value in weights.items()})
        vision = VisionModel(model.config.vision_config)
        model.load_weights(list(vision.sanitize(named).items()))
        return model


make_case = partial(cases.make_case, Case, opd_mlx.load)
exactly = nullcontext


def load(options: ModelOptions, **settings: Any) -> MlxBackend:
    """The model, with settings of its device record changed."""
    return opd_mlx.load(options, replace(this_device(), **settings))


def backend(case: cases.Case, dtype: str = DTYPE, **options: bool) -> MlxBackend:
    """The case's state; or its folder's model as it is, where there are options."""
    loaded = load(ModelOptions(case.folder, dtype, **options))
    if not options:
        loaded.load(case.state)
    return loaded


def logits_of(model: Any, prompt: Prompt, tokens: NDArray[Any]) -> NDArray[Any]:
    """`stock_logits` as numpy."""
    return np.array(stock_logits(model, prompt, tokens))


def exported(folder: Path) -> Any:
    """An export as mlx-vlm loads it."""
    return load_model(folder)


def processes(folder: Path) -> list[dict[str, str]]:
    """What the environments of two processes of one run say."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    return [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(2)]


def stock_logits(model, prompt, tokens):
    """Logits [T, V] of stock mlx-vlm at the rows that predict `tokens`, from one plain causal row
    [prompt + tokens]."""
    row = mx.array(np.concatenate([prompt.tokens, tokens]))[None]
    after = np.broadcast_to(prompt.start + np.arange(len(tokens)), (3, len(tokens)))
    positions = mx.array(np.concatenate([prompt.positions, after], axis=1).astype(np.int32))[
        :, None
    ]
    causal = mx.tril(mx.ones((row.shape[1], row.shape[1]), dtype=mx.bool_))[None, None]
    inner = model.language_model.model
    given = {"inputs_embeds": inner.embed_tokens(row)}
    if prompt.images:
        pixels, grid = (
            mx.array(prompt.images["pixel_values"]),
            mx.array(prompt.images["image_grid_thw"]),
        )
        features = model.get_input_embeddings(row, pixels, image_grid_thw=grid)
        given = {
            name: getattr(features, name)
            for name in ("inputs_embeds", "visual_pos_masks", "deepstack_visual_embeds")
        }
        given["deepstack_visual_embeds"] = given["deepstack_visual_embeds"] or None
    hidden = inner(row, mask=causal, position_ids=positions, **given)[
        0, len(prompt.tokens) - 1 : -1
    ]
    head = (
        model.language_model.lm_head
        if "lm_head" in model.language_model
        else inner.embed_tokens.as_linear
    )
    return head(hidden)


def plain_loss_and_gradients(case, groups, objective):
    """The step's loss and every gradient by Hugging Face name, from separate rows: the numpy
    objective gives the slope of the logits."""
    student, teacher = case.stock(), case.stock("teacher")
    names, values = zip(*tree_flatten(student.parameters()), strict=True)
    gradients = {name: np.zeros(value.shape) for name, value in zip(names, values, strict=True)}
    loss = 0.0
    for group in groups:
        for completion, weights in zip(group.completions, group.weights, strict=True):

            def logits(*values, group=group, completion=completion):
                student.update(tree_unflatten(list(zip(names, values, strict=True))))
                return stock_logits(student, group.student, completion.tokens)

            wanted = np.array(stock_logits(teacher, group.teacher, completion.tokens))
            result = evaluate(
                np.array(logits(*values)), wanted, completion.tokens, completion.logprobs, objective
            )
            loss += float((weights * result.ratio * result.divergence).sum())
            _, slopes = mx.vjp(
                logits,
                list(values),
                [mx.array((weights[:, None] * result.gradient).astype(np.float32))],
            )
            for name, slope in zip(names, slopes, strict=True):
                gradients[name] += np.array(slope)
    return loss, {hugging_face(name): channels_second(value) for name, value in gradients.items()}


def hugging_face(name):
    for ours, theirs in (
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.visual."),
        ("language_model.lm_head", "lm_head"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def channels_second(value):
    return value.transpose(0, 4, 1, 2, 3) if value.ndim == 5 else value


def gradients_of(backend: MlxBackend) -> dict[str, NDArray[Any]]:
    """The accumulated gradient, by Hugging Face name."""
    return backend.tensors("gradient")


def has_gradient(backend: MlxBackend) -> bool:
    """Whether anything of a gradient is held."""
    return bool(backend._gradient)


def fill(
    backend: MlxBackend, draw: Callable[..., NDArray[Any]], poison: float | None = None
) -> None:
    """Puts `draw(shape)` in place of an accumulated gradient, and `poison` into one number."""
    backend._gradient = {
        name: mx.array(draw(parameter.shape).astype(np.float32))
        for name, parameter in backend._student.items()
    }
    if poison is not None:
        backend._gradient["language_model.model.norm.weight"][0] = poison


def dtypes(backend: MlxBackend) -> set[str]:
    """The precisions of gradient and trained parameters."""
    held = [*backend._gradient.values(), *backend._student.values()]
    return {str(value.dtype).removeprefix("mlx.core.") for value in held}


def model_of(backend: MlxBackend) -> Model:
    """The model that the backend computes with."""
    return backend._model


def parameters_of(backend: MlxBackend) -> dict[str, mx.array]:
    """The student's trained parameters, by MLX's names."""
    return backend._student


def clone(backend: MlxBackend, **settings: Any) -> MlxBackend:
    """A backend of the same state on a device with other `settings`, without loading it again.

    They share the modules, which keep nothing between calls.
    """
    other = object.__new__(MlxBackend)
    other.__dict__ = dict(backend.__dict__)
    other._student, other._teacher = dict(backend._student), dict(backend._teacher)
    other._gradient, model = {}, backend._model
    device = replace(model.device, **settings)
    layers = model.family.layers(model.module, model.config, device)
    other._model = replace(model, device=device, layers=layers)
    other._optimizer = opd_mlx.backend.Optimizer(other._student, device)
    return other
