"""Maps names of parameters between transformers' modules, peft's layers in them, and the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opd.models import names
from opd.models.files import StoredTensor


def hugging_face(name: str) -> str:
    """The Hugging Face name of a parameter, without the parts that peft inserts."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by Hugging Face name; a tied head goes by the embedding's name."""
    return {
        hugging_face(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def head_name(model: Any) -> str:
    """The name of the head's parameter, which is the embedding's for a tied head."""
    return str(
        next(
            name
            for name, parameter in model.named_parameters()
            if parameter is model.lm_head.weight
        )
    )


def stored_names(model: Any, stored: Mapping[str, StoredTensor], path: Path) -> dict[str, str]:
    """Maps every parameter of `model` to its name in the files. Raises ModelError."""
    kind = model.config.model_type
    used = names.used(kind, stored, path)
    return names.with_tie(kind, used) if model.config.tie_word_embeddings else used


def check_stored(model: Any, stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Raises ModelError unless the stored tensors are those of `model`, because transformers would
    initialise missing ones at random.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    actual = {name: stored[old].shape for name, old in stored_names(model, stored, path).items()}
    # Some programs store a tied head in addition to the embedding.
    if model.config.tie_word_embeddings:
        actual.pop(names.HEAD, None)
    names.check(expected, actual, path)
