"""Adapters over a frozen base in 4 bits, and checkpoints that are stored in few bits as the
mlx-community has them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd import registry
from opd.errors import BackendError, ModelError, RecipeError
from opd.objective import Objective
from opd.testing.conformance import check, relative_error
from opd.types import ModelOptions, Update
from tests.conftest import INSTALLED, twin_of
from tests.support.adapter_cases import OPTIONS, groups_of, language_layers, logprobs_of, make_case
from tests.support.random_models import qwen3_vl

JSD = Objective(alpha=0.5, top_k=20)
SIZES = {"hidden": 64, "mlp": 96, "head_dim": 16}
LAYERS = language_layers(**SIZES)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("qlora")
    return make_case(root, qwen3_vl(root / "model", seed=3, **SIZES), LAYERS)


def rounded(value, group, bits):
    """What is left of a weight [out, in] in so many bits, by mlx's own rounding, told apart by
    `mx.quantize` alone."""
    import mlx.core as mx

    return np.array(mx.dequantize(*mx.quantize(mx.array(value), group, bits), group, bits))


def plain_twin(case, folder: Path, chosen) -> Path:
    """The model with rounded weights, stored plainly; `chosen` gives group size and bits of a
    tensor, or None."""
    shutil.copytree(case.folder, folder)
    weights = load_file(case.folder / "model.safetensors")
    rules = {name: chosen(name) for name in weights}
    save_file(
        {
            name: value if rules[name] is None else rounded(value, *rules[name])
            for name, value in weights.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def test_a_base_in_four_bits_is_the_rounded_base(case, tmp_path):
    """Values and gradients equal those of a plain model of the rounded weights: groups of 64, and
    of 32 where 64 does not divide."""
    pytest.importorskip("mlx.core")

    def chosen(name):
        return (
            (32 if name.endswith("down_proj.weight") else 64, 4)
            if name.removesuffix(".weight") in LAYERS
            else None
        )

    four = registry.load("mlx", case.options(four_bit=True))
    plain = registry.load(
        "mlx", replace(case.options(), path=plain_twin(case, tmp_path / "plain", chosen))
    )
    found, expected = (logprobs_of(backend, case.groups, JSD) for backend in (four, plain))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert (
        np.abs(expected - logprobs_of(registry.load("mlx", case.options()), case.groups, JSD)).max()
        > 0.05
    )
    for backend in (four, plain):
        backend.accumulate(case.groups, JSD)
    assert relative_error(four.tensors("gradient"), plain.tensors("gradient")) < 1e-4
    four.apply(Update(1e-2))
    four.export(tmp_path / "out", "model")
    # Merged into the weights as they are stored, which the 4 bits were made of.
    out = registry.load("mlx", ModelOptions(tmp_path / "out"))
    four.export(tmp_path / "adapter", "adapter")
    unquantised = registry.load("mlx", case.options(adapter=tmp_path / "adapter"))
    np.testing.assert_allclose(
        logprobs_of(out, case.groups, JSD), logprobs_of(unquantised, case.groups, JSD), atol=2e-5
    )


def test_conformance_in_four_bits(case):
    pytest.importorskip("mlx.core")
    pairs = [(group.student, group.teacher) for group in case.groups]
    results = check(
        lambda: registry.load("mlx", case.options(four_bit=True)),
        pairs,
        (336,),
        (339, 340, 342, 343),
    )
    assert [str(result) for result in results if not result.passed] == []


def community(case, folder: Path, bits: int) -> Path:
    """The model as mlx-vlm itself quantises and writes it: MLX's names, packed weights, one layer
    with bits of its own."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_vlm.utils import load_model

    shutil.copytree(case.folder, folder)
    own = {"language_model.model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8}}
    model = load_model(case.folder)

    def how(path, layer):
        if path.startswith("vision_tower") or not hasattr(layer, "to_quantized"):
            return False
        return own.get(path, {"group_size": 32, "bits": bits})

    nn.quantize(model, class_predicate=how)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "mlx"},
    )
    config = json.loads((folder / "config.json").read_text())
    settings = {"group_size": 32, "bits": bits, "mode": "affine", **own}
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization": settings, "quantization_config": settings})
    )
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_checkpoints_load(case, tmp_path, bits):
    """Log-probabilities are those of stock mlx-vlm on the same folder, and an export is plain."""
    pytest.importorskip("mlx.core")
    from mlx_vlm.utils import load_model

    from tests.support.mlx_cases import stock_logits

    folder = community(case, tmp_path / "community", bits)
    backend = registry.load("mlx", ModelOptions(folder, tune_vision=False, adapters=OPTIONS))
    stock, group = load_model(folder), groups_of(folder)[0]
    expected = []
    for one in group.completions:
        logits = np.array(stock_logits(stock, group.student, one.tokens), np.float64)
        expected.append(logits[range(len(one)), one.tokens] - np.log(np.exp(logits).sum(-1)))
    found = logprobs_of(backend, case.groups, JSD)
    np.testing.assert_allclose(
        logprobs_of(backend, [group], JSD), np.concatenate(expected), atol=1e-4
    )
    for _ in range(2):
        backend.accumulate(case.groups, JSD)
        backend.apply(Update(1e-2))
    trained = logprobs_of(backend, case.groups, JSD)
    assert np.abs(trained - found).max() > 1e-2
    backend.export(tmp_path / "out", "model")
    assert "quantization" not in (tmp_path / "out/config.json").read_text()
    np.testing.assert_allclose(
        logprobs_of(registry.load("mlx", ModelOptions(tmp_path / "out")), case.groups, JSD),
        trained,
        atol=1e-4,
    )
    with pytest.raises(RecipeError, match="quantised weights cannot be trained themselves"):
        registry.load("mlx", ModelOptions(folder))


@pytest.mark.filterwarnings("ignore")
def test_a_base_in_four_bits_on_torch(case, tmp_path):
    """What a GPU would run, by bitsandbytes' own kernels for the CPU: values and gradients equal
    those over the same weights unpacked.

    A step moves the adapters alone, and what is exported is an adapter for the base as it is
    stored.
    """
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from opd_torch.backend import TorchBackend

    options = [case.options(four_bit=True), case.options()]
    models = [twin_of("cpu").opened(one).model for one in options]
    packed, plain = (model.module for model in models)
    unpack = bitsandbytes.functional.dequantize_4bit
    found = {
        name: module
        for name, module in packed.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert {name.replace(".base_layer", "") for name in found} == set(LAYERS)
    for name, module in found.items():
        # or, on a CPU alone, it would be packed again, in a form that has no gradient
        module.train()
        plain.get_submodule(name).weight.data.copy_(
            unpack(module.weight.data, module.weight.quant_state)
        )
    four, dense = map(TorchBackend, options, models)
    np.testing.assert_allclose(
        logprobs_of(four, case.groups, JSD), logprobs_of(dense, case.groups, JSD), atol=1e-6
    )
    for backend in (four, dense):
        backend.accumulate(case.groups, JSD)
    assert relative_error(four.tensors("gradient"), dense.tensors("gradient")) < 1e-6
    before = logprobs_of(four, case.groups, JSD)
    for backend in (four, dense):
        assert backend.apply(Update(1e-2)).taken
    assert np.abs(logprobs_of(four, case.groups, JSD) - before).max() > 1e-3
    np.testing.assert_allclose(
        logprobs_of(four, case.groups, JSD), logprobs_of(dense, case.groups, JSD), atol=1e-4
    )
    four.export(tmp_path / "adapter", "adapter")
    again = registry.load("cpu", case.options(adapter=tmp_path / "adapter"))
    for name, value in four.tensors("student").items():
        np.testing.assert_array_equal(again.tensors("student")[name], value)


def test_torch_says_what_is_missing(case, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from opd_torch.model import quantised

    with pytest.raises(BackendError, match=r"'qlora' needs a CUDA GPU on torch; use --backend mlx"):
        registry.load("cpu", case.options(four_bit=True))
    for package in ("bitsandbytes", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(
        BackendError,
        match="needs bitsandbytes and accelerate on torch: pip install bitsandbytes accelerate",
    ):
        quantised.check_four_bits(torch.device("cuda"))
    if "mlx" in INSTALLED:
        with pytest.raises(ModelError, match="quantised for MLX"):
            registry.load("cpu", ModelOptions(community(case, tmp_path / "community", 4)))
