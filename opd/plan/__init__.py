"""Estimates a run's parameters, memory and time from config.json, before any weights are there.

`shape` holds the shapes of a model's parameters, `work` counts operations, `memory` bytes,
`devices` knows how fast and how large devices are, and `measure` runs a micro-batch to compare;
this module puts them together for a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from PIL.Image import new

from opd import registry as backends
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

    `rough`: the backend's footprint. `text`: tokens of a prompt beside its image's.
    `smaller_images`:
    half of the student's pixels, and what both policies see with that bound; None where the family
    has no such bound. `notes`: how many rows of the data are above the limit of a prompt, in the
    words of training.
    """

    recipe: Recipe
    shape: Shape
    options: ModelOptions
    work: Work
    device: Device
    backend: str
    rough: Footprint
    text: int
    image: tuple[int, int]
    crop: tuple[int, int]
    smaller_images: tuple[int, View, View] | None
    notes: tuple[str, ...] = ()

    @property
    def features(self) -> int:
        """Bytes of a frozen tower's features that are kept at most."""
        return feature_bytes(self.device.memory)

    @property
    def memory(self) -> Memory:
        """Memory of the step."""
        return memory(self.shape, self.options, self.work, self.rough, self.features)

    @property
    def stages(self) -> dict[str, Stage]:
        """Work of the step by stage."""
        again = self.memory.checkpointed
        return stages(self.shape, self.options, self.work, self.rough, again, self.features)

    @property
    def seconds(self) -> dict[str, float]:
        """Each stage's time at the assumed shares of the device's peaks: products or what they
        read, whichever is longer, and the passes between them."""
        rate = self.device.matmul_share * self.device.matmul[self.options.dtype]
        bandwidth = self.device.bandwidth_share * self.device.bandwidth
        return {
            name: max(stage.operations / rate, stage.moved / bandwidth) + stage.passed / bandwidth
            for name, stage in self.stages.items()
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
        return next((size for size in (*groups, *parts) if self._fits(budget=size)), 0)

    @property
    def largest_sample(self) -> int:
        """The largest rollout.sample_tokens that fits; 0 where not even one group does."""
        rooms = (count * self.work.sample for count in range(self.work.prompts, 0, -1))
        return next((size for size in rooms if self._fits(room=size)), 0)

    def _fits(self, **size: int) -> bool:
        found = self.sized(**size).memory.phases
        phases = ("accumulate", "apply") if "budget" in size else ("rollout",)
        return all(found[phase] <= self.usable for phase in phases)

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
            found["model.tune=lora"] = _on(self, low_rank, self.device, self.backend)
        if not options.four_bit:
            packed = replace(low_rank, four_bit=True)
            found["model.tune=qlora"] = _on(self, packed, self.device, self.backend)
        if options.dtype == "float32":
            bfloat16 = replace(options, dtype="bfloat16")
            found["model.dtype=bfloat16"] = _on(self, bfloat16, self.device, self.backend)
        return found

    @property
    def least(self) -> int:
        """The peak of the step that takes least: one group sampled, and one completion, or one
        group differentiated at a time."""
        return min(self.sized(room=1, budget=size).memory.peak for size in (1, self.work.group))

    def smaller(self) -> dict[str, int]:
        """Least peaks with one thing changed, by what to set, where below the plan's own."""
        peaks = {name: plan.least for name, plan in self.changes().items()}
        return {name: peak for name, peak in peaks.items() if peak < self.least}

    def shorter(self) -> tuple[str, float] | None:
        """What to set to shorten the run most while training the same parameters, and the hours
        then; None where nothing shortens it."""
        hours = {name: one.hours for name, one in self.changes().items() if "tune" not in name}
        name = min(hours, key=lambda name: hours[name])
        return (name, hours[name]) if hours[name] < self.hours else None


def backend_of(device: Device | None, name: str | None) -> str:
    """The backend of a plan: the one that is named, else the device's own, else this machine's.

    Raises BackendError where it is unknown or not installed.
    """
    known = ("auto", *backends.names())
    if name is not None and name not in known:
        raise BackendError(f"--backend '{name}' cannot be planned; {nearest(name, known)}")
    own = device.backend if device else "auto"
    return backends.resolve(own if name in (None, "auto") else str(name))


def plan(
    recipe: Recipe, device: Device, backend: str | None = None, assumed: Assumed | None = None
) -> Plan:
    """The plan of a recipe on a device; `backend` None takes the device's. Raises UserError."""
    assumed, rollout = assumed or Assumed(), recipe.rollout
    options, pixels = recipe.model.options(weights=False), recipe.model.pixels()
    config, name = read_config(options.path), backend_of(device, backend)
    shape = Shape(config, backends.planner(name).parameters(config))
    shape.check(options)
    image, crop = assumed.image, assumed.crop
    examples = _data(recipe) if image is None or crop is None else []
    notes, rows = [], MANY
    if examples:
        encoder = PromptEncoder(options.path, **pixels)
        found = preflight.refuse(recipe, encoder, examples, preflight.SAMPLE)
        notes, rows = found.lines(), found.rows
    if image is None or crop is None:
        sizes = _of_data(recipe, examples)
        image, crop = image or sizes[0], crop or (sizes[1] if image is None else _half(image))
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
    rough = _rough(shape, options, work, device, name)
    about = text, image, crop, smaller, tuple(notes)
    return Plan(recipe, shape, options, work, device, name, rough, *about)


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

    # Some towers attend within windows, but in some layers.
    merge, layers = vision.get("spatial_merge_size", 1), range(len(shape.tower))
    window = vision.get("window_size", 0) // merge // vision["patch_size"] * merge
    whole = sum(number in vision.get("fullatt_block_indexes", layers) for number in layers)
    cut = [divmod(side, window or side) for side in sides]
    apart = prod(
        many * (window or side) ** 2 + rest**2
        for (many, rest), side in zip(cut, sides, strict=True)
    )
    pairs = pieces * (whole * prod(sides) ** 2 + (len(layers) - whole) * apart)
    return View(pieces * prod(sides), pairs, len(prompt.visual.index), text + marks, pieces)


def everywhere(plan: Plan, devices: Sequence[Device]) -> list[Plan]:
    """The plan, and the same step on all other devices whose backend is installed."""
    plans, missing = [plan], set()
    for device in devices:
        try:
            plans += [on(plan, device)] if device.name != plan.device.name else []
        except BackendError as error:
            missing.add(f"devices of another backend are left out: {error}")
    return [replace(plan, notes=(*plan.notes, *sorted(missing))), *plans[1:]]


def on(plan: Plan, device: Device) -> Plan:
    """The same step on another device and its own backend. Raises BackendError."""
    return _on(plan, plan.options, device, backend_of(device, None))


def _on(plan: Plan, options: ModelOptions, device: Device, backend: str) -> Plan:
    rough = _rough(plan.shape, options, plan.work, device, backend)
    return replace(plan, options=options, device=device, backend=backend, rough=rough)


def _rough(shape: Shape, options: ModelOptions, work: Work, device: Device, name: str) -> Footprint:
    largest = max(map(prod, shape.shapes.values()))
    where = (work.student.before, work.tokens), device.name == HERE
    return backends.planner(name).footprint(options, shape.config, largest, *where)


def _data(recipe: Recipe) -> Sequence[Example]:
    """The rows of the recipe's data that are looked at before training; none of a real model
    without data of its own."""
    if recipe.data.path == "tiny" and recipe.model.path != "tiny":
        return []
    options, most = recipe.data, preflight.SAMPLE
    pixels = options.max_image_pixels
    return open_data(options.path, options.strict, max_image_pixels=pixels, count=most)


def _of_data(
    recipe: Recipe, examples: Sequence[Example]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of the first row's image and of its crop; without rows the assumed ones."""
    if not examples:
        return IMAGE, _half(IMAGE)
    example = examples[0]
    full = [image_size(source, example.max_image_pixels) for source in example.images]
    crop = teacher_sizes(example, recipe.view)
    if len(full) != 1 or len(crop) != 1:
        what = "a row of several images cannot be planned; say --image and --crop"
        raise DataError(f"{example.source or example.id}: {what}")
    return full[0], crop[0]


def _half(image: tuple[int, int]) -> tuple[int, int]:
    return max(1, image[0] // 2), max(1, image[1] // 2)
