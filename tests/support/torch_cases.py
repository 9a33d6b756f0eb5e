"""Groups on a random model, and the same numbers computed the plain way: stock transformers, row by
row, and autograd."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file

import opd_torch
from opd.types import ModelOptions, Prompt
from opd_torch.backend import TorchBackend
from opd_torch.batch import DecodeStep
from opd_torch.device import this_device
from opd_torch.model import Model, load_model
from opd_torch.optimizer import Optimizer, move_teacher
from tests.support import cases
from tests.support.cases import loss_of, relative_error

__all__ = ["loss_of", "relative_error"]

NAME, PACKAGE = "cpu", "opd_torch"
DTYPE = "float64"
"""The most exact that the backend computes in; the bounds are for it."""

LOSS, GRADIENT = 1e-6, 1e-6
"""Bounds for the relative error of the loss, and of every gradient (`relative_error`)."""

PAIRS = 4
"""Pairs of prompts that the conformance suite runs on; of three images too."""

STATISTICS = {"rtol": 1e-5, "atol": 1e-6}
"""Bounds for statistics of completions that run a few at a time."""

LOGPROB = {"rtol": 1e-6}
"""Bounds for log-probabilities, as `assert_allclose` takes them."""

SPLIT = 1e-9
"""Bound for the relative error of a gradient whose sums are taken in another order."""

HALF = {False: 0.1, True: 0.4}
"""Bounds for the relative error of a gradient in bfloat16; of the delta net."""

GPU: dict[str, Any] = {}
SELDOM = {"check_every": 8}
"""Settings with which tokens are looked at some steps late, as on a GPU."""

SEGMENTS: dict[str, Any] = {}

FULL_MEMORY = torch.OutOfMemoryError("no room is left")


@dataclass
class Case(cases.Case):
    """A case that torch's backend and stock transformers compute."""

    def backend(self, dtype: str = DTYPE, **options: bool) -> TorchBackend:
        return backend(self, dtype, **options)

    def loaded(self, dtype: str = DTYPE) -> Loaded:
        return loaded(self, dtype)

    def stock(self, policy: str = "student") -> torch.nn.Module:
        """The policy as transformers has it, in float64."""
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            self.folder, dtype=torch.float64, attn_implementation="sdpa"
        )
        weights = load_file(self.state / f"{policy}.safetensors")
        weights = {name: torch.from_numpy(value).double() for name, value in weights.items()}
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
        return model


make_case = partial(cases.make_case, Case, opd_torch.load_cpu)


def load(options: ModelOptions, **settings: Any) -> TorchBackend:
    """The model on the CPU, with settings of its device record changed."""
    return TorchBackend(options, opened(options, **settings).model)


@dataclass(frozen=True)
class Loaded:
    """A model that was loaded once, of which tests take backends; each begins with `state`, or with
    the model's weights."""

    options: ModelOptions
    model: Model
    state: Path | None = None

    def on(self, **settings: Any) -> Model:
        """The model with weights of its own, on a device with other `settings`."""
        other = copy.deepcopy(self.model)
        return replace(other, device=replace(other.device, **settings))

    def backend(self, model: Model | None = None, **settings: Any) -> TorchBackend:
        """A backend that trains `model`, or the model on a device with other `settings`."""
        made = TorchBackend(self.options, model or self.on(**settings))
        if self.state:
            made.load(self.state)
        return made


def opened(
    options: ModelOptions, state: Path | None = None, device: str = "cpu", **settings: Any
) -> Loaded:
    """The model on a device, with settings of the device's record changed."""
    record = replace(this_device(device, options.dtype), **settings)
    return Loaded(options, load_model(options, record), state)


def backend(case: cases.Case, dtype: str = DTYPE, **options: bool) -> TorchBackend:
    """The case's state; or its folder's model as it is, where there are options."""
    made = load(ModelOptions(case.folder, dtype, **options))
    if not options:
        made.load(case.state)
    return made


def loaded(case: cases.Case, dtype: str = DTYPE) -> Loaded:
    """The case's state, loaded once."""
    return opened(ModelOptions(case.folder, dtype), case.state)


@contextmanager
def exactly() -> Iterator[None]:
    """float64 throughout.

    transformers' norms compute in float32 in a float64 model too, which hides what else differs.
    """
    real = torch.Tensor.float, torch.Tensor.to
    narrowed, wide = (torch.float32,), torch.float64

    def kept(x: torch.Tensor, *to: Any, **more: Any) -> torch.Tensor:
        return x if (x.dtype, to) == (wide, narrowed) else real[1](x, *to, **more)

    with (
        patch.object(torch.Tensor, "float", lambda x: x if x.dtype == wide else real[0](x)),
        patch.object(torch.Tensor, "to", kept),
    ):
        yield


def logits_of(model: torch.nn.Module, prompt: Prompt, tokens: NDArray[Any]) -> NDArray[Any]:
    """`stock_logits` without a graph."""
    with torch.no_grad():
        return stock_logits(model, prompt, tokens).numpy()


def exported(folder: Path) -> torch.nn.Module:
    """An export as transformers loads it in float64: every tensor is there, and no other."""
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    problems = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(found[problem] for problem in problems)
    return model


def processes(folder: Path) -> list[dict[str, str]]:
    """What the environments of two processes of one run say."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [both | {"RANK": str(rank)} for rank in range(2)]


def plain_delta_rule(query, key, value, g, beta, initial_state=None, **options):
    """The recurrence of the gated delta net as it is defined, token by token, in the precision of
    its inputs."""
    repeats = value.shape[2] // key.shape[2]
    query, key = (
        x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key)
    )
    query, key = (x.repeat_interleave(repeats, 2) for x in (query, key))
    batch, length, heads, width = value.shape
    state = (
        torch.zeros(batch, heads, key.shape[-1], width, dtype=torch.float64)
        if initial_state is None
        else initial_state
    )
    out = []
    for t in range(length):
        state = state * g[:, t, :, None, None].double().exp()
        missing = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * missing)
        out.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) / key.shape[-1] ** 0.5)
    return torch.stack(out, 1), state


def delta_rule_in_float64():
    """A context in which transformers computes a delta net in float64; without it, in float32
    whatever the model's precision."""
    return patch.object(
        transformers.models.qwen3_5.modeling_qwen3_5,
        "torch_chunk_gated_delta_rule",
        plain_delta_rule,
    )


def stock_logits(model, prompt, tokens):
    """Logits [T, V] of stock transformers at the rows that predict `tokens`, from one plain row
    [prompt + tokens]."""
    return stock_output(model, prompt, tokens).logits[0, len(prompt.tokens) - 1 : -1]


def stock_attention(model, prompt, tokens):
    """The eager attention of stock transformers [L, T, S], averaged over heads, from the rows that
    predict `tokens` to the visual tokens."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = stock_output(model, prompt, tokens, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    rows, visual = slice(len(prompt.tokens) - 1, -1), prompt.visual.index.tolist()
    weights = [layer[0, :, rows].mean(0)[:, visual] for layer in layers if layer is not None]
    return torch.stack(weights).numpy()


def stock_output(model, prompt, tokens, **options):
    """What stock transformers says to one plain row [prompt + tokens]."""
    ids = np.concatenate([prompt.tokens, tokens]).astype(np.int64)
    kinds = np.zeros_like(ids)
    kinds[prompt.visual.index] = 1
    kind = model.config.model_type
    named = {"gemma3": "token_type_ids"}.get(
        kind, "mm_token_type_ids" if kind.startswith("qwen") else None
    )
    arrays = {name: torch.from_numpy(value) for name, value in prompt.images.items()}
    arrays = {
        name: value.double() if value.is_floating_point() else value.long()
        for name, value in arrays.items()
    }
    return model(
        **options,
        input_ids=torch.from_numpy(ids)[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        use_cache=False,
        **({named: torch.from_numpy(kinds)[None]} if named else {}),
        **(
            {name: value[None] for name, value in arrays.items()}
            if kind in ("idefics3", "smolvlm")
            else arrays
        ),
    )


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
    return (1 - objective.alpha) * (s.exp() * (s - m)).sum(-1) + objective.alpha * (
        t.exp() * (t - m)
    ).sum(-1)


def plain_loss_and_gradients(case, groups, objective):
    """The step's loss and the gradient of all that is trained, by name, in float64, from separate
    rows."""
    student, teacher = case.stock(), case.stock("teacher")
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for completion, weights in zip(group.completions, group.weights, strict=True):
            logits = stock_logits(student, group.student, completion.tokens)
            with torch.no_grad():
                wanted = stock_logits(teacher, group.teacher, completion.tokens)
            chosen = (logits.detach() / objective.temperature).log_softmax(-1)[
                range(len(completion)), completion.tokens
            ]
            ratio = (
                (chosen - torch.from_numpy(completion.logprobs).double())
                .exp()
                .clamp(max=objective.ratio_clip)
            )
            loss = (
                loss
                + (
                    torch.from_numpy(weights).double()
                    * ratio
                    * plain_divergence(logits, wanted, objective)
                ).sum()
            )
    loss.backward()
    gradients = {
        name: parameter.grad.numpy()
        for name, parameter in student.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), gradients


def rows_of(model: Model, backward: bool = False) -> list[int]:
    """Fills up with the rows that the model's first layer sees, call by call.

    With `backward`, also with those of its backward, as negative numbers.
    """
    seen: list[int] = []
    norm = model.layers[0].module.input_layernorm
    norm.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    if backward:
        norm.register_full_backward_hook(lambda _, __, outputs: seen.append(-len(outputs[0])))
    return seen


class StepByStep:
    """In place of a CUDA graph: the recorded step runs again, on the same memory."""

    def __init__(self, step: Any) -> None:
        self.step = step

    def replay(self) -> None:
        live, step = self.step.args
        before = places(live.cache)
        again = DecodeStep(step.number, step.count, step.exact, step.buffer)  # with its own masks
        self.step.func(live, again)
        assert places(live.cache) == before, "a graph would look where the memory no longer stands"


def places(caches: Iterable[Any]) -> list[int]:
    """Where the memory of completions stands."""
    return [
        x.data_ptr()
        for cache in caches
        for x in (cache.state if hasattr(cache, "state") else (cache.keys, cache.values))
    ]


def optimizer(loaded: Loaded, **settings: Any) -> Optimizer:
    """An optimizer of the model's parameters, apart from any backend."""
    return Optimizer(loaded.on(**settings).parameters)


def move(teacher: Mapping[str, torch.Tensor], student: Optimizer, rate: float) -> None:
    """Moves `teacher`, by name, towards the optimizer's parameters."""
    move_teacher(teacher, student.parameters, rate)


def arrays(numbers: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """The backend's float32 arrays of `numbers`."""
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in numbers.items()}


def numbers(arrays: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Copies of the backend's arrays in numpy; they must be float32 or float64."""
    return {name: value.detach().numpy().copy() for name, value in arrays.items()}
