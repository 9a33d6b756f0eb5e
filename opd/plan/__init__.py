"""Estimates a run's parameters, memory and time from config.json, before weights are downloaded.

`work` counts lengths and operations of a step, and `memory` counts bytes; `devices` says how fast
and how large devices are, and `measure` runs a step. This module plans a recipe with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

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
from opd.plan.memory import memory
from opd.plan.work import Pixels, Step, View, Work, stages
from opd.prompts.encoder import PromptEncoder
from opd.prompts.families import family
from opd.run import preflight
from opd.run.recipe import Recipe, assign, validate
from opd.types import ModelOptions, Policy
from opd.views.images import teacher_sizes
from opd.views.usable import too_long

TUNES = ("full", "lora", "qlora")
"""Values of model.tune, each of which takes less memory than the one before."""


@dataclass(frozen=True)
class Assumed:
    """Sizes that a person assumes; None: as the data and the recipe say, else a default.
    `text_tokens`: tokens of a prompt beside its image's, for chat template and question. `rows` of
    the data."""

    image: Pixels | None = None
    crop: Pixels | None = None
    text_tokens: int | None = None
    completion_tokens: int | None = None
    rows: int | None = None


@dataclass
class Plan:
    """The plan of a recipe's step on one device, of whose bytes a run may take the `usable` ones.
    `seconds` of each stage are at the assumed shares of the device's peaks. `notes`: lines about
    rows of the data that are above the limit of a prompt."""

    recipe: Recipe
    shape: Shape
    options: ModelOptions
    work: Work
    device: Device
    backend: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        device, options, planner = self.device, self.options, registry.planner(self.backend)
        rough = planner.footprint(options, self.shape.config, device.name == HERE)
        self.step = Step(self.shape, options, self.work, rough, feature_bytes(device.memory))
        self.memory = memory(self.step)
        self.stages = stages(self.step, self.memory.checkpointed)
        self.seconds = {name: device.seconds(it, options.dtype) for name, it in self.stages.items()}
        # Hours of the run, without the probes before and after training.
        self.hours = self.recipe.run.steps * sum(self.seconds.values()) / 3600
        self.usable = device.usable * device.memory

    @property
    def largest(self) -> int:
        """The largest rollout.microbatch_tokens that fits; 0 where not even one completion does."""
        work = self.work
        groups = range(work.prompts * work.group, 0, -work.group)
        parts = range(work.group - work.tokens, work.longest, -work.tokens)
        return self._first("budget", (*groups, *parts), "accumulate", "apply")

    @property
    def largest_sample(self) -> int:
        """The largest rollout.sample_tokens that fits; 0 where not even one group does."""
        sizes = range(self.work.prompts * self.work.sample, 0, -self.work.sample)
        return self._first("sample_budget", sizes, "rollout")

    def _first(self, name: str, sizes: Iterable[int], *phases: str) -> int:
        """The first of the `sizes` for a field of `work` with which the phases fit; 0: none."""
        peaks = ((size, self.sized(**{name: size}).memory.phases) for size in sizes)
        fit = (size for size, peak in peaks if max(peak[one] for one in phases) <= self.usable)
        return next(fit, 0)

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
        work, student, tune = self.work, self.work.student, self.recipe.model.tune
        pixels = student.patches * self.shape.config["vision_config"]["patch_size"] ** 2
        settings = [
            f"rollout.completions={max(1, work.completions // 2)}",
            f"rollout.max_tokens={max(1, work.tokens // 2)}",
            f"model.max_pixels={pixels // 2}",
            *(f"model.tune={less}" for less in TUNES[TUNES.index(tune) + 1 :]),
            *["model.dtype=bfloat16"] * (self.options.dtype == "float32"),
        ]
        plans = {}
        for setting in settings:
            values = self.recipe.model_dump(exclude_unset=True)
            assign(values, setting)
            with suppress(UserError):  # some families have no bound on pixels
                recipe = validate(values, "plan")
                tokens = recipe.rollout.max_tokens if "max_tokens" in setting else work.tokens
                sizes = Assumed(student.size, work.teacher.size, student.text, tokens, work.rows)
                plans[setting] = plan(recipe, self.device, self.backend, sizes, self.shape)
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
    recipe: Recipe,
    device: Device,
    backend: str | None = None,
    assumed: Assumed | None = None,
    shape: Shape | None = None,
) -> Plan:
    """The plan of a recipe on a device. `backend` None: the backend that runs on the device;
    `shape` None: that of the recipe's model.

    Sizes that nobody assumes are those of the first row of the data, but only the tiny model is
    planned on the embedded data. Raises UserError.
    """
    name = registry.resolve(device.backend if backend in (None, "auto") else backend)
    if shape is None:
        config = read_config(recipe.model.folder(weights=False))
        shape = Shape(config, registry.planner(name).parameters(config))
    model, data, rollout, notes = recipe.model, recipe.data, recipe.rollout, list[str]()
    options, assumed = model.options(weights=False), assumed or Assumed()
    shape.trained(options)  # refuses unknown targets before anything else
    encoder = PromptEncoder(options.path, **model.pixels())
    image, crop = assumed.image, assumed.crop
    rows = assumed.rows or 2**31  # not counted: more than any cache holds
    if (image is None or crop is None) and (data.path != "tiny" or model.path == "tiny"):
        examples = open_data(
            data.path,
            data.strict,
            max_image_pixels=data.max_image_pixels,
            count=preflight.SAMPLE,
            evidence=recipe.view.view.needs_evidence,
            reading=data,
        )
        inspection = preflight.refuse(recipe, encoder, examples, preflight.SAMPLE)
        rows, notes = inspection.rows, inspection.lines()
        faulty = {id(example) for example, _ in inspection.faulty}
        first = next((row for row in examples if id(row) not in faulty), examples[0])
        if image is None:
            images = [image_size(source, first.max_image_pixels) for source in first.images]
            crops = teacher_sizes(first, recipe.seeded_view)
            if len(images) == 1 and len(crops) > 1:
                many = f"the teacher's {len(crops)} pictures of a row"
                notes.append(f"{many} are planned as one of as many pixels")
                crops = [_as_one(crops)]
            if len(images) != 1 or len(crops) != 1:
                why = "a row of several images cannot be planned; say --image and --crop"
                raise DataError(f"{first.source or first.id}: {why}")
            image, crop = images[0], crop or crops[0]
    width, height = image = image or (1024, 768)
    crop = crop or (max(1, width // 2), max(1, height // 2))
    text = 64 if assumed.text_tokens is None else assumed.text_tokens
    student = view(encoder, shape, image, text)
    teacher = view(encoder, shape, crop, text, "teacher")
    limit, longest = data.max_prompt_tokens, max(student.tokens, teacher.tokens)
    if not notes and longest > limit:
        advice = "training skips such rows; set model.max_pixels or data.max_prompt_tokens"
        notes = [f"{too_long(longest, limit)[0]}: {advice}"]
    tokens = assumed.completion_tokens or rollout.max_tokens
    group, budgets = (student, teacher), (rollout.microbatch_tokens, rollout.sample_tokens)
    work = Work(rollout.prompts, rollout.completions, tokens, *group, *budgets, rows)
    return Plan(recipe, shape, options, work, device, name, tuple(notes))


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
    return View(pieces * prod(sides), pieces * sum(pairs), visual, text + marks, pieces, size, text)


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
