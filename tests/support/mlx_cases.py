"""Groups on a random model, and the same numbers computed the plain way: stock mlx-vlm, row by row, and the numpy objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_vlm.models.qwen3_vl import VisionModel
from mlx_vlm.utils import load_model
from PIL import Image
from safetensors.numpy import load_file, save_file

import opd_mlx
from opd.objective import evaluate, log_softmax
from opd.prompts.encoder import PromptEncoder
from opd.types import Completion, Group, ModelOptions
from opd_mlx.backend import MlxBackend
from opd_mlx.device import Device, this_device

SIZES = [[(64, 64)], [(96, 64), (64, 64)], [(48, 80)], [(64, 64), (48, 48), (64, 64)], [(64, 64)]]
"""Widths and heights of the images of each group's student; the teacher's are the next group's."""

LENGTHS = [(5, 3, 7), (1,), (4, 6), (), (2, 2, 2)]
"""Tokens of each group's completions."""


MAC = {
    "fused_attention": True,
    "score_block_rows": 1024,
    "score_block_bytes": 2**28,
    "head_block_bytes": 2**26,
    "pixel_bytes": 2**62,
}
"""Traits with which a CPU runs what a Mac runs, but for what MLX would have compiled."""


def mac(**traits: int) -> Device:
    """This device with a Mac's traits."""
    return replace(this_device(), **MAC, **traits)


@dataclass
class Case:
    """A model folder, groups for it, and a state folder in which the teacher differs from the student."""

    folder: Path
    encoder: PromptEncoder
    groups: list[Group]
    state: Path

    def backend(self, dtype: str = "float32", **options: bool) -> MlxBackend:
        backend = opd_mlx.load(ModelOptions(self.folder, dtype, **options))
        if not options:
            backend.load(self.state)
        return backend

    def stock(self, policy: str = "student"):
        """The policy as mlx-vlm has it."""
        model = load_model(self.folder)
        weights = model.sanitize({name: mx.array(value) for name, value in load_file(self.state / f"{policy}.safetensors").items()})
        model.load_weights(list(VisionModel(model.config.vision_config).sanitize(weights).items()))
        return model


def make_case(root: Path, folder: Path, questions: tuple[str, ...] = ("What digit is on the red tile?", "digit?", "What?")) -> Case:
    rng = np.random.default_rng(0)
    encoder = PromptEncoder(folder)
    prompts = [
        encoder.encode(
            [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes],
            questions[index % len(questions)],
        )
        for index, sizes in enumerate(SIZES)
    ]
    prompts[4] = prompts[0]  # one image under two groups: its features are computed once
    groups = []
    for index, lengths in enumerate(LENGTHS):
        completions = tuple(
            Completion(rng.integers(0, 250, size=length).astype(np.int32), rng.normal(-5, 1.5, size=length).astype(np.float32), False)
            for length in lengths
        )
        weights = [rng.uniform(0.01, 0.1, size=length).astype(np.float32) for length in lengths]
        for values in weights[:1]:
            values[0] = 0
        groups.append(Group(prompts[index], prompts[(index + 1) % len(prompts)], completions, tuple(weights)))
    state = root / "state"
    opd_mlx.load(ModelOptions(folder)).save(state)
    teacher = load_file(state / "teacher.safetensors")
    moved = {name: value + rng.normal(0, 0.1 * value.std() + 1e-3, size=value.shape).astype(np.float32) for name, value in teacher.items()}
    save_file(moved, state / "teacher.safetensors", metadata={"format": "pt"})
    return Case(folder, encoder, groups, state)


def stock_logits(model, prompt, tokens):
    """Logits [T, V] of stock mlx-vlm at the rows that predict `tokens`, from one plain causal row [prompt + tokens]."""
    row = mx.array(np.concatenate([prompt.tokens, tokens]))[None]
    after = np.broadcast_to(prompt.start + np.arange(len(tokens)), (3, len(tokens)))
    positions = mx.array(np.concatenate([prompt.positions, after], axis=1).astype(np.int32))[:, None]
    causal = mx.tril(mx.ones((row.shape[1], row.shape[1]), dtype=mx.bool_))[None, None]
    inner = model.language_model.model
    given = {"inputs_embeds": inner.embed_tokens(row)}
    if prompt.images:
        pixels, grid = mx.array(prompt.images["pixel_values"]), mx.array(prompt.images["image_grid_thw"])
        features = model.get_input_embeddings(row, pixels, image_grid_thw=grid)
        given = {name: getattr(features, name) for name in ("inputs_embeds", "visual_pos_masks", "deepstack_visual_embeds")}
        given["deepstack_visual_embeds"] = given["deepstack_visual_embeds"] or None
    hidden = inner(row, mask=causal, position_ids=positions, **given)[0, len(prompt.tokens) - 1 : -1]
    head = model.language_model.lm_head if "lm_head" in model.language_model else inner.embed_tokens.as_linear
    return head(hidden)


def plain_loss_and_gradients(case, groups, objective):
    """The step's loss and every gradient by Hugging Face name, from separate rows: the numpy objective gives the slope of the logits."""
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
            result = evaluate(np.array(logits(*values)), wanted, completion.tokens, completion.logprobs, objective)
            loss += float((weights * result.ratio * result.divergence).sum())
            _, slopes = mx.vjp(logits, list(values), [mx.array((weights[:, None] * result.gradient).astype(np.float32))])
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


def distribution(model, prompt, tokens, temperature, banned):
    """Log-probabilities [T, V] a sampler draws from, by stock mlx-vlm and numpy."""
    logits = np.array(stock_logits(model, prompt, tokens), np.float64) / temperature
    logits[:, list(banned)] = -np.inf
    return log_softmax(logits)


def loss_of(groups, statistics):
    """The step's loss from per-token statistics."""
    return sum(
        float((weights.astype(np.float64) * one.ratio * one.divergence).sum())
        for group, row in zip(groups, statistics, strict=True)
        for weights, one in zip(group.weights, row, strict=True)
    )


def relative_error(ours, theirs):
    """Largest ||a - b|| / max(||b||, 1e-3 * global norm) over tensors of equal names."""
    assert ours.keys() == theirs.keys()
    everything = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in theirs.values()))
    return max(
        np.linalg.norm(ours[name].astype(np.float64) - value) / max(np.linalg.norm(value.astype(np.float64)), 1e-3 * everything)
        for name, value in theirs.items()
    )


def clone(backend, **traits):
    """A backend of the same state on a device with other `traits`, without loading it again.

    They share the modules, which keep nothing between calls.
    """
    other = object.__new__(MlxBackend)
    other.__dict__ = dict(backend.__dict__)
    other._student, other._teacher, other._gradient = dict(backend._student), dict(backend._teacher), {}
    model = backend._model
    device = replace(model.device, **traits)
    other._model = replace(model, device=device, layers=model.family.layers(model.module, model.config, device))
    other._optimizer = opd_mlx.backend.Optimizer(other._student, device)
    return other
