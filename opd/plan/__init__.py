"""What a run will take, before it and before any weights are there: parameters, memory and time, from config.json alone.

`families` reads a model's sizes into a `shape`, `work` counts operations, `passes` what is moved between them, `activations` and `memory`
what is held, `devices` knows how fast and how large devices are; this module puts them together for a recipe.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL.Image import new

from opd.data import open_data
from opd.data.images import image_size
from opd.errors import BackendError, DataError, UserError, nearest
from opd.memory import feature_bytes
from opd.models.adapters import check_targets
from opd.models.choice import ModelChoice
from opd.plan.activations import Setting
from opd.plan.devices import HERE, Device
from opd.plan.families import read_config, shape_of
from opd.plan.memory import KEPT_FEATURES, Memory, memory
from opd.plan.passes import passed
from opd.plan.shape import Shape, Tune
from opd.plan.work import Stage, View, Work, stages
from opd.prompts.encoder import PromptEncoder
from opd.run import preflight
from opd.run.recipe import Recipe
from opd.types import Example, Policy
from opd.views.crop import teacher_sizes
from opd.views.usable import too_long

IMAGE = (1024, 768)
"""Width and height of an image where neither an option nor the data says."""

MANY = 2**31
"""Rows of data that nobody has counted."""

TEXT_TOKENS = 64
"""Tokens of the chat template and a question, without those that mark an image, where no option says."""


@dataclass(frozen=True)
class Assumed:
    """What a plan takes for granted of images and texts: sizes in pixels, lengths in tokens; None is worked out."""

    image: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    text_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe's step on one device, and all that it is worked out from."""

    shape: Shape
    tune: Tune
    work: Work
    setting: Setting
    device: Device
    dtype: str
    top_k: int
    text: int
    image: tuple[int, int]
    crop: tuple[int, int]
    smaller_images: tuple[int, View, View] | None
    """Half of the student's pixels, and what both policies see with that bound; None where the family has no such bound."""
    notes: tuple[str, ...] = ()
    """How many rows of the data are above the limit of a prompt, in the words of training."""

    @property
    def memory(self) -> Memory:
        """Memory of the step."""
        return memory(self.shape, self.tune, self.work, self.setting, self.top_k)

    @property
    def stages(self) -> dict[str, Stage]:
        """Work of the step by stage."""
        again = self.memory.checkpointed
        beside = passed(self.shape, self.tune, self.work, self.setting, again)
        found = stages(self.shape, self.tune, self.work, self.setting.item, again, self.setting.features)
        return {name: replace(stage, passed=beside[name]) for name, stage in found.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """Each stage's time at the assumed shares of the device's peaks: products or what they read, whichever is longer, and the passes
        between them."""
        rate = self.device.matmul_share * self.device.matmul[self.dtype]
        bandwidth = self.device.bandwidth_share * self.device.bandwidth
        plain, turned = self.device.packed or (rate, rate)

        def seconds(name: str, stage: Stage) -> float:
            packed = stage.packed / (turned if name == "student backward" else plain)
            products = packed + (stage.operations - stage.packed) / rate
            return max(products, stage.moved / bandwidth) + stage.passed / bandwidth

        return {name: seconds(name, stage) for name, stage in self.stages.items()}

    @property
    def usable(self) -> float:
        """Bytes of the device that a run may take."""
        return self.device.usable * self.device.memory

    @property
    def largest(self) -> int:
        """The largest rollout.microbatch_tokens that fits; 0 where not even one completion of one group does."""
        groups = [self.work.limited(count) for count in range(self.work.prompts, 0, -1)]
        parts = [self.work.divided(count) for count in range(self.work.completions - 1, 0, -1)]
        return next((work.budget for work in (*groups, *parts) if self._fits(work, "accumulate", "apply")), 0)

    @property
    def largest_sample(self) -> int:
        """The largest rollout.sample_tokens that fits; 0 where not even one group does."""
        rooms = (self.work.sampling(count) for count in range(self.work.prompts, 0, -1))
        return next((work.room for work in rooms if self._fits(work, "rollout")), 0)

    def _fits(self, work: Work, *phases: str) -> bool:
        found = replace(self, work=work).memory.phases
        return all(found[phase] <= self.usable for phase in phases)

    def smaller(self) -> dict[str, int]:
        """Least peaks with one thing changed, by what to set, where that is below the plan's own."""
        work, fewer, half = self.work, max(1, self.work.completions // 2), max(1, self.work.tokens // 2)
        changes = {
            "model.tune=lora": replace(self, tune=replace(self.tune, kind="lora", vision=False, projector=False)),
            "model.tune=qlora": replace(self, tune=replace(self.tune, kind="qlora", vision=False, projector=False)),
            f"rollout.completions={fewer}": replace(self, work=replace(work, completions=fewer)),
            f"rollout.max_tokens={half}": replace(self, work=replace(work, tokens=half)),
        }
        if self.smaller_images:
            pixels, student, teacher = self.smaller_images
            changes[f"model.max_pixels={pixels}"] = replace(self, work=replace(work, student=student, teacher=teacher))
        if not self.tune.full:
            changes.pop(f"model.tune={self.tune.kind}")
        if self.tune.kind == "qlora":
            changes.pop("model.tune=lora")
        if self.setting.half is False:
            changes["model.dtype=bfloat16"] = replace(self, setting=replace(self.setting, half=True))
        peaks = {name: plan.least for name, plan in changes.items()}
        return {name: peak for name, peak in peaks.items() if peak < self.least}

    @property
    def least(self) -> int:
        """The peak of the step that takes least: one group sampled, and one group, or one completion, differentiated at a time."""
        works = (work.sampling(1) for work in (self.work.limited(1), self.work.divided(1)))
        return min(replace(self, work=work).memory.peak for work in works)


def plan(recipe: Recipe, device: Device, backend: str | None = None, assumed: Assumed | None = None) -> Plan:
    """The plan of a recipe on a device; `backend` None takes the device's own. Raises UserError."""
    assumed = assumed or Assumed()
    choice, rollout = recipe.model, recipe.rollout
    options = choice.options(weights=False)
    folder = options.path
    config = read_config(folder)
    shape = shape_of(config)
    if options.adapters and not options.adapter:
        check_targets(options.adapters.targets, {name for layer in shape.kinds for name in shape.linears(layer)})
    image, crop = assumed.image, assumed.crop
    examples = _data(recipe) if image is None or crop is None else []
    notes, rows = [], MANY
    if examples:
        found = preflight.refuse(recipe, PromptEncoder(folder, **choice.pixels()), examples, preflight.SAMPLE)
        notes, rows = found.said(), found.rows
    if image is None or crop is None:
        sizes = _of_data(recipe, examples)
        image, crop = image or sizes[0], crop or (sizes[1] if image is None else _half(image))
    text = TEXT_TOKENS if assumed.text_tokens is None else assumed.text_tokens
    bounds = choice.pixels()

    def views(**bounds: int | None) -> tuple[View, View]:
        encoder = PromptEncoder(folder, **bounds)
        patch = config["vision_config"]["patch_size"]
        return view(encoder, shape, patch, image, text, "student"), view(encoder, shape, patch, crop, text, "teacher")

    student, teacher = views(**bounds)
    limit = recipe.data.max_prompt_tokens
    if not notes and (longest := max(student.tokens, teacher.tokens)) > limit:
        notes.append(f"{too_long(longest, limit)[0]}: training skips such rows; set model.max_pixels or data.max_prompt_tokens")
    tokens = assumed.completion_tokens or rollout.max_tokens
    work = Work(rollout.prompts, rollout.completions, tokens, student, teacher, rollout.microbatch_tokens, rollout.sample_tokens)
    work = replace(work, rows=rows)
    pixels = student.patches * config["vision_config"]["patch_size"] ** 2 // 2
    try:
        smaller = pixels, *views(**{**bounds, "max_pixels": pixels})
    except UserError:
        smaller = None
    top_k = 0 if recipe.objective.form == "divergence" and not recipe.objective.top_k else recipe.objective.top_k or 1
    setting = _setting(device, backend, choice.dtype)
    return Plan(shape, tuning(choice), work, setting, device, choice.dtype, top_k, text, image, crop, smaller, tuple(notes))


def view(encoder: PromptEncoder, shape: Shape, patch: int, size: tuple[int, int], text: int, policy: Policy) -> View:
    """What a policy sees of an image of `size`: a blank one is encoded as training would. Raises DataError."""
    prompt, bare = encoder.encode([new("RGB", size)], "?", policy), encoder.encode([], "?", policy)
    marks = len(prompt) - len(prompt.visual.index) - len(bare)
    if "image_grid_thw" in prompt.images:
        ((pieces, rows, columns),) = prompt.images["image_grid_thw"].tolist()
    else:
        pieces, _, height, width = prompt.images["pixel_values"].shape
        rows, columns = height // patch, width // patch
    return View(rows, columns, text + marks, shape.vision.merge, pieces)


def on(plan: Plan, device: Device) -> Plan:
    """The same step on another device and its own backend."""
    return replace(plan, device=device, setting=_setting(device, None, plan.dtype))


def tuning(choice: ModelChoice) -> Tune:
    """What a recipe's model section trains."""
    return Tune(choice.tune, choice.vision, choice.projector, choice.rank, choice.targets)


def report(plans: Sequence[Plan], model: str) -> dict[str, Any]:
    """The first plan, and the totals of all, as one JSON object: bytes, operations, seconds."""
    first = plans[0]
    found, seconds = first.memory, first.seconds
    trained = first.tune.trained(first.shape)
    return {
        "model": model,
        "device": asdict(first.device),
        "backend": "mlx" if first.setting.mlx else "torch",
        "dtype": first.dtype,
        "notes": list(first.notes),
        "assumed": {
            "image": list(first.image),
            "crop": list(first.crop),
            "prompt_tokens": first.work.student.tokens,
            "crop_prompt_tokens": first.work.teacher.tokens,
            "text_tokens": first.text,
            "completion_tokens": first.work.tokens,
            "prompts": first.work.prompts,
            "completions": first.work.completions,
            "matmul_share": first.device.matmul_share,
            "bandwidth_share": first.device.bandwidth_share,
        },
        "parameters": {part: {"all": count, "trained": trained[part]} for part, count in first.shape.parameters.items()},
        "memory": {
            **asdict(found),
            "peak": found.peak,
            "usable": int(first.usable),
            "kept_features_bound": first.setting.features if KEPT_FEATURES in found.held else 0,
        },
        "microbatch": {
            "groups": first.work.together,
            "count": first.work.calls,
            "completions": first.work.split or first.work.completions,
            "tokens": first.work.together * (first.work.longest + (first.work.split or first.work.completions) * first.work.tokens),
            "largest": first.largest,
        },
        "sampling": {"groups": first.work.sampled, "largest": first.largest_sample},
        "smaller": {} if first.largest and first.largest_sample else first.smaller(),
        "stages": {name: {**asdict(stage), "seconds": seconds[name]} for name, stage in first.stages.items()},
        "seconds": sum(seconds.values()),
        "devices": [
            {**asdict(one.device), "seconds": sum(one.seconds.values()), "peak": one.memory.peak, "fits": one.memory.peak <= one.usable}
            for one in plans
        ],
    }


def _setting(device: Device, backend: str | None, dtype: str) -> Setting:
    known = ("auto", "mlx", "cuda", "cpu")
    if backend is not None and backend not in known:
        raise BackendError(f"--backend '{backend}' cannot be planned; {nearest(backend, known)}")
    name = device.backend if backend in (None, "auto") else str(backend)
    gpu = name == "cuda" or (name == "mlx" and (device.name != HERE or platform.system() == "Darwin"))
    return Setting(name == "mlx", gpu, dtype == "bfloat16", feature_bytes(device.memory))


def _data(recipe: Recipe) -> Sequence[Example]:
    """The rows of the recipe's data that are looked at before training; none of a real model without data of its own."""
    if recipe.data.path == "tiny" and recipe.model.path != "tiny":
        return []
    options = recipe.data
    return open_data(options.path, options.strict, max_image_pixels=options.max_image_pixels, count=preflight.SAMPLE)


def _of_data(recipe: Recipe, examples: Sequence[Example]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of the first row's image and of its crop; without rows the assumed ones."""
    if not examples:
        return IMAGE, _half(IMAGE)
    example = examples[0]
    full = [image_size(source, example.max_image_pixels) for source in example.images]
    crop = teacher_sizes(example, recipe.view)
    if len(full) != 1 or len(crop) != 1:
        raise DataError(f"{example.source or example.id}: a row of several images cannot be planned; say --image and --crop")
    return full[0], crop[0]


def _half(image: tuple[int, int]) -> tuple[int, int]:
    return max(1, image[0] // 2), max(1, image[1] // 2)
