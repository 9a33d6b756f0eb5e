"""Loads model folders in Hugging Face layout."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from opd.errors import ModelError, holds_nan, nearest, one_line
from opd.models import inert, names, peft_files, settings, weight_formats
from opd.models.files import read_json, tensor_headers
from opd.types import ModelOptions
from opd_torch import rows
from opd_torch.device import Device
from opd_torch.families import family as family_of
from opd_torch.families.family import Family
from opd_torch.kernels.pointwise import replace_modules
from opd_torch.layers.layer import Layer
from opd_torch.model.adapters import add_adapters, linear_layers, merge
from opd_torch.model.names import check_stored, head_name, hugging_face, trained_parameters
from opd_torch.model.quantised import four_bits
from opd_torch.vision import FeatureCache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The types of computation by name. Trained parameters are float32, or float64 for "float64", which
tests use.
"""


@dataclass(frozen=True)
class Model:
    """One policy: `module` is transformers' model, which holds all parameters, and `layers` run the
    module's trunk.

    Without a family file `family` is None and `layers` is empty. `dtype` is the type of
    computation. `feature_cache` caches image features, and is None if vision is trained.
    """

    family: Family | None
    module: Any
    layers: Sequence[Layer]
    dtype: torch.dtype
    device: Device
    feature_cache: FeatureCache | None

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Trained parameters by Hugging Face name; a tied head goes by the embedding's name."""
        return trained_parameters(self.module)

    @cached_property
    def head_name(self) -> str:
        """The name of the head's parameter, which is the embedding's for a tied head."""
        return head_name(self.module)

    @property
    def head(self) -> Tensor:
        """The head [V, D]."""
        weight: Tensor = self.module.lm_head.weight
        return weight

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding."""
        return int(self.module.get_input_embeddings().num_embeddings)

    def autocast(self) -> torch.autocast:
        """A context in which matrix products compute in bfloat16, if `dtype` is bfloat16."""
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.device.torch.type, torch.bfloat16, enabled=half)


def load_model(options: ModelOptions, device: Device) -> Model:
    """Loads the model of a folder on `device`. Raises ModelError and RecipeError.

    Trained parameters are float32. With adapters only the adapters are trained, and the frozen
    weights are in the compute dtype; otherwise all parameters are trained, those of the vision
    tower only with `tune_vision`.
    """
    path = Path(options.path)
    if options.dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{options.dtype}'; {nearest(options.dtype, DTYPES)}")
    dtype, masters = DTYPES[options.dtype], master_dtype(options.dtype)
    stored = dtype if options.adapters else masters
    module, family = read_model(path, stored, device.torch if options.four_bit else None)
    vision = family.vision(module) if family else []
    if family is None:
        rows.check(module.eval(), str(path))
        logging.getLogger(__name__).warning(
            "%s: no family file for '%s', so a group's completions run as separate rows",
            path,
            module.config.model_type,
        )
    if options.adapters:
        add_adapters(module, options, masters)
    else:
        if options.adapter:
            adapter = peft_files.fitting(options, linear_layers(module))
            merge(module, adapter.tensors, adapter.alpha / adapter.rank)
        for part in vision:
            part.requires_grad_(options.tune_vision)
        if family is None and not options.tune_vision:
            rows.freeze_vision(module, str(path))
    cached = bool(vision) and not any(_trained(vision))
    replace_modules(module, device, dtype)
    # A sparse gradient has only the rows that were looked up, not the whole table. The meta device
    # does not support sparse tensors.
    module.get_input_embeddings().sparse = device.torch.type != "meta"
    module = (module if options.four_bit else module.to(device.torch)).eval()
    broken = not_finite(module)
    if broken:
        raise holds_nan(path, broken)
    layers = family.layers(module) if family else []
    features = FeatureCache(device.feature_bytes) if cached else None
    return Model(family, module, layers, dtype, device, features)


def _trained(modules: Iterable[nn.Module]) -> list[bool]:
    """For each parameter of the modules, whether it is trained."""
    return [parameter.requires_grad for module in modules for parameter in module.parameters()]


def not_finite(module: nn.Module) -> str | None:
    """The name of a parameter that contains NaN or infinity; None if all are finite."""
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        if not value.is_floating_point() or value.is_meta:
            continue
        # The sum is the fastest test, but a sum of large finite numbers may be infinite.
        if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            return hugging_face(name)
    return None


def master_dtype(dtype: str) -> torch.dtype:
    """The type of trained parameters if the computation is in `dtype`."""
    return torch.float64 if dtype == "float64" else torch.float32


def read_model(
    path: Path, dtype: torch.dtype, four_bit: torch.device | None = None
) -> tuple[Any, Family | None]:
    """Reads a folder as transformers' model in `dtype`; also returns the model's family, or None
    without a family file. Raises ModelError.

    With `four_bit` the model is on that device, and the linear layers of the language model are in
    4 bits.
    """
    family = _family(path)
    architecture = getattr(
        transformers, family.architecture if family else "AutoModelForImageTextToText"
    )
    content, stored = read_json(path / "config.json"), tensor_headers(path)
    kind = str(content.get("model_type"))
    weight_formats.check(content, stored, path)
    names.tell_left_out(stored, path)
    # transformers' progress bar would break the caller's progress display.
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    whole = path
    try:
        with inert.inert(path) as whole:
            config = transformers.AutoConfig.from_pretrained(
                whole, trust_remote_code=False, local_files_only=True
            )
            for part in (
                config,
                getattr(config, "text_config", None),
                getattr(config, "vision_config", None),
            ):
                for key in weight_formats.SETTINGS:
                    if hasattr(part, key):
                        delattr(part, key)
            if family:
                settings.check(
                    config.to_dict(),
                    settings.defaults(config),
                    content,
                    path / "config.json",
                    "torch",
                    "mlx",
                )
            if kind == "gemma3":
                config.vision_config.vision_use_head = False  # no forward uses the head
            with torch.device("meta"):
                empty = architecture(config) if family else architecture.from_config(config)
            if family:
                check_stored(empty, stored, path)
            more: dict[str, Any] = (
                four_bits(linear_layers(empty), dtype, four_bit) if four_bit else {}
            )
            more |= {
                "trust_remote_code": False,
                "use_safetensors": True,
                "local_files_only": True,
                "output_loading_info": True,
            }
            module, report = architecture.from_pretrained(whole, config=config, dtype=dtype, **more)
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        reason = one_line(error).replace(str(whole), str(path))
        raise ModelError(f"{path} cannot be loaded: {reason}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    # transformers initialises missing weights at random, so they are refused here.
    unexpected = []
    if family is None:
        keys = report["unexpected_keys"]
        unexpected = [name for name in keys if not names.is_left_out(kind, name)]
    wrong = [*report["missing_keys"], *unexpected, *report["mismatched_keys"]]
    if wrong:
        raise ModelError(
            f"{path}: weights and config.json do not fit: "
            f"{len(wrong)} tensors, the first is {wrong[0]}"
        )
    return module, family


def copy_model(model: Model) -> Model:
    """Copies a model for the teacher: trained parameters are copied, frozen parameters and the
    feature cache are shared.
    """
    frozen = [x for x in model.module.parameters() if not x.requires_grad]
    module = copy.deepcopy(model.module, {id(x): x for x in frozen})
    layers = model.family.layers(module) if model.family else []
    return replace(model, module=module, layers=layers)


def _family(path: Path) -> Family | None:
    """The family of a model folder; None if transformers can load the model but there is no family
    file. Raises ModelError.
    """
    if not (path / "config.json").is_file():
        if not path.is_dir():
            raise ModelError(f"{path}: no such model folder")
        raise ModelError(f"{path}: no config.json, so this is not a model folder")
    kind = str(read_json(path / "config.json").get("model_type"))
    try:
        return family_of(kind)
    except ModelError as error:
        if (
            kind
            in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        ):
            return None
        raise ModelError(f"{path}: {error}") from None
