"""A small group on a model folder, and its log-probabilities from stock transformers, one plain row
a completion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opd import registry
from opd.models import names
from opd.objective import Objective, log_softmax
from opd.prompts.processor import open_encoder
from opd.types import Completion, Group, ModelOptions
from tests.support import random_models

JSD = Objective(alpha=0.5, top_k=20)


def group_of(folder: Path) -> Group:
    """One prompt with an image, and two completions."""
    rng = np.random.default_rng(0)
    prompt = open_encoder(folder).encode(
        [Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))],
        "What is on the red tile?",
    )
    completions = tuple(
        Completion(
            rng.integers(10, 250, length).astype(np.int32), np.zeros(length, np.float32), False
        )
        for length in (6, 3)
    )
    return Group(
        prompt,
        prompt,
        completions,
        tuple(np.ones(len(one.tokens), np.float32) for one in completions),
    )


def ours(name: str, folder: Path, group: Group, **options: Any) -> np.ndarray:
    """Log-probabilities of all completion tokens, as the backend `name` computes them."""
    backend = registry.load(name, ModelOptions(folder, **options))
    return np.concatenate([one.student_logprobs for one in backend.score([group], JSD)[0]])


def stock(model: Any, group: Group) -> np.ndarray:
    """The same from a transformers model, whatever its precision."""
    import torch

    prompt, found = group.student, []
    for completion in group.completions:
        ids = np.concatenate([prompt.tokens, completion.tokens]).astype(np.int64)
        kinds = np.zeros_like(ids)
        kinds[prompt.visual.index] = 1
        given = {name: torch.from_numpy(value) for name, value in prompt.images.items()}
        given["pixel_values"] = given["pixel_values"].to(model.dtype)
        kind = model.config.model_type
        if kind in ("idefics3", "smolvlm"):
            given = {name: value[None] for name, value in given.items()}
        elif kind not in ("llava", "llava_next"):
            given["token_type_ids" if kind == "gemma3" else "mm_token_type_ids"] = torch.from_numpy(
                kinds
            )[None]
        row = torch.from_numpy(ids)[None]
        with torch.no_grad():
            logits = model(
                input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **given
            ).logits
        rows = log_softmax(logits[0, len(prompt.tokens) - 1 : -1].double().numpy())
        found.append(rows[np.arange(len(completion.tokens)), completion.tokens])
    return np.concatenate(found)


def stock_model(folder: Path) -> Any:
    """The folder's model as transformers loads it, in float64."""
    import torch
    import transformers

    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    ).eval()


def copied(folder: Path, out: Path, **config: Any) -> Path:
    """A copy of a model folder, with settings of config.json by dotted key."""
    shutil.copytree(folder, out)
    content = json.loads((out / "config.json").read_text())
    for key, value in config.items():
        put(content, key, value)
    (out / "config.json").write_text(json.dumps(content))
    return out


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key."""
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
    content[last] = value


def remade(folder: Path, out: Path, settings: Mapping[str, Any]) -> tuple[Path, Any]:
    """A copy with settings of config.json by dotted key, and stock transformers' model of it in
    float64.

    Weights are those of `folder`, and random ones where these have another shape or are not there.
    """
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    copied(folder, out, **settings)
    config = transformers.AutoConfig.from_pretrained(out)
    automatic = transformers.AutoModelForImageTextToText
    model = automatic.from_config(config, attn_implementation="sdpa").double().eval()
    kind, rng = config.model_type, np.random.default_rng(1)
    before = {
        names.current_name(kind, name): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    weights = {}
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = before.get(name)
            if value is None or value.shape != tuple(parameter.shape):
                value = random_models.random_values(rng, name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(value))
            weights[name] = value
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out, model
