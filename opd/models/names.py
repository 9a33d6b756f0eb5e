"""Names of tensors in published files: the current name of each in transformers, and the tensors
that no forward reads.

Checkpoints and adapters keep the names of the transformers version that wrote them. Both backends
use these tables.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from opd.errors import ModelError

HEAD = "lm_head.weight"

QWEN = {"visual.": "model.visual."} | {
    f"model.{part}": f"model.language_model.{part}"
    for part in ("embed_tokens.", "layers.", "norm.")
}
"""Prefixes of names written before transformers 4.52, and the current prefixes."""

LLAVA = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "language_model.": "model.language_model.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
    # 4.52 to 4.57, in files that were not saved by save_pretrained, which wrote the older names.
    "model.vision_tower.vision_model.": "model.vision_tower.",
}
"""Prefixes of names written before transformers 5, and the current prefixes."""

OLDER: Mapping[str, Mapping[str, str]] = {
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
    "gemma3": LLAVA,
    "llava": LLAVA,
    "llava_next": LLAVA,
}
"""By model_type: older prefixes of names and the current prefixes; the first that matches
applies."""

OTHER_HEADS: Mapping[str, str] = {
    "qwen3_5": r"^mtp\.",
    "gemma3": r"^(model\.)?vision_tower\.(vision_model\.)?head\.",
}
"""By model_type: matches tensors of heads that files may hold and no forward here reads:
multi-token prediction, and pooling of a whole image."""

UNREAD = re.compile(
    # buffers that are computed from the configuration
    r"(^|\.)(position_ids|\w*inv_freq|cos_cached|sin_cached|embed_scale|rotary_(pos_)?emb\.\w+)$"
    r"|^(v_head|value_head|score|classifier)\."  # heads of reward and value models
)
"""Matches tensors that no forward of a language model reads."""


def current_name(model_type: str, name: str) -> str:
    """The name of a stored tensor in today's transformers."""
    for start, new in OLDER.get(model_type, {}).items():
        if name.startswith(start):
            return new + name[len(start) :]
    return name


def embedding(model_type: str) -> str:
    """The current name of the embedding's weight."""
    trunk = "text_model" if model_type in ("idefics3", "smolvlm") else "language_model"
    return f"model.{trunk}.embed_tokens.weight"


def is_left_out(model_type: str, name: str) -> bool:
    """Whether no forward reads the tensor `name`, which may be a current or an older name."""
    other = OTHER_HEADS.get(model_type)
    return bool(UNREAD.search(name) or (other and re.search(other, name)))


def used(model_type: str, stored: Collection[str], folder: Path) -> dict[str, str]:
    """The stored name of every tensor that a forward may read, by current name. Raises ModelError
    if two stored tensors have the same current name."""
    stored_names: dict[str, str] = {}
    for name in stored:
        if is_left_out(model_type, name):
            continue
        new = current_name(model_type, name)
        if new in stored_names:
            raise ModelError(
                f"{folder}: the weights hold {stored_names[new]} and {name}, which are two names"
                " of one tensor"
            )
        stored_names[new] = name
    return stored_names


def with_tie(model_type: str, used: Mapping[str, str]) -> dict[str, str]:
    """The mapping `used` for a model with tied weights: if the files hold a head and no embedding,
    the head's tensor is the embedding."""
    table = embedding(model_type)
    if HEAD in used and table not in used:
        return {table if name == HEAD else name: stored for name, stored in used.items()}
    return dict(used)


def tell_left_out(stored: Collection[str], folder: Path) -> None:
    """Logs one warning about stored tensors that match UNREAD."""
    unread = sorted(name for name in stored if UNREAD.search(name))
    if unread:
        logging.getLogger(__name__).warning(
            "%s: %d tensors are left out, since no forward reads them; the first is %s",
            folder,
            len(unread),
            unread[0],
        )


def check(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Raises ModelError if names or shapes of the `stored` tensors are not the `expected` ones,
    which the configuration gives; both by current name."""
    missing = sorted(expected.keys() - stored.keys())
    unknown = sorted(stored.keys() - expected.keys())
    if missing or unknown:
        first = f"tensor {missing[0]} is missing" if missing else f"tensor {unknown[0]} is unknown"
        raise ModelError(
            f"{folder}: weights and config.json do not fit: {first} ({len(missing)} missing,"
            f" {len(unknown)} unknown)"
        )
    for name, shape in expected.items():
        if stored[name] != shape:
            raise ModelError(
                f"{folder}: weights and config.json do not fit: {name} is {stored[name]}, not"
                f" {shape}"
            )
