"""Estimates a run's parameters, memory and time from config.json, before any weights are there.

`work` holds lengths and operations of a step, `memory` its bytes; `devices` knows how fast and how
large devices are, and `measure` takes a step to compare. This module puts them together for a
recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import new

from opd import registry
from opd.data import open_data
from opd.data.images import image_size
from opd.errors import BackendError, DataError, ModelError, UserError
from opd.memory import feature_bytes
from opd.models.consistency import check_sizes, complete
from opd.models.files import read_json
from opd.models.shape import Shape
from opd.plan.devices import HERE, Device
from opd.plan.memory import Memory, memory
from opd.plan.work import Stage, View, Work, stages
from opd.planner import Footprint
from opd.prompts.encoder import PromptEncoder
from opd.prompts.families import family
from opd.run import preflight
from opd.run.recipe import Recipe, merged, validate
from opd.types import ModelOptions, Policy
from opd.views.images import teacher_sizes
from opd.views.usable import too_long

IMAGE, TEXT_TOKENS = (1024, 768), 64
"""Pixels of an image, and tokens of the chat template and a question, without those that mark an
image, where neither an option nor the data says."""

TUNES = ("full", "lora", "qlora")
"""Values of model.tune, each of which takes less memory than the one before."""

MANY = 2**31
"""Rows of data that nobody has counted."""


@dataclass(frozen=True)
class Assumed:
    """What a plan takes for granted of images (pixels) and texts (tokens); None is worked out."""

    image: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    text_tokens: int | None = None
    completion_tokens: int | None = None


class Sizes(NamedTuple):
    """Pixels of an image and its crop; tokens of a prompt beside its image's, and of a completion;
    rows of the data."""

    image: tuple[int, int]
    crop: tuple[int, int]
    text: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """A recipe's step on one device, and all that it is worked out from. `notes`: how many rows of
    the data are above the limit of a prompt, in the words of training."""

    recipe: Recipe
    shape: Shape
    options: ModelOptions
    work: Work
    device: Device
    backend: str
    sizes: Sizes
    notes: tuple[str, ...] = ()

    @cached_property
    def rough(self) -> Footprint:
        """The backend's footprint."""
        planner, here = registry.planner(self.backend), self.device.name == HERE
        return planner.footprint(self.options, self.shape.config, here)

    @property
    def features(self) -> int:
        """Bytes of a frozen tower's features that are kept at most."""
        return feature_bytes(self.device.memory)

    @cached_property
    def memory(self) -> Memory:
        """Memory of the step."""
        return memory(self.shape, self.options, self.work, self.rough, self.features)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Work of the step by stage."""
        again = self.memory.checkpointed
        return stages(self.shape, self.options, self.work, self.rough, again, self.features)

    @property
    def seconds(self) -> dict[str, float]:
        """Each stage's time at the assumed shares of the device's peaks."""
        dtype = self.options.dtype
        return {name: self.device.seconds(stage, dtype) for name, stage in self.stages.items()}

    @property
    def hours(self) -> float:
        """The run's time, without measuring before and after it."""
        return self.recipe.run.steps * sum(self.seconds.values()) / 3600

    @property
    def usable(self) -> float:
        """Bytes of the device that a run may take."""
        return self.device.usable * self.device.memory

    @property
    def largest(self) -> int:
        """The largest rollout.microbatch_tokens that fits; 0 where not even one completion does."""
        work = self.work
        groups = [count * work.group for count in range(work.prompts, 0, -1)]
        parts = [work.longest + n * work.tokens for n in range(work.completions - 1, 0, -1)]
        return self._first("budget", (*groups, *parts), "accumulate", "apply")

    @property
    def largest_sample(self) -> int:
        """The largest rollout.sample_tokens that fits; 0 where not even one group does."""
        rooms = [count * self.work.sample for count in range(self.work.prompts, 0, -1)]
        return self._first("room", rooms, "rollout")

    def _first(self, name: str, sizes: Sequence[int], *phases: str) -> int:
        """The first size of the work's `name` with which the phases fit; 0 where none does."""
        for size in sizes:
            peaks = self.sized(**{name: size}).memory.phases
            if max(peaks[phase] for phase in phases) <= self.usable:
                return size
        return 0

    @property
    def least(self) -> int:
        """The peak of the step that takes least: one group sampled, and one completion, or one
        group differentiated at a time."""
        sizes = 1, self.work.group
        return min(self.sized(room=1, budget=size).memory.peak for size in sizes)

    def sized(self, **changed: Any) -> Plan:
        """The plan of a step with some fields of its `work` changed."""
        return replace(self, work=replace(self.work, **changed))

    @cached_property
    def changes(self) -> dict[str, Plan]:
        """Plans with one setting changed that may take less memory or time, by what to set."""
        work, tune = self.work, self.recipe.model.tune
        pixels = work.student.patches * self.shape.config["vision_config"]["patch_size"] ** 2
        settings: list[tuple[str, str, Any]] = [
            ("rollout", "completions", max(1, work.completions // 2)),
            ("rollout", "max_tokens", max(1, work.tokens // 2)),
            ("model", "max_pixels", pixels // 2),
            *(("model", "tune", less) for less in TUNES[TUNES.index(tune) + 1 :]),
            *[("model", "dtype", "bfloat16")] * (self.options.dtype == "float32"),
        ]
        given, plans = self.recipe.model_dump(exclude_unset=True), {}
        for section, key, value in settings:
            sizes = self.sizes._replace(tokens=value if key == "max_tokens" else work.tokens)
            with suppress(UserError):  # of a family that does not bound its pixels
                recipe = validate(merged(given, {section: {key: value}}), "plan")
                changed = _planned(recipe, self.shape, self.device, self.backend, sizes)
                plans[f"{section}.{key}={value}"] = changed
        return plans

    def smaller(self) -> dict[str, int]:
        """Least peaks with one thing changed, by what to set, where below the plan's own."""
        peaks = {name: plan.least for name, plan in self.changes.items()}
        return {name: peak for name, peak in peaks.items() if peak < self.least}

    def shorter(self) -> tuple[str, float] | None:
        """What to set to shorten the run most while training the same parameters, and the hours
        then; None where nothing shortens it."""
        hours = {name: one.hours for name, one in self.changes.items() if "tune" not in name}
        name = min(hours, key=lambda name: hours[name])
        return (name, hours[name]) if hours[name] < self.hours else None


def plan(
    recipe: Recipe, device: Device, backend: str | None = None, assumed: Assumed | None = None
) -> Plan:
    """The plan of a recipe on a device; `backend` None takes the device's. Raises UserError."""
    own = device.backend if backend in (None, "auto") else backend
    name, config = registry.resolve(own), read_config(recipe.model.folder(weights=False))
    shape = Shape(config, registry.planner(name).parameters(config))
    return _planned(recipe, shape, device, name, *_sizes(recipe, assumed or Assumed()))


def _planned(
    recipe: Recipe,
    shape: Shape,
    device: Device,
    backend: str,
    sizes: Sizes,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan of a recipe for a model's shape and known sizes."""
    options, rollout = recipe.model.options(weights=False), recipe.rollout
    shape.trained(options)  # refuses unknown targets before anything is worked out
    encoder = PromptEncoder(options.path, **recipe.model.pixels())
    student = view(encoder, shape, sizes.image, sizes.text)
    teacher = view(encoder, shape, sizes.crop, sizes.text, "teacher")
    limit, longest = recipe.data.max_prompt_tokens, max(student.tokens, teacher.tokens)
    if not notes and longest > limit:
        advice = "training skips such rows; set model.max_pixels or data.max_prompt_tokens"
        notes = [f"{too_long(longest, limit)[0]}: {advice}"]
    group, budgets = (student, teacher), (rollout.microbatch_tokens, rollout.sample_tokens)
    work = Work(rollout.prompts, rollout.completions, sizes.tokens, *group, *budgets, sizes.rows)
    return Plan(recipe, shape, options, work, device, backend, sizes, tuple(notes))


def read_config(folder: Path) -> dict[str, Any]:
    """A supported family's config.json with all defaults of transformers. Raises ModelError."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: no config.json, so this is no model folder")
    stated = read_json(file)
    check_sizes(file, stated)
    try:
        family(str(stated.get("model_type")))
    except ModelError as error:
        what = "of another model nothing can be planned, though torch may train it by rows"
        raise ModelError(f"{file}: {error}; {what}") from None
    return complete(file, stated)


def view(
    encoder: PromptEncoder,
    shape: Shape,
    size: tuple[int, int],
    text: int,
    policy: Policy = "student",
) -> View:
    """What a policy sees of an image of `size`: a blank one is encoded as training would.

    `text`: tokens of the prompt beside those that mark an image. Raises DataError.
    """
    prompt, vision = encoder.encode([new("RGB", size)], "?", policy), shape.config["vision_config"]
    marks = len(prompt) - len(encoder.encode([], "?", policy))
    if "image_grid_thw" in prompt.images:
        ((pieces, *sides),) = prompt.images["image_grid_thw"].tolist()
    else:
        pieces, _, *sides = prompt.images["pixel_values"].shape
        sides = [side // vision["patch_size"] for side in sides]

    # Some towers attend within windows, but for some layers.
    merge, layers = vision.get("spatial_merge_size", 1), range(len(shape.tower))
    window = vision.get("window_size", 0) // merge // vision["patch_size"] * merge
    whole = vision.get("fullatt_block_indexes", layers)
    reach = [max(sides) if number in whole else window for number in layers]
    cut = (prod(side // w * w**2 + (side % w) ** 2 for side in sides) for w in reach)
    visual = len(prompt.visual.index)
    return View(pieces * prod(sides), pieces * sum(cut), visual, text + marks, pieces)


def _sizes(recipe: Recipe, assumed: Assumed) -> tuple[Sizes, list[str]]:
    """Sizes as assumed, else images of the data's first row, and as the recipe says; and what
    preflight says of the data's rows.

    A real model without data of its own is not planned on the embedded data.
    """
    image, crop, data, rows, notes = assumed.image, assumed.crop, recipe.data, MANY, []
    if (image is None or crop is None) and (data.path != "tiny" or recipe.model.path == "tiny"):
        pixels, most = data.max_image_pixels, preflight.SAMPLE
        examples = open_data(data.path, data.strict, max_image_pixels=pixels, count=most)
        encoder = PromptEncoder(recipe.model.folder(weights=False), **recipe.model.pixels())
        inspection = preflight.refuse(recipe, encoder, examples, preflight.SAMPLE)
        rows, notes, first = inspection.rows, inspection.lines(), examples[0]
        if image is None:
            full = [image_size(source, first.max_image_pixels) for source in first.images]
            part = teacher_sizes(first, recipe.view)
            if len(full) != 1 or len(part) != 1:
                what = "a row of several images cannot be planned; say --image and --crop"
                raise DataError(f"{first.source or first.id}: {what}")
            image, crop = full[0], crop or part[0]
    width, height = image = image or IMAGE
    crop = crop or (max(1, width // 2), max(1, height // 2))
    text = TEXT_TOKENS if assumed.text_tokens is None else assumed.text_tokens
    tokens = assumed.completion_tokens or recipe.rollout.max_tokens
    return Sizes(image, crop, text, tokens, rows), notes


def everywhere(plan: Plan, devices: Sequence[Device]) -> list[Plan]:
    """The plan, and the same step on all other devices whose backend is installed."""
    plans, missing = [], set()
    for device in devices:
        try:
            if device.name != plan.device.name:
                backend = registry.resolve(device.backend)
                plans.append(replace(plan, device=device, backend=backend))
        except BackendError as error:
            missing.add(f"devices of another backend are left out: {error}")
    return [replace(plan, notes=(*plan.notes, *sorted(missing))), *plans]
