"""Which model, and what of it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from opd import hub
from opd.errors import ModelError, RecipeError
from opd.options import Options
from opd.types import ModelOptions


class ModelChoice(Options):
    """The model section of a recipe."""

    path: str = Field("tiny", description="'tiny' (embedded), a folder in Hugging Face layout, a run folder, or a Hugging Face id.")
    revision: str = Field("", description="Branch, tag or commit of a Hugging Face id; empty: its default branch.")
    tune: Literal["full", "lora"] = Field("full", description="What is trained: all parameters, or low-rank adapters.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Computation's type; what trains is kept in float32 anyway.")
    vision: bool = Field(True, description="Train the vision tower too.")
    max_pixels: int = Field(0, ge=0, description="Pixels above which an image is made smaller; 0: the model's own bound.")
    min_pixels: int = Field(0, ge=0, description="Pixels below which an image is made larger; 0: the model's own bound.")
    teacher_max_pixels: int = Field(0, ge=0, description="The same for what the teacher sees; 0: as the student's.")
    teacher_min_pixels: int = Field(0, ge=0, description="The same for what the teacher sees; 0: as the student's.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        teacher = self.teacher_max_pixels or self.max_pixels, self.teacher_min_pixels or self.min_pixels
        for policy, (largest, smallest) in (("student", (self.max_pixels, self.min_pixels)), ("teacher", teacher)):
            if largest and smallest > largest:
                raise ValueError(f"the {policy}'s min_pixels, {smallest}, is above its max_pixels, {largest}")
        return self

    def pixels(self) -> dict[str, int | None]:
        """The bounds on images as `PromptEncoder` takes them."""
        names = ("max_pixels", "min_pixels", "teacher_max_pixels", "teacher_min_pixels")
        return {name: getattr(self, name) or None for name in names}

    def folder(self, weights: bool = True) -> Path:
        """The model's folder, fetched where it is a Hugging Face id; without `weights` its small files do. Raises ModelError."""
        if self.path == "tiny":
            from opd.tiny import MODEL

            return MODEL
        path = Path(self.path).expanduser()
        if not path.is_dir():
            if hub.is_id(self.path):
                folder = hub.fetch(self.path, self.revision, weights)
                hub.refuse_remote_code(folder, self.path)
                return folder
            raise ModelError(
                f"model '{self.path}': no such folder; give a folder in Hugging Face layout, a run folder, a Hugging Face id, or 'tiny'"
            )
        if self.revision:
            raise RecipeError(f"model.revision = '{self.revision}': '{self.path}' is a folder, which has no revisions")
        if (path / "config.toml").is_file() and not (path / "config.json").is_file():
            if not (path / "model").is_dir():
                raise ModelError(f"model '{self.path}': this run has no model/ yet; finish it with: opd train --resume {self.path}")
            return path / "model"
        hub.refuse_remote_code(path, self.path)
        return path

    def options(self) -> ModelOptions:
        """What a backend is given. Raises ModelError or RecipeError."""
        if self.tune == "lora":
            raise RecipeError("model.tune = 'lora': adapters are not in this version yet; use --set model.tune=full")
        return ModelOptions(self.folder(), self.dtype, self.vision)
