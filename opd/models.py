"""Which model, and what of it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from opd import adapters
from opd.adapters import AdapterOptions
from opd.errors import ModelError
from opd.options import Options
from opd.types import ModelOptions


class ModelChoice(Options):
    """The model section of a recipe."""

    path: str = Field("tiny", description="'tiny' (embedded), a folder in Hugging Face layout, or a run folder.")
    tune: Literal["full", "lora", "qlora"] = Field(
        "full", description="What is trained: all parameters, or low-rank adapters (qlora: over weights in 4 bits)."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Computation's type; what trains is kept in float32 anyway.")
    vision: bool = Field(True, description="Train the vision tower too, or adapters on its linear layers.")
    projector: bool = Field(False, description="Adapters between vision tower and language model too; full trains it with the tower.")
    rank: int = Field(32, ge=1, description="Rank of an adapter.")
    alpha: float = Field(64.0, gt=0, description="An adapter's product is multiplied by alpha / rank.")
    targets: tuple[str, ...] = Field(
        adapters.TARGETS,
        min_length=1,
        description="Linear layers of the language model that get an adapter, by their names' last words.",
    )
    max_pixels: int = Field(0, ge=0, description="Largest image the student's and teacher's encoder keeps, in pixels; 0: the model's own.")

    def folder(self) -> Path:
        """The model's folder; of an adapter, that of its base. Raises ModelError where there is none."""
        return self._found()[0]

    @property
    def result(self) -> Literal["model", "adapter"]:
        """What a run leaves behind, in a folder of this name: the model, or the adapter where only that was trained."""
        return "model" if self.tune == "full" else "adapter"

    def options(self, seed: int = 0) -> ModelOptions:
        """What a backend is given; `seed` draws fresh adapters. Raises ModelError."""
        folder, adapter = self._found()
        if self.tune == "full":
            return ModelOptions(folder, self.dtype, self.vision, adapter=adapter)
        chosen = AdapterOptions(self.rank, self.alpha, self.targets, self.vision, self.projector, seed)
        return ModelOptions(
            folder,
            self.dtype,
            False,
            # An adapter that is trained on keeps its own rank, scale and layers.
            chosen if adapter is None else adapters.options_of(adapter),
            adapter,
            self.tune == "qlora",
        )

    def _found(self) -> tuple[Path, Path | None]:
        """The model's folder, and that of an adapter on it where `path` names one."""
        if self.path == "tiny":
            from opd.tiny import MODEL

            return MODEL, None
        path = Path(self.path).expanduser()
        if not path.is_dir():
            raise ModelError(f"model '{self.path}': no such folder; give a folder in Hugging Face layout, a run folder, or 'tiny'")
        if (path / "config.toml").is_file() and not (path / "config.json").is_file():
            results = [path / name for name in ("model", "adapter") if (path / name).is_dir()]
            if not results:
                raise ModelError(f"model '{self.path}': this run has no model/ yet; finish it with: opd train --resume {self.path}")
            path = results[0]
        return (self._base(path), path) if adapters.is_adapter(path) else (path, None)

    def _base(self, adapter: Path) -> Path:
        """The folder of the model that an adapter was trained on."""
        name = adapters.base(adapter)
        if not Path(name).is_dir() and Path(name).parts[-3:] == ("opd", "tiny", "model"):
            name = "tiny"  # of another installation
        try:
            return ModelChoice(path=name)._found()[0]
        except ModelError as error:
            raise ModelError(f"model '{self.path}' is an adapter, and its base is not here: {error}") from error
