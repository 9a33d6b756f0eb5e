"""Names of tensors in published files: what transformers calls each of them today, and which of
them no forward reads.

Checkpoints and adapters keep the names of the transformers that wrote them. One table serves both
backends.
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
"""Before transformers 4.52."""

LLAVA = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "language_model.": "model.language_model.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
    # 4.52 to 4.57, in files that were written past its own way back to the older names.
    "model.vision_tower.vision_model.": "model.vision_tower.",
}
"""Before transformers 5."""

OLDER: Mapping[str, Mapping[str, str]] = {
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
    "gemma3": LLAVA,
    "llava": LLAVA,
    "llava_next": LLAVA,
}
"""By model_type: beginnings of older names, and what stands for each today; the first that fits."""

OTHER_HEADS: Mapping[str, str] = {
    "qwen3_5": r"^mtp\.",
    "gemma3": r"^(model\.)?vision_tower\.(vision_model\.)?head\.",
}
"""By model_type: heads that are no fault of a file: that predict tokens after the next, and that
pool a whole image."""

UNREAD = re.compile(
    # computed from the configuration
    r"(^|\.)(position_ids|\w*inv_freq|cos_cached|sin_cached|embed_scale|rotary_(pos_)?emb\.\w+)$"
    r"|^(v_head|value_head|score|classifier)\."  # of reward and value models
)
"""Tensors that no forward of a language model reads."""


def current_name(model_type: str, name: str) -> str:
    """What transformers calls a tensor of a file today; a name of today stays."""
    for start, new in OLDER.get(model_type, {}).items():
        if name.startswith(start):
            return new + name[len(start) :]
    return name


def embedding(model_type: str) -> str:
    """The name of the table in which tokens are looked up."""
    trunk = "text_model" if model_type in ("idefics3", "smolvlm") else "language_model"
    return f"model.{trunk}.embed_tokens.weight"


def is_left_out(model_type: str, name: str) -> bool:
    """Whether no forward reads a tensor of this name, today's or an older one."""
    other = OTHER_HEADS.get(model_type)
    return bool(UNREAD.search(name) or (other and re.search(other, name)))


def used(model_type: str, stored: Collection[str], folder: Path) -> dict[str, str]:
    """The stored name of every tensor that a forward may read, by the name of today. Raises
    ModelError where two have one name."""
    found: dict[str, str] = {}
    for name in stored:
        if is_left_out(model_type, name):
            continue
        new = current_name(model_type, name)
        if new in found:
            raise ModelError(
                f"{folder}: the weights hold {found[new]} and {name}, which are two names of one"
                " tensor"
            )
        found[new] = name
    return found


def with_tie(model_type: str, used: Mapping[str, str]) -> dict[str, str]:
    """`used` under tied weights, where a head that stands alone in the files is the embedding."""
    table = embedding(model_type)
    if HEAD in used and table not in used:
        return {table if name == HEAD else name: stored for name, stored in used.items()}
    return dict(used)


def tell_left_out(stored: Collection[str], folder: Path) -> None:
    """Logs one line about tensors that are left out, unless transformers leaves them out by
    itself."""
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
    """Raises ModelError where the shapes of `stored` tensors are not those that the configuration
    gives; both by name of today."""
    missing, unknown = (
        sorted(expected.keys() - stored.keys()),
        sorted(stored.keys() - expected.keys()),
    )
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
