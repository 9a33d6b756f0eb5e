"""The base of every recipe section: frozen, closed, and each key with a default, a range and a
sentence of help."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """One section of a recipe; the keys are its fields, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
