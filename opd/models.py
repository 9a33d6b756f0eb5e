"""Which model, and what of it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from opd.errors import ModelError, RecipeError
from opd.options import Options
from opd.types import ModelOptions


class ModelChoice(Options):
    """The model section of a recipe."""

    path: str = Field("tiny", description="'tiny' (embedded), a folder in Hugging Face layout, or a run folder.")
    tune: Literal["full", "lora"] = Field("full", description="What is trained: all parameters, or low-rank adapters.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Computation's type; what trains is kept in float32 anyway.")
    vision: bool = Field(True, description="Train the vision tower too.")
    max_pixels: int = Field(0, ge=0, description="Largest image the student's and teacher's encoder keeps, in pixels; 0: the model's own.")

    def folder(self) -> Path:
        """The model's folder. Raises ModelError where there is none."""
        if self.path == "tiny":
            from opd.tiny import MODEL

            return MODEL
        path = Path(self.path).expanduser()
        if not path.is_dir():
            raise ModelError(f"model '{self.path}': no such folder; give a folder in Hugging Face layout, a run folder, or 'tiny'")
        if (path / "config.toml").is_file() and not (path / "config.json").is_file():
            if not (path / "model").is_dir():
                raise ModelError(f"model '{self.path}': this run has no model/ yet; finish it with: opd train --resume {self.path}")
            return path / "model"
        return path

    def options(self) -> ModelOptions:
        """What a backend is given. Raises ModelError or RecipeError."""
        if self.tune == "lora":
            raise RecipeError("model.tune = 'lora': adapters are not in this version yet; use --set model.tune=full")
        return ModelOptions(self.folder(), self.dtype, self.vision)
