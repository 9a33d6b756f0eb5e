"""What a run will take, before it and before any weights are there: parameters, memory and time, from config.json alone.

`shape` reads the model's sizes, `work` counts operations, `memory` bytes, `devices` knows how fast and how large devices are; this module
puts them together for a recipe.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opd.errors import BackendError, DataError, ModelError, RecipeError, nearest
from opd.models import ModelChoice
from opd.plan.devices import BANDWIDTH_SHARE, HERE, MATMUL_SHARE, Device
from opd.plan.memory import Memory, Setting, memory
from opd.plan.shape import PROJECTIONS, Shape, Tune, read_json, read_shape
from opd.plan.work import Stage, View, Work, stages
from opd.recipe import Recipe

IMAGE = (1024, 768)
"""Width and height of an image where neither an option nor the data says."""

TEXT_TOKENS = 64
"""Tokens of the chat template and a question, where no option says."""


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
    image: tuple[int, int]
    crop: tuple[int, int]

    @property
    def memory(self) -> Memory:
        """Memory of the step."""
        return memory(self.shape, self.tune, self.work, self.setting, self.top_k)

    @property
    def stages(self) -> dict[str, Stage]:
        """Work of the step by stage."""
        return stages(self.shape, self.tune, self.work, self.setting.item, self.memory.checkpointed)

    @property
    def seconds(self) -> dict[str, float]:
        """Each stage's time: computing or moving, whichever is longer, at the assumed shares of the device's peaks."""
        rate, bandwidth = MATMUL_SHARE * self.device.matmul[self.dtype], BANDWIDTH_SHARE * self.device.bandwidth
        return {name: max(stage.operations / rate, stage.moved / bandwidth) for name, stage in self.stages.items()}

    @property
    def usable(self) -> float:
        """Bytes of the device that a run may take."""
        return self.device.usable * self.device.memory

    @property
    def largest(self) -> int:
        """The largest rollout.microbatch_tokens that fits; 0 where not even one group does."""
        for groups in range(self.work.prompts, 0, -1):
            work = self.work.limited(groups)
            if replace(self, work=work).memory.peak <= self.usable:
                return work.budget
        return 0

    def smaller(self) -> dict[str, int]:
        """Peaks of one group at a time with one thing changed, by what to set."""
        work = self.work.limited(1)
        half = max(1, work.completions // 2)
        smaller = [replace(view, patches=max(1, view.patches // 2)) for view in (work.student, work.teacher)]
        pixels = smaller[0].patches * self.shape.vision.patch**2
        changes = {
            "model.tune=lora": replace(self, tune=Tune("lora", False), work=work),
            "model.tune=qlora": replace(self, tune=Tune("qlora", False), work=work),
            f"model.max_pixels={pixels}": replace(self, work=replace(work, student=smaller[0], teacher=smaller[1])),
            f"rollout.completions={half}": replace(self, work=replace(work, completions=half)),
            f"rollout.max_tokens={max(1, work.tokens // 2)}": replace(self, work=replace(work, tokens=max(1, work.tokens // 2))),
        }
        if not self.tune.full:
            changes.pop(f"model.tune={self.tune.kind}")
        if self.tune.kind == "qlora":
            changes.pop("model.tune=lora")
        if self.setting.half is False:
            changes["model.dtype=bfloat16"] = replace(self, setting=replace(self.setting, half=True), work=work)
        return {name: plan.memory.peak for name, plan in changes.items()}


def plan(recipe: Recipe, device: Device, backend: str | None = None, assumed: Assumed | None = None) -> Plan:
    """The plan of a recipe on a device; `backend` None takes the device's own. Raises UserError."""
    assumed = assumed or Assumed()
    folder, choice = recipe.model.folder(weights=False), recipe.model
    shape = read_shape(folder)
    image, crop = assumed.image, assumed.crop
    if image is None or crop is None:
        found = _of_data(recipe)
        image, crop = image or found[0], crop or (found[1] if image is None else _half(image))
    bounds = choice.pixels()
    text = TEXT_TOKENS if assumed.text_tokens is None else assumed.text_tokens
    student = _view(shape, folder, image, text, bounds["max_pixels"], bounds["min_pixels"])
    teacher_bounds = bounds["teacher_max_pixels"] or bounds["max_pixels"], bounds["teacher_min_pixels"] or bounds["min_pixels"]
    teacher = _view(shape, folder, crop, text, *teacher_bounds)
    rollout = recipe.rollout
    work = Work(
        rollout.prompts,
        rollout.completions,
        assumed.completion_tokens or rollout.max_tokens,
        student,
        teacher,
        rollout.microbatch_tokens,
    )
    top_k = 0 if recipe.objective.form == "divergence" and not recipe.objective.top_k else recipe.objective.top_k or 1
    return Plan(shape, tuning(choice), work, _setting(device, backend, choice.dtype), device, choice.dtype, top_k, image, crop)


def on(plan: Plan, device: Device) -> Plan:
    """The same step on another device and its own backend."""
    return replace(plan, device=device, setting=_setting(device, None, plan.dtype))


def tuning(choice: ModelChoice) -> Tune:
    """What a recipe's model section trains."""
    return Tune(choice.tune, choice.vision, choice.projector, choice.rank, choice.targets or PROJECTIONS)


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
        "assumed": {
            "image": list(first.image),
            "crop": list(first.crop),
            "prompt_tokens": first.work.student.tokens,
            "crop_prompt_tokens": first.work.teacher.tokens,
            "text_tokens": first.work.student.text,
            "completion_tokens": first.work.tokens,
            "prompts": first.work.prompts,
            "completions": first.work.completions,
            "matmul_share": MATMUL_SHARE,
            "bandwidth_share": BANDWIDTH_SHARE,
        },
        "parameters": {part: {"all": count, "trained": trained[part]} for part, count in first.shape.parameters.items()},
        "memory": {**asdict(found), "peak": found.peak, "usable": int(first.usable)},
        "microbatch": {
            "groups": first.work.together,
            "count": first.work.calls,
            "tokens": first.work.together * first.work.group,
            "largest": first.largest,
        },
        "smaller": {} if first.largest else first.smaller(),
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
    return Setting(name == "mlx", gpu, dtype == "bfloat16")


def _of_data(recipe: Recipe) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of the first row's image and of its crop; of a real model without data of its own, the assumed ones."""
    from opd.data import open_data
    from opd.view import student_images, teacher_images

    if recipe.data.path == "tiny" and recipe.model.path != "tiny":
        return IMAGE, _half(IMAGE)
    example = open_data(recipe.data.path, strict=recipe.data.strict)[0]
    full, crop = student_images(example), teacher_images(example, recipe.view)
    if len(full) != 1 or len(crop) != 1:
        raise DataError(f"{example.source or example.id}: a row of several images cannot be planned; say --image and --crop")
    return full[0].size, crop[0].size


def _half(image: tuple[int, int]) -> tuple[int, int]:
    return max(1, image[0] // 2), max(1, image[1] // 2)


def _view(shape: Shape, folder: Path, size: tuple[int, int], text: int, largest: int | None, smallest: int | None) -> View:
    """Patches of an image of `size`, resized as the model's processor does it, between so many pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    vision = shape.vision
    settings = read_json(folder, "preprocessor_config.json")
    stated = settings.get("size") or {}
    most = largest or settings.get("max_pixels") or stated.get("longest_edge")
    least = smallest or settings.get("min_pixels") or stated.get("shortest_edge")
    if not most or not least:
        raise ModelError(f"{folder / 'preprocessor_config.json'}: no size, which the prompt's length depends on")
    try:
        height, width = smart_resize(size[1], size[0], vision.patch * vision.merge, min(least, most), most)
    except ValueError as error:
        raise RecipeError(f"an image of {size[0]}x{size[1]} pixels cannot be encoded: {error}") from error
    return View(height * width // vision.patch**2, text, vision.merge)
