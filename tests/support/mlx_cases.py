"""Groups on a random model, and the same numbers computed the plain way: stock mlx-vlm, row by row,
and the numpy objective."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
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
from opd_mlx.optimizer import Optimizer, move_teacher
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

    def loaded(self, dtype: str = DTYPE) -> Loaded:
        return loaded(self, dtype)

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


@dataclass(frozen=True)
class Loaded:
    """A model that was loaded once, of which tests take backends; each begins with `state`, or with
    the trained parameters `student`. They share the modules, which keep nothing between calls."""

    options: ModelOptions
    model: Model
    student: dict[str, mx.array]
    state: Path | None = None

    def on(self, **settings: Any) -> Model:
        """The model on a device with other `settings`."""
        model, device = self.model, replace(self.model.device, **settings)
        layers = model.family.layers(model.module, model.config, device)
        return replace(model, device=device, layers=layers)

    def backend(self, model: Model | None = None, **settings: Any) -> MlxBackend:
        """A backend of `model`, or of the model on a device with other `settings`."""
        made = MlxBackend(self.options, model or self.on(**settings), dict(self.student))
        if self.state:
            made.load(self.state)
        return made


def opened(options: ModelOptions, state: Path | None = None, **settings: Any) -> Loaded:
    """The model, with settings of its device record changed."""
    model, student = opd_mlx.model.load_model(options, replace(this_device(), **settings))
    return Loaded(options, model, student, state)


def backend(case: cases.Case, dtype: str = DTYPE, **options: bool) -> MlxBackend:
    """The case's state; or its folder's model as it is, where there are options."""
    made = load(ModelOptions(case.folder, dtype, **options))
    if not options:
        made.load(case.state)
    return made


def loaded(case: cases.Case, dtype: str = DTYPE) -> Loaded:
    """The case's state, loaded once."""
    return opened(ModelOptions(case.folder, dtype), case.state)


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


def optimizer(loaded: Loaded, **settings: Any) -> Optimizer:
    """An optimizer of the model's parameters, apart from any backend."""
    return Optimizer(dict(loaded.student), replace(loaded.model.device, **settings))


def move(teacher: dict[str, mx.array], student: Optimizer, rate: float, **settings: Any) -> None:
    """Moves `teacher`, by name, towards the optimizer's parameters."""
    move_teacher(teacher, student.parameters, rate, replace(this_device(), **settings))


def arrays(numbers: Mapping[str, NDArray[Any]]) -> dict[str, mx.array]:
    """The backend's float32 arrays of `numbers`."""
    return {name: mx.array(value.astype(np.float32)) for name, value in numbers.items()}


def numbers(arrays: Mapping[str, mx.array]) -> dict[str, NDArray[Any]]:
    """Copies of the backend's arrays in numpy; they must be float32."""
    return {name: np.array(value) for name, value in arrays.items()}
