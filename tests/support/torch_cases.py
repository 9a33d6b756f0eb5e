"""Groups on a random model, and the same numbers computed the plain way: stock transformers, row by row, and autograd."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

import opd_torch
from opd.prompts.encoder import PromptEncoder
from opd.prompts.processor import open_encoder
from opd.types import Completion, Group, ModelOptions
from opd_torch.backend import TorchBackend

SIZES = [[(64, 64)], [(96, 64), (64, 64)], [(48, 80)], [(64, 64), (48, 48), (64, 64)], [(64, 64)]]
"""Widths and heights of the images of each group's student; the teacher's are the next group's."""

LENGTHS = [(5, 3, 7), (1,), (4, 6), (), (2, 2, 2)]
"""Tokens of each group's completions."""


@dataclass
class Case:
    """A model folder, groups for it, and a state folder in which the teacher differs from the student."""

    folder: Path
    encoder: PromptEncoder
    groups: list[Group]
    state: Path

    def backend(self, dtype: str = "float64", **options: bool) -> TorchBackend:
        backend = opd_torch.load_cpu(ModelOptions(self.folder, dtype, **options))
        if not options:
            backend.load(self.state)
        return backend

    def stock(self, policy: str = "student") -> torch.nn.Module:
        """The policy as transformers has it, in float64."""
        model = transformers.AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float64, attn_implementation="sdpa")
        weights = {name: torch.from_numpy(value).double() for name, value in load_file(self.state / f"{policy}.safetensors").items()}
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
        return model


def make_case(root: Path, folder: Path, questions: tuple[str, ...] = ("What digit is on the red tile?", "digit?", "What?")) -> Case:
    rng = np.random.default_rng(0)
    encoder = open_encoder(folder)
    prompts = [
        encoder.encode(
            [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes],
            questions[index % len(questions)],
        )
        for index, sizes in enumerate(SIZES)
    ]
    prompts[4] = prompts[0]  # one image under two groups: its features are computed once
    groups, allowed = [], np.setdiff1d(np.arange(250), encoder.banned)
    for index, lengths in enumerate(LENGTHS):
        completions = tuple(
            Completion(rng.choice(allowed, size=length).astype(np.int32), rng.normal(-5, 1.5, size=length).astype(np.float32), False)
            for length in lengths
        )
        weights = [rng.uniform(0.01, 0.1, size=length).astype(np.float32) for length in lengths]
        for values in weights[:1]:
            values[0] = 0
        groups.append(Group(prompts[index], prompts[(index + 1) % len(prompts)], completions, tuple(weights)))
    state = root / "state"
    opd_torch.load_cpu(ModelOptions(folder)).save(state)
    teacher = load_file(state / "teacher.safetensors")
    moved = {name: value + rng.normal(0, 0.1 * value.std() + 1e-3, size=value.shape).astype(np.float32) for name, value in teacher.items()}
    save_file(moved, state / "teacher.safetensors", metadata={"format": "pt"})
    return Case(folder, encoder, groups, state)


def plain_delta_rule(query, key, value, g, beta, initial_state=None, **options):
    """The recurrence of the gated delta net as it is defined, token by token, in the precision of its inputs."""
    repeats = value.shape[2] // key.shape[2]
    query, key = (x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(repeats, 2) for x in (query, key))
    batch, length, heads, width = value.shape
    state = torch.zeros(batch, heads, key.shape[-1], width, dtype=torch.float64) if initial_state is None else initial_state
    out = []
    for t in range(length):
        state = state * g[:, t, :, None, None].double().exp()
        missing = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * missing)
        out.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) / key.shape[-1] ** 0.5)
    return torch.stack(out, 1), state


def delta_rule_in_float64():
    """A context in which transformers computes a delta net in float64; without it, in float32 whatever the model's precision."""
    return patch.object(transformers.models.qwen3_5.modeling_qwen3_5, "torch_chunk_gated_delta_rule", plain_delta_rule)


def stock_logits(model, prompt, tokens):
    """Logits [T, V] of stock transformers at the rows that predict `tokens`, from one plain row [prompt + tokens]."""
    ids = np.concatenate([prompt.tokens, tokens]).astype(np.int64)
    kinds = np.zeros_like(ids)
    kinds[prompt.visual.index] = 1
    kind = model.config.model_type
    named = {"gemma3": "token_type_ids"}.get(kind, "mm_token_type_ids" if kind.startswith("qwen") else None)
    arrays = {name: torch.from_numpy(value) for name, value in prompt.images.items()}
    arrays = {name: value.double() if value.is_floating_point() else value.long() for name, value in arrays.items()}
    out = model(
        input_ids=torch.from_numpy(ids)[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        use_cache=False,
        **({named: torch.from_numpy(kinds)[None]} if named else {}),
        **({name: value[None] for name, value in arrays.items()} if kind in ("idefics3", "smolvlm") else arrays),
    )
    return out.logits[0, len(prompt.tokens) - 1 : -1]


def plain_divergence(student, teacher, objective):
    """The divergence [T] of logits [T, V], as its formula reads, for autograd."""
    s, t = (logits.div(objective.temperature).log_softmax(-1) for logits in (student, teacher))
    if objective.top_k is not None:
        ids = s.detach().topk(objective.top_k).indices
        s, t = s.gather(-1, ids), t.gather(-1, ids)
        if objective.tail:
            s, t = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (s, t))
        else:
            s, t = s.log_softmax(-1), t.log_softmax(-1)
    if objective.alpha == 0:
        return (t.exp() * (t - s)).sum(-1)
    if objective.alpha == 1:
        return (s.exp() * (s - t)).sum(-1)
    m = ((1 - objective.alpha) * s.exp() + objective.alpha * t.exp()).log()
    return (1 - objective.alpha) * (s.exp() * (s - m)).sum(-1) + objective.alpha * (t.exp() * (t - m)).sum(-1)


def plain_loss_and_gradients(case, groups, objective):
    """The step's loss and the gradient of all that is trained, by name, in float64, from separate rows."""
    student, teacher = case.stock(), case.stock("teacher")
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for completion, weights in zip(group.completions, group.weights, strict=True):
            logits = stock_logits(student, group.student, completion.tokens)
            with torch.no_grad():
                wanted = stock_logits(teacher, group.teacher, completion.tokens)
            chosen = (logits.detach() / objective.temperature).log_softmax(-1)[range(len(completion)), completion.tokens]
            ratio = (chosen - torch.from_numpy(completion.logprobs).double()).exp().clamp(max=objective.ratio_clip)
            loss = loss + (torch.from_numpy(weights).double() * ratio * plain_divergence(logits, wanted, objective)).sum()
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in student.named_parameters() if parameter.grad is not None}
    return float(loss.detach()), gradients


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


def gradients_of(backend):
    """The accumulated gradient in the backend's own precision."""
    return {name: value.numpy().copy() for name, value in backend._gradient.items()}


def on_device(backend, **settings):
    """The backend, with settings of its device record changed."""
    for policy in ("_student", "_teacher"):
        model = getattr(backend, policy)
        setattr(backend, policy, replace(model, device=replace(model.device, **settings)))
    return backend


def clone(backend):
    """A backend of the same state, without loading it again."""
    other = copy.deepcopy(backend)
    other._gradient = {}
    return other
