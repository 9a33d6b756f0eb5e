"""A small group on a model folder, and its log-probabilities from stock transformers, one plain row a completion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opd import backend as backends
from opd.objective import Objective, log_softmax
from opd.processor import open_encoder
from opd.types import Completion, Group, ModelOptions

JSD = Objective(alpha=0.5, top_k=20)


def group_of(folder: Path) -> Group:
    """One prompt with an image, and two completions."""
    rng = np.random.default_rng(0)
    prompt = open_encoder(folder).encode([Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))], "What is on the red tile?")
    completions = tuple(
        Completion(rng.integers(10, 250, length).astype(np.int32), np.zeros(length, np.float32), False) for length in (6, 3)
    )
    return Group(prompt, prompt, completions, tuple(np.ones(len(one.tokens), np.float32) for one in completions))


def ours(name: str, folder: Path, group: Group, **options: Any) -> np.ndarray:
    """Log-probabilities of all completion tokens, as the backend `name` computes them."""
    backend = backends.load(name, ModelOptions(folder, **options))
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
            given["token_type_ids" if kind == "gemma3" else "mm_token_type_ids"] = torch.from_numpy(kinds)[None]
        row = torch.from_numpy(ids)[None]
        with torch.no_grad():
            logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **given).logits
        rows = log_softmax(logits[0, len(prompt.tokens) - 1 : -1].double().numpy())
        found.append(rows[np.arange(len(completion.tokens)), completion.tokens])
    return np.concatenate(found)


def stock_model(folder: Path) -> Any:
    """The folder's model as transformers loads it, in float64."""
    import torch
    import transformers

    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()


def copied(folder: Path, out: Path, **config: Any) -> Path:
    """A copy of a model folder, with settings of config.json by dotted key; None takes a key out."""
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
