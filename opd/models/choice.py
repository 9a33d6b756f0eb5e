"""The model section of a recipe: which model, and which parameters of it are trained."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from opd.errors import ModelError, RecipeError
from opd.memory import ACTIVATION_BYTES
from opd.models import hub, peft_files
from opd.models.find import checkpoint_of
from opd.options import Options
from opd.paths import PathText, expanded, read_file
from opd.types import AdapterOptions, ModelOptions

QUANTISED = re.compile(r"(-unsloth)?-(bnb-[48]bit|awq|gptq(-int[48])?|fp8)$", re.IGNORECASE)
"""Matches the end of a Hugging Face id whose checkpoint holds quantised weights."""


class ModelChoice(Options):
    """Which model, and which parameters of it are trained."""

    path: PathText = Field(
        "tiny",
        min_length=1,
        description=(
            "'tiny' (embedded), a folder in Hugging Face layout, a run folder, or a Hugging"
            " Face id."
        ),
    )
    revision: str = Field(
        "", description="Branch, tag or commit of a Hugging Face id; empty: its default branch."
    )
    base: PathText = Field(
        "",
        description=(
            "Where `path` is an adapter: its base, as for `path`; empty: the one that the adapter"
            " names."
        ),
    )
    tune: Literal["full", "lora", "qlora"] = Field(
        "full",
        description=(
            "What is trained: all parameters, or low-rank adapters (qlora: over weights in 4 bits)."
        ),
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Computation's type; what trains is kept in float32 anyway."
    )
    vision: bool = Field(
        # Setting `tune` alone in a recipe of full training adapts the language model, as is usual.
        default_factory=lambda given: given.get("tune", "full") == "full",
        description=(
            "Train the vision tower too, or adapters on its linear layers; where it is not set,"
            " only with tune = full."
        ),
    )
    projector: bool = Field(
        False,
        description=(
            "Adapters between vision tower and language model too; full trains it with the tower."
        ),
    )
    rank: int = Field(32, ge=1, description="Rank of an adapter.")
    alpha: float = Field(
        64.0, gt=0, description="An adapter's product is multiplied by alpha / rank."
    )
    targets: tuple[str, ...] = Field(
        (),
        description=(
            "Linear layers of the language model that get an adapter, by their names' last words;"
            " empty: every one."
        ),
    )
    max_pixels: int = Field(
        0,
        ge=0,
        description="Pixels above which an image is made smaller; 0: the model's own bound.",
    )
    min_pixels: int = Field(
        0, ge=0, description="Pixels below which an image is made larger; 0: the model's own bound."
    )
    teacher_max_pixels: int = Field(
        0, ge=0, description="The same for what the teacher sees; 0: as the student's."
    )
    teacher_min_pixels: int = Field(
        0, ge=0, description="The same for what the teacher sees; 0: as the student's."
    )

    recompute_above: float = Field(
        ACTIVATION_BYTES / 2**30,
        ge=0,
        le=2**20,
        description=(
            "GiB of activations above which a backward recomputes layers: all of them, on a GPU"
            " those that do not fit. Lower takes less memory and more time. Changes no result."
        ),
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        teacher = (
            self.teacher_max_pixels or self.max_pixels,
            self.teacher_min_pixels or self.min_pixels,
        )
        for policy, (largest, smallest) in (
            ("student", (self.max_pixels, self.min_pixels)),
            ("teacher", teacher),
        ):
            if largest and smallest > largest:
                raise ValueError(
                    f"the {policy}'s min_pixels, {smallest}, is above its max_pixels, {largest}"
                )
        return self

    def pixels(self) -> dict[str, int | None]:
        """The bounds on image size as keyword arguments of `PromptEncoder`, in pixels; None: the
        model's own bound."""
        names = ("max_pixels", "min_pixels", "teacher_max_pixels", "teacher_min_pixels")
        return {name: getattr(self, name) or None for name in names}

    def folder(self, weights: bool = True) -> Path:
        """The folder of the model, or of the base model if `path` names an adapter.

        A Hugging Face id is downloaded; without `weights` only the small files are. Raises
        ModelError if the model is missing or cannot be used, RecipeError if `base` or `revision`
        does not go with `path`.
        """
        return self._resolved(weights)[0]

    @property
    def result(self) -> Literal["model", "adapter"]:
        """The kind of result, which is also the name of its folder in the run folder: "adapter" if
        only adapters are trained."""
        return "model" if self.tune == "full" else "adapter"

    def options(self, seed: int = 0, weights: bool = True) -> ModelOptions:
        """The options with which a backend loads the model; `seed` draws new adapters, `weights` as
        in `folder`. Raises ModelError and RecipeError as `folder` does."""
        folder, adapter = self._resolved(weights)
        held = int(self.recompute_above * 2**30)
        if self.tune == "full":
            return ModelOptions(
                folder, self.dtype, self.vision, adapter=adapter, checkpoint_above=held
            )
        chosen = AdapterOptions(
            self.rank, self.alpha, self.targets, self.vision, self.projector, seed
        )
        return ModelOptions(
            folder,
            self.dtype,
            False,
            # Training that continues an adapter keeps the adapter's rank, scale and layers.
            chosen if adapter is None else peft_files.options_of(adapter),
            adapter,
            self.tune == "qlora",
            held,
        )

    def _resolved(
        self, weights: bool = True, is_base: bool = False, visited: tuple[Path, ...] = ()
    ) -> tuple[Path, Path | None]:
        """The folder of the model, and the folder of the adapter if `path` names one.

        `is_base`: `path` is the base of an adapter, so an adapter raises ModelError. `visited`:
        checkpoints whose base led here; a checkpoint among them raises ModelError.
        """
        if self.path == "tiny" and not self.base:
            from opd.tiny import MODEL

            return MODEL, None
        path = Path(self.path)
        if not os.path.isdir(path):
            if self.base:
                raise RecipeError(
                    f"model.base = '{self.base}': '{self.path}' is no folder of an adapter, so it"
                    " has no base"
                )
            if hub.is_id(self.path):
                folder = hub.fetch(self.path, self.revision, weights)
                hub.refuse_remote_code(folder, self.path)
                return folder, None
            raise ModelError(
                f"model '{self.path}': no such folder; give a folder in Hugging Face layout, a run"
                " folder, a Hugging Face id, or 'tiny'"
            )
        if self.revision:
            raise RecipeError(
                f"model.revision = '{self.revision}': '{self.path}' is a folder, which has no"
                " revisions"
            )
        checkpoint = checkpoint_of(path)
        if checkpoint:
            return self._of_checkpoint(checkpoint[0], path, weights, is_base, visited)
        if (path / "config.toml").is_file() and not (path / "config.json").is_file():
            results = [path / name for name in ("model", "adapter") if (path / name).is_dir()]
            if not results:
                raise ModelError(
                    f"model '{self.path}': this run has no model/ yet; finish it with: opd train"
                    f" --resume {self.path}"
                )
            path = results[0]
        if peft_files.is_adapter(path):
            if is_base:
                raise ModelError(
                    f"'{self.path}' is an adapter itself; export it, and name the export with --set"
                    " model.base=..."
                )
            return self._base(path, weights, visited), path
        if self.base:
            raise RecipeError(
                f"model.base = '{self.base}': '{self.path}' is no adapter, so it has no base"
            )
        peft_files.check_alone(path)
        hub.refuse_remote_code(path, self.path)
        return path, None

    def _of_checkpoint(
        self, run: Path, path: Path, weights: bool, is_base: bool, visited: tuple[Path, ...]
    ) -> tuple[Path, Path | None]:
        """The student of the checkpoint in `path`: its exported model/ or adapter/.

        Before `opd.run.export.as_model` has exported it, `weights` raises ModelError; without
        `weights` the result is the first model of the run, whose small files are the same.
        """
        if path.resolve() in visited:
            raise ModelError(
                f"model '{self.path}' is a checkpoint that names itself as its base; name the run's"
                " first model"
            )
        visited = (*visited, path.resolve())
        for result in (path / "model", path / "adapter"):
            if result.is_dir():
                return ModelChoice(path=str(result))._resolved(weights, is_base, visited)
        if weights:
            raise ModelError(
                f"model '{self.path}' is a checkpoint; export it first: opd export {path} --out"
                " FOLDER"
            )
        section = _section(run)
        first = {name: str(section.get(name, "")) for name in ("path", "revision")}
        try:
            choice = ModelChoice(path=first["path"] or "tiny", revision=first["revision"])
            return choice._resolved(weights, is_base, visited)
        except ValidationError as error:
            raise ModelError(
                f"{run / 'config.toml'}: model.path is no path or name: {error.errors()[0]['msg']}"
            ) from error

    def _base(self, adapter: Path, weights: bool, visited: tuple[Path, ...]) -> Path:
        """The folder of an adapter's base model: `base`, or the one that the adapter names."""
        name = self.base or peft_files.base_model(adapter)
        if not os.path.isdir(name) and Path(name).parts[-3:] == ("opd", "tiny", "model"):
            name = "tiny"  # the embedded model of another installation
        told = f"model '{self.path}' is an adapter, and its base"
        if not self.base and not os.path.isdir(name) and QUANTISED.search(name):
            raise ModelError(
                f"{told}, '{name}', holds quantised weights; name the original: --set"
                f" model.base={QUANTISED.sub('', name)}"
            )
        try:
            choice = ModelChoice(
                path=name, revision="" if self.base else peft_files.revision(adapter)
            )
            return choice._resolved(weights, is_base=True, visited=visited)[0]
        except ValidationError as error:
            raise ModelError(f"{told} is no path or name: {error.errors()[0]['msg']}") from error
        except ModelError as error:
            hint = (
                ""
                if self.base or "model.base" in str(error)
                else "; name another with --set model.base=..."
            )
            raise ModelError(f"{told} is not here: {error}{hint}") from error


def is_tiny(path: str, visited: frozenset[Path] = frozenset()) -> bool:
    """Whether `path` names the embedded model, or a run, adapter or export that began with it.
    False if `path` does not exist.

    `visited`: folders that led here, so that a circle of names ends.
    """
    from opd.tiny import MODEL

    if path == "tiny":
        return True
    try:
        folder = Path(expanded(path))
    except ValueError:  # opening the model raises the error
        return False
    checkpoint = checkpoint_of(folder)
    folder = checkpoint[0] if checkpoint else folder
    place = folder.resolve()
    if place in visited:
        return False
    visited |= {place}
    if (folder / "config.toml").is_file() and not (folder / "config.json").is_file():
        return is_tiny(str(_section(folder).get("path", "tiny")), visited)
    if (folder / "adapter_config.json").is_file():
        name = str(
            _read(folder / "adapter_config.json", json.loads).get("base_model_name_or_path", "")
        )
        return Path(name).parts[-3:] == MODEL.parts[-3:] or is_tiny(name, visited)
    embedded, config = (_read(place / "config.json", json.loads) for place in (MODEL, folder))
    return all(config.get(key) == value for key, value in embedded.items())


def _section(run: Path) -> dict[str, Any]:
    """The model section of a run's recipe; empty if the recipe has none or cannot be read."""
    section = _read(run / "config.toml", tomllib.loads).get("model")
    return section if isinstance(section, dict) else {}


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The values of a file; empty if the file is missing or broken. The code that needs the file
    raises the error."""
    try:
        values = parse(read_file(file).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
