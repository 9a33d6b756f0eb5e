"""Estimates a run's parameters, memory and time from config.json, before any weights are there.

`shape` holds the shapes of a model's parameters, `step` lengths, `work` counts operations, `memory`
bytes, `devices` knows how fast and how large devices are, and `measure` runs a micro-batch to
compare; this module puts them together for a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from PIL.Image import new

from opd import registry
from opd.data import open_data
from opd.data.images import image_size
from opd.errors import BackendError, DataError, UserError, nearest
from opd.memory import feature_bytes
from opd.plan.devices import HERE, Device
from opd.plan.memory import Memory, memory
from opd.plan.shape import Shape, read_config
from opd.plan.work import Stage, View, Work, stages
from opd.planner import Footprint
from opd.prompts.encoder import PromptEncoder
from opd.run import preflight
from opd.run.recipe import Recipe
from opd.types import AdapterOptions, Example, ModelOptions, Policy
from opd.views.images import teacher_sizes
from opd.views.usable import too_long

IMAGE, TEXT_TOKENS = (1024, 768), 64
"""Pixels of an image, and tokens of the chat template and a question, without those that mark an
image, where neither an option nor the data says."""

MANY = 2**31
"""Rows of data that nobody has counted."""


@dataclass(frozen=True)
class Assumed:
    """What a plan takes for granted of images (pixels) and texts (tokens); None is worked out."""

    image: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    text_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe's step on one device, and all that it is worked out from.

    `text`: tokens of a prompt beside its image's. `smaller_images`: half of the student's pixels,
    and what both policies see with that bound; None where the family has no such bound. `notes`:
    how many rows of the data are above the limit of a prompt, in the words of training.
    """

    recipe: Recipe
    shape: Shape
    options: ModelOptions
    work: Work
    device: Device
    backend: str
    text: int
    image: tuple[int, int]
    crop: tuple[int, int]
    smaller_images: tuple[int, View, View] | None
    notes: tuple[str, ...] = ()

    @cached_property
    def rough(self) -> Footprint:
        """The backend's footprint."""
        largest, here = max(map(prod, self.shape.shapes.values())), self.device.name == HERE
        planner = registry.planner(self.backend)
        return planner.footprint(self.options, self.shape.config, largest, here)

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
        stages, dtype = self.stages.items(), self.options.dtype
        return {
            name: self.device.seconds(stage, dtype, name == "student backward")
            for name, stage in stages
        }

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
        return self._first((*groups, *parts), "budget", "accumulate", "apply")

    @property
    def largest_sample(self) -> int:
        """The largest rollout.sample_tokens that fits; 0 where not even one group does."""
        rooms = [count * self.work.sample for count in range(self.work.prompts, 0, -1)]
        return self._first(rooms, "room", "rollout")

    def _first(self, sizes: Sequence[int], name: str, *phases: str) -> int:
        """The first size of the work's `name` with which the phases fit; 0 where none does."""
        for size in sizes:
            found = self.sized(**{name: size}).memory.phases
            if max(found[phase] for phase in phases) <= self.usable:
                return size
        return 0

    def sized(self, **changed: int | View) -> Plan:
        """The plan of a step with some fields of its `work` changed."""
        return replace(self, work=replace(self.work, **changed))  # type: ignore[arg-type]

    def changes(self) -> dict[str, Plan]:
        """Plans with one thing changed that may take less memory or time, by what to set."""
        options, choice = self.options, self.recipe.model
        fewer, half = max(1, self.work.completions // 2), max(1, self.work.tokens // 2)
        found = {
            f"rollout.completions={fewer}": self.sized(completions=fewer),
            f"rollout.max_tokens={half}": self.sized(tokens=half),
        }
        if self.smaller_images:
            pixels, student, teacher = self.smaller_images
            found[f"model.max_pixels={pixels}"] = self.sized(student=student, teacher=teacher)
        adapters = AdapterOptions(choice.rank, choice.alpha, choice.targets)
        low_rank = replace(options, tune_vision=False, adapters=adapters)
        if options.adapters is None:
            found["model.tune=lora"] = replace(self, options=low_rank)
        if not options.four_bit:
            found["model.tune=qlora"] = replace(self, options=replace(low_rank, four_bit=True))
        if options.dtype == "float32":
            bfloat16 = replace(options, dtype="bfloat16")
            found["model.dtype=bfloat16"] = replace(self, options=bfloat16)
        return found

    @property
    def least(self) -> int:
        """The peak of the step that takes least: one group sampled, and one completion, or one
        group differentiated at a time."""
        sizes = 1, self.work.group
        return min(self.sized(room=1, budget=size).memory.peak for size in sizes)

    def smaller(self) -> dict[str, int]:
        """Least peaks with one thing changed, by what to set, where below the plan's own."""
        peaks = {name: plan.least for name, plan in self.changes().items()}
        return {name: peak for name, peak in peaks.items() if peak < self.least}

    def shorter(self) -> tuple[str, float] | None:
        """What to set to shorten the run most while training the same parameters, and the hours
        then; None where nothing shortens it."""
        hours = {name: one.hours for name, one in self.changes().items() if "tune" not in name}
        hours["none"] = self.hours
        name = min(hours, key=lambda name: hours[name])
        return None if name == "none" else (name, hours[name])


def backend_of(device: Device | None, name: str | None) -> str:
    """The backend of a plan: the one that is named, else the device's own, else this machine's.

    Raises BackendError where it is unknown or not installed.
    """
    known = ("auto", *registry.names())
    if name is not None and name not in known:
        raise BackendError(f"--backend '{name}' cannot be planned; {nearest(name, known)}")
    own = device.backend if device else "auto"
    return registry.resolve(own if name in (None, "auto") else str(name))


def plan(
    recipe: Recipe, device: Device, backend: str | None = None, assumed: Assumed | None = None
) -> Plan:
    """The plan of a recipe on a device; `backend` None takes the device's. Raises UserError."""
    assumed, rollout = assumed or Assumed(), recipe.rollout
    options, pixels = recipe.model.options(weights=False), recipe.model.pixels()
    config, name = read_config(options.path), backend_of(device, backend)
    shape = Shape(config, registry.planner(name).parameters(config))
    shape.trained(options)  # refuses unknown targets before anything is worked out
    image, crop, rows, notes = _seen(recipe, assumed, PromptEncoder(options.path, **pixels))
    text = TEXT_TOKENS if assumed.text_tokens is None else assumed.text_tokens

    def views(**bounds: int | None) -> tuple[View, View]:
        encoder = PromptEncoder(options.path, **bounds)
        return view(encoder, shape, image, text), view(encoder, shape, crop, text, "teacher")

    student, teacher = views(**pixels)
    limit, longest = recipe.data.max_prompt_tokens, max(student.tokens, teacher.tokens)
    if not notes and longest > limit:
        advice = "training skips such rows; set model.max_pixels or data.max_prompt_tokens"
        notes.append(f"{too_long(longest, limit)[0]}: {advice}")
    tokens = assumed.completion_tokens or rollout.max_tokens
    budgets = rollout.microbatch_tokens, rollout.sample_tokens
    work = Work(rollout.prompts, rollout.completions, tokens, student, teacher, *budgets, rows)
    half = student.patches * config["vision_config"]["patch_size"] ** 2 // 2
    try:
        smaller = half, *views(**{**pixels, "max_pixels": half})
    except UserError:
        smaller = None
    about = text, image, crop, smaller, tuple(notes)
    return Plan(recipe, shape, options, work, device, name, *about)


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


def everywhere(plan: Plan, devices: Sequence[Device]) -> list[Plan]:
    """The plan, and the same step on all other devices whose backend is installed."""
    plans, missing = [], set()
    for device in devices:
        try:
            plans += [on(plan, device)] if device.name != plan.device.name else []
        except BackendError as error:
            missing.add(f"devices of another backend are left out: {error}")
    return [replace(plan, notes=(*plan.notes, *sorted(missing))), *plans]


def on(plan: Plan, device: Device) -> Plan:
    """The same step on another device and its own backend. Raises BackendError."""
    return replace(plan, device=device, backend=backend_of(device, None))


def _seen(
    recipe: Recipe, assumed: Assumed, encoder: PromptEncoder
) -> tuple[tuple[int, int], tuple[int, int], int, list[str]]:
    """Sizes of the image and of its crop, as assumed or of the data's first row; how many rows the
    data have, and what preflight says of them.

    A real model without data of its own is not planned on the embedded data.
    """
    image, crop, data = assumed.image, assumed.crop, recipe.data
    examples: Sequence[Example] = []
    if (image is None or crop is None) and (data.path != "tiny" or recipe.model.path == "tiny"):
        pixels, most = data.max_image_pixels, preflight.SAMPLE
        examples = open_data(data.path, data.strict, max_image_pixels=pixels, count=most)
    rows, notes = MANY, []
    if examples:
        looked = preflight.refuse(recipe, encoder, examples, preflight.SAMPLE)
        rows, notes = looked.rows, looked.lines()
    if examples and image is None:
        first = examples[0]
        full = [image_size(source, first.max_image_pixels) for source in first.images]
        part = teacher_sizes(first, recipe.view)
        if len(full) != 1 or len(part) != 1:
            what = "a row of several images cannot be planned; say --image and --crop"
            raise DataError(f"{first.source or first.id}: {what}")
        image, crop = full[0], crop or part[0]
    width, height = image = image or IMAGE
    return image, crop or (max(1, width // 2), max(1, height // 2)), rows, notes
