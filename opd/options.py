"""The base class of every recipe section. Every key has a default, a range and a sentence of
help."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """One section of a recipe, immutable. The fields are the keys; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
