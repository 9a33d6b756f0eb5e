"""Groups and adapters for a random model, whatever the backend; and the same adapters as peft
computes them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from opd import registry
from opd.models import peft_files
from opd.prompts.processor import open_encoder
from opd.types import AdapterOptions, Completion, Group, ModelOptions

SIZES = [[(64, 64)], [(96, 64), (64, 64)], [(48, 80)]]
"""Widths and heights of the images of each group's student; the teacher's are the next group's."""

LENGTHS = [(5, 3, 7), (1,), (4, 6)]
"""Tokens of each group's completions."""

OPTIONS = AdapterOptions(rank=3, alpha=9.0)


def groups_of(folder: Path) -> list[Group]:
    """Groups of unequal prompts and completions, whose weights sum to one."""
    rng, encoder = np.random.default_rng(0), open_encoder(folder)
    prompts = [
        encoder.encode(
            [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes],
            question,
        )
        for sizes, question in zip(
            SIZES, ("What digit is on the red tile?", "digit?", "What?"), strict=True
        )
    ]
    weight, groups = np.float32(1 / sum(map(sum, LENGTHS))), []
    for index, lengths in enumerate(LENGTHS):
        completions = tuple(
            Completion(
                rng.integers(0, 250, size=length).astype(np.int32),
                rng.normal(-5, 1.5, size=length).astype(np.float32),
                False,
            )
            for length in lengths
        )
        weights = tuple(np.full(length, weight) for length in lengths)
        groups.append(Group(prompts[index], prompts[(index + 1) % 3], completions, weights))
    return groups


def write_adapter(
    folder: Path,
    model: Path,
    layers: dict[str, tuple[int, int]],
    seed: int = 1,
    options: AdapterOptions = OPTIONS,
) -> Path:
    """A random adapter in PEFT's format on some of a model's layers, large enough to change what
    the model says."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (out, width) in layers.items():
        tensors[f"{name}.lora_A.weight"] = (
            rng.standard_normal((options.rank, width)) / np.sqrt(width)
        ).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = (0.2 * rng.standard_normal((out, options.rank))).astype(
            np.float32
        )
    peft_files.write_config(folder, options, tensors, model)
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def language_layers(
    hidden: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 12,
    mlp: int = 64,
    layers: int = 3,
):
    """(out, in) of the language model's linear layers, as `tests.support.random_models.qwen3_vl`
    writes them."""
    sizes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return {
        f"model.language_model.layers.{i}.{name}": size
        for i in range(layers)
        for name, size in sizes.items()
    }


@dataclass
class Case:
    """A model, an adapter on it that says something, a state whose teacher is another adapter, and
    groups."""

    folder: Path
    adapter: Path
    other: Path
    groups: list[Group]

    def options(self, dtype: str = "float32", **more) -> ModelOptions:
        return ModelOptions(
            self.folder, dtype, False, **{"adapters": OPTIONS, "adapter": self.adapter, **more}
        )

    def backend(self, name: str, dtype: str = "float32", **more):
        """Student from `adapter`, teacher from `other`."""
        backend = registry.load(name, self.options(dtype, **more))
        if not more:
            backend.load(self.state(name))
        return backend

    def state(self, name: str) -> Path:
        """What the backend `name` would have saved, with another teacher."""
        state = self.folder.parent / "state"
        if not state.is_dir():
            registry.load(name, self.options()).save(state)
            teacher = {
                key.removeprefix("base_model.model."): value
                for key, value in peft_files.read(self.other).tensors.items()
            }
            save_file(teacher, state / "teacher.safetensors", metadata={"format": "pt"})
        return state


def make_case(root: Path, folder: Path, layers: dict[str, tuple[int, int]] | None = None) -> Case:
    layers = layers or language_layers()
    paths = [write_adapter(root / f"adapter{seed}", folder, layers, seed) for seed in (1, 2)]
    return Case(folder, *paths, groups_of(folder))


def peft_model(folder: Path, adapter: Path, dtype: str = "float64"):
    """The stock transformers model under peft's own layers."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    kind = getattr(torch, dtype)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=kind, attn_implementation="sdpa"
    )
    return under_peft(model, adapter).to(kind)


def under_peft(model, adapter: Path):
    """A transformers model under peft's own layers."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # peft asks transformers for it
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        return peft.PeftModel.from_pretrained(
            model, adapter, is_trainable=True, autocast_adapter_dtype=False
        )


def logprobs_of(backend, groups, objective) -> np.ndarray:
    """The student's log-probabilities of all tokens."""
    return np.concatenate(
        [one.student_logprobs for row in backend.score(groups, objective) for one in row]
    )


def loss_of(groups, statistics) -> float:
    """The step's loss from per-token statistics."""
    return sum(
        float((weights.astype(np.float64) * one.ratio * one.divergence).sum())
        for group, row in zip(groups, statistics, strict=True)
        for weights, one in zip(group.weights, row, strict=True)
    )
