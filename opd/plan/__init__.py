"""Estimates a run's parameters, memory and time from config.json, before weights are downloaded.

`work` counts lengths and operations of a step, and `memory` counts bytes; `devices` says how fast
and how large devices are, and `measure` runs a step. This module plans a recipe with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

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

Pixels: TypeAlias = tuple[int, int]
"""Width and height of an image."""

IMAGE, TEXT_TOKENS = (1024, 768), 64
"""Defaults for the pixels of an image, and for the tokens of a prompt beside its image's."""

TUNES = ("full", "lora", "qlora")
"""Values of model.tune, each of which takes less memory than the one before."""


@dataclass(frozen=True)
class Assumed:
    """Sizes that a person assumes; None: as the data and the recipe say, else a default.
    `text_tokens`: tokens of a prompt beside its image's, for chat template and question."""

    image: Pixels | None = None
    crop: Pixels | None = None
    text_tokens: int | None = None
    completion_tokens: int | None = None


class Sizes(NamedTuple):
    """Sizes that a plan is made for: `text` tokens of a prompt beside its image's, `tokens` of a
    completion, `rows` of the data."""

    image: Pixels
    crop: Pixels
    text: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe's step on one device. `notes`: lines about rows of the data that are
    above the limit of a prompt."""

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
        """The most bytes of a frozen tower's features that are kept."""
        return feature_bytes(self.device.memory)

    @cached_property
    def memory(self) -> Memory:
        """Memory of the step."""
        return memory(self.shape, self.options, self.work, self.rough, self.features)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Work of the step by stage."""
        recompute = self.memory.checkpointed
        return stages(self.shape, self.options, self.work, self.rough, recompute, self.features)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage at the assumed shares of the device's peaks."""
        dtype = self.options.dtype
        return {name: self.device.seconds(stage, dtype) for name, stage in self.stages.items()}

    @property
    def hours(self) -> float:
        """Hours of the run, without the probes before and after training."""
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
        budgets = [count * self.work.sample for count in range(self.work.prompts, 0, -1)]
        return self._first("sample_budget", budgets, "rollout")

    def _first(self, name: str, sizes: Sequence[int], *phases: str) -> int:
        """The first of the `sizes` for a field of `work` with which the phases fit; 0: none."""
        for size in sizes:
            peaks = self.sized(**{name: size}).memory.phases
            if max(peaks[phase] for phase in phases) <= self.usable:
                return size
        return 0

    @property
    def least(self) -> int:
        """The least peak: one group is sampled, and one completion, or one group, is
        differentiated at a time."""
        sizes = 1, self.work.group
        return min(self.sized(sample_budget=1, budget=size).memory.peak for size in sizes)

    def sized(self, **changed: Any) -> Plan:
        """The plan with some fields of `work` changed."""
        return replace(self, work=replace(self.work, **changed))

    @cached_property
    def changes(self) -> dict[str, Plan]:
        """Plans with one setting changed that may take less memory or time, by the setting."""
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
            with suppress(UserError):  # some families have no bound on pixels
                recipe = validate(merged(given, {section: {key: value}}), "plan")
                changed = _planned(recipe, self.shape, self.device, self.backend, sizes, [])
                plans[f"{section}.{key}={value}"] = changed
        return plans

    def smaller(self) -> dict[str, int]:
        """Least peaks below the plan's least peak, by the one setting to change."""
        peaks = {name: plan.least for name, plan in self.changes.items()}
        return {name: peak for name, peak in peaks.items() if peak < self.least}

    def shorter(self) -> tuple[str, float] | None:
        """The setting that shortens the run most while the same parameters are trained, and the
        hours with it; None if no setting shortens the run."""
        hours = {name: plan.hours for name, plan in self.changes.items() if "tune" not in name}
        name = min(hours, key=lambda name: hours[name])
        return (name, hours[name]) if hours[name] < self.hours else None


def plan(
    recipe: Recipe, device: Device, backend: str | None = None, assumed: Assumed | None = None
) -> Plan:
    """The plan of a recipe on a device; `backend` None: the backend that runs on the device.
    Raises UserError."""
    name = registry.resolve(device.backend if backend in (None, "auto") else backend)
    config = read_config(recipe.model.folder(weights=False))
    shape = Shape(config, registry.planner(name).parameters(config))
    return _planned(recipe, shape, device, name, *_sizes(recipe, assumed or Assumed()))


def _planned(
    recipe: Recipe, shape: Shape, device: Device, backend: str, sizes: Sizes, notes: list[str]
) -> Plan:
    """The plan of a recipe for a model and known sizes."""
    options, rollout = recipe.model.options(weights=False), recipe.rollout
    shape.trained(options)  # refuses unknown targets before anything else
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
    """The config.json of a supported family, with all defaults of transformers. Raises
    ModelError."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a model folder")
    stated = read_json(file)
    check_sizes(file, stated)
    try:
        family(str(stated.get("model_type")))
    except ModelError as error:
        advice = "of another model nothing can be planned, though torch may train it by rows"
        raise ModelError(f"{file}: {error}; {advice}") from None
    return complete(file, stated)


def view(
    encoder: PromptEncoder, shape: Shape, size: Pixels, text: int, policy: Policy = "student"
) -> View:
    """The view that a policy has of an image of `size`: a blank image is encoded as in training.
    `text`: tokens of the prompt beside its image's. Raises DataError."""
    prompt, vision = encoder.encode([new("RGB", size)], "?", policy), shape.config["vision_config"]
    marks = len(prompt) - len(encoder.encode([], "?", policy))
    if "image_grid_thw" in prompt.images:
        ((pieces, *sides),) = prompt.images["image_grid_thw"].tolist()
    else:
        pieces, _, *sides = prompt.images["pixel_values"].shape
        sides = [side // vision["patch_size"] for side in sides]

    # In some towers all layers but a few attend within windows.
    merge, layers = vision.get("spatial_merge_size", 1), range(len(shape.tower))
    window = vision.get("window_size", 0) // merge // vision["patch_size"] * merge
    whole = vision.get("fullatt_block_indexes", layers)
    reach = [max(sides) if number in whole else window for number in layers]
    pairs = (prod(side // w * w**2 + (side % w) ** 2 for side in sides) for w in reach)
    visual = len(prompt.visual.index)
    return View(pieces * prod(sides), pieces * sum(pairs), visual, text + marks, pieces)


def _sizes(recipe: Recipe, assumed: Assumed) -> tuple[Sizes, list[str]]:
    """The sizes as assumed, else of the first row of the data and of the recipe; and lines about
    rows of the data. Only the tiny model is planned on the embedded data."""
    image, crop, data, notes = assumed.image, assumed.crop, recipe.data, []
    rows = 2**31  # until they are counted: more than any cache holds
    if (image is None or crop is None) and (data.path != "tiny" or recipe.model.path == "tiny"):
        pixels, count = data.max_image_pixels, preflight.SAMPLE
        examples = open_data(
            data.path,
            data.strict,
            max_image_pixels=pixels,
            count=count,
            evidence=recipe.view.view.needs_evidence,
            reading=data,
        )
        encoder = PromptEncoder(recipe.model.folder(weights=False), **recipe.model.pixels())
        inspection = preflight.refuse(recipe, encoder, examples, count)
        rows, notes = inspection.rows, inspection.lines()
        faulty = {id(example) for example, _ in inspection.faulty}
        first = next((row for row in examples if id(row) not in faulty), examples[0])
        if image is None:
            images = [image_size(source, first.max_image_pixels) for source in first.images]
            crops = teacher_sizes(first, recipe.seeded_view)
            if len(images) == 1 and len(crops) > 1:
                notes.append(
                    f"the teacher's {len(crops)} pictures of a row are planned as one of as many"
                    " pixels"
                )
                crops = [_as_one(crops)]
            if len(images) != 1 or len(crops) != 1:
                why = "a row of several images cannot be planned; say --image and --crop"
                raise DataError(f"{first.source or first.id}: {why}")
            image, crop = images[0], crop or crops[0]
    width, height = image = image or IMAGE
    crop = crop or (max(1, width // 2), max(1, height // 2))
    text = TEXT_TOKENS if assumed.text_tokens is None else assumed.text_tokens
    tokens = assumed.completion_tokens or recipe.rollout.max_tokens
    return Sizes(image, crop, text, tokens, rows), notes


def _as_one(sizes: Sequence[Pixels]) -> Pixels:
    """The size of a picture that is as wide as the widest, and has the pixels of all."""
    width = max(width for width, _ in sizes)
    return width, -(-sum(width * height for width, height in sizes) // width)


def everywhere(plan: Plan, devices: Sequence[Device]) -> list[Plan]:
    """The plan, and the plan of the same step on each other device whose backend is installed."""
    plans, missing = [], set()
    for device in devices:
        try:
            if device.name != plan.device.name:
                backend = registry.resolve(device.backend)
                plans.append(replace(plan, device=device, backend=backend))
        except BackendError as error:
            missing.add(f"devices of another backend are left out: {error}")
    return [replace(plan, notes=(*plan.notes, *sorted(missing))), *plans]
