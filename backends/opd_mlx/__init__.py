"""The MLX backend: Metal GPU on a Mac, CPU on Linux. Nothing here needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd.backend import State

if TYPE_CHECKING:
    from pathlib import Path

    from opd.types import ModelOptions
    from opd_mlx.backend import MlxBackend
    from opd_mlx.device import Device

__all__ = ["load", "quantize", "state"]

GROUP = 64
"""Weights that share a scale, as in mlx-community."""


def load(options: ModelOptions, device: Device | None = None) -> MlxBackend:
    """Loads the model of the folder `options.path`; without `device`, on MLX's default device."""
    from opd_mlx.backend import MlxBackend
    from opd_mlx.device import this_device
    from opd_mlx.model import load_model

    model, student = load_model(options, device or this_device(options.checkpoint_above))
    return MlxBackend(options, model, student)


def state() -> State:
    """Whether MLX runs here, and the name of its default device."""
    import platform

    from opd_mlx.device import this_device

    device = this_device()
    name = "Metal GPU" if platform.system() == "Darwin" else "CUDA GPU"
    return State(True, name if device.gpu else "CPU", budgets=device.budgets)


def quantize(source: Path, folder: Path, bits: int, group: int = GROUP) -> None:
    """Writes the model folder `source` to `folder`, with `bits` per weight in the language model,
    and a scale for each `group` of weights.

    mlx-vlm quantises and chooses the layout. Raises ModelError if mlx-vlm cannot load the model.
    """
    import contextlib
    import io
    import json

    from mlx_vlm import utils
    from mlx_vlm.quant_utils import quantize_model

    from opd.errors import ModelError, one_line
    from opd.models import files as model_files
    from opd.models import inert
    from opd.models.permissions import as_new
    from opd_mlx.families import family

    stated = inert.without_code(model_files.read_json(source / "config.json"))
    kind = str(stated.get("model_type"))
    published = family(kind).published(stated)
    with inert.inert(source) as whole:
        # mlx-vlm needs the published form of config.json, and must not run code that the folder's
        # config.json may name.
        (whole / "config.json").write_text(json.dumps(published), encoding="utf-8")
        try:
            model, config = utils.load_model(whole, lazy=True), utils.load_config(whole)
        except Exception as error:  # whatever mlx-vlm and its models raise
            reason = one_line(error).replace(str(whole), str(source))
            raise ModelError(
                f"mlx-vlm, which quantises, cannot load this model of type '{kind}': {reason}"
            ) from error
        allowed = getattr(model, "quant_predicate", None) or (lambda path, module: True)

        def quantised(path: str, module: object) -> bool:
            return not utils.skip_multimodal_module(path) and allowed(path, module)

        # mlx-vlm prints to stdout, which is reserved for results.
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(model, config, group, bits, quant_predicate=quantised)
        utils.save_weights(folder, model)
    as_new(*folder.glob("*.safetensors"))
    inert.copy_files(source, folder)
    utils.save_config(config, folder / "config.json")
