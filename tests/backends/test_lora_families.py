"""Adapters of every family: on which layers they stand by default, and the same numbers as peft's
on separate rows and from its files."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import transformers

from opd import registry
from opd.models import adapters
from opd.objective import Objective
from opd.testing.conformance import relative_error
from opd.types import AdapterOptions, ModelOptions, Update
from tests.support.adapter_cases import OPTIONS, logprobs_of, loss_of, make_case, peft_model
from tests.support.random_models import FAMILIES
from tests.support.torch_cases import delta_rule_in_float64, plain_loss_and_gradients, stock_logits

JSD = Objective(alpha=0.5, top_k=20)
PARTS = ("language", "text")


def all_linear(folder):
    """(out, in) of the language model's layers that peft itself means by "all-linear"."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules="all-linear"))
    names = [
        name.removesuffix(".lora_A.default")
        for name, _ in wrapped.base_model.model.named_modules()
        if name.endswith("lora_A.default")
    ]
    layers = {
        name: wrapped.base_model.model.get_submodule(name)
        for name in names
        if any(f".{part}_model." in name for part in PARTS)
    }
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in layers.items()
        if "vision" not in name
    }


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    folder = FAMILIES[request.param](root / "model")
    with delta_rule_in_float64():
        yield make_case(root, folder, all_linear(folder))


class PeftCase:
    """For `tests.support.torch_cases`: the policies as stock transformers under peft's own
    layers."""

    def __init__(self, case):
        self.case = case

    def stock(self, policy="student"):
        return peft_model(
            self.case.folder, self.case.adapter if policy == "student" else self.case.other
        ).base_model.model


def test_by_default_every_linear_layer_has_one(case, backend_name):
    backend = registry.load(
        backend_name, case.options(adapter=None, adapters=AdapterOptions(rank=2))
    )
    layers = all_linear(case.folder)
    assert set(adapters.adapted_layers(backend.tensors("student"))) == set(layers)
    if "qwen3_5" in str(case.folder):
        words = {name.rpartition(".")[2] for name in layers if ".linear_attn." in name}
        assert words == {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}


def test_loss_and_gradient_equal_pefts_on_separate_rows(case, backend_name):
    dtype, value, gradient = (
        ("float64", 1e-6, 1e-6) if backend_name == "cpu" else ("float32", 1e-5, 3e-4)
    )
    backend = case.backend(backend_name, dtype)
    loss, gradients = plain_loss_and_gradients(PeftCase(case), case.groups, JSD)
    assert abs(loss_of(case.groups, backend.accumulate(case.groups, JSD)) - loss) < max(
        value * abs(loss), 1e-8
    )
    expected = {name.replace(".default.", "."): grad for name, grad in gradients.items()}
    assert min(np.abs(grad).max() for grad in expected.values()) > 0
    assert relative_error(backend.tensors("gradient"), expected) < gradient


def test_exports_load_elsewhere(case, backend_name, tmp_path):
    """The adapter in peft and the merged model in transformers say what the trained one says, and
    what the start did not."""
    backend = case.backend(backend_name)
    start = logprobs_of(backend, case.groups, JSD)
    for _ in range(2):
        backend.accumulate(case.groups, JSD)
        assert backend.apply(Update(1e-2)).taken
    trained = logprobs_of(backend, case.groups, JSD)
    assert np.abs(trained - start).max() > 1e-2
    backend.export(tmp_path / "adapter", "adapter")
    backend.export(tmp_path / "model", "model")
    merged = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float64
    )
    for model in (peft_model(case.folder, tmp_path / "adapter").base_model.model, merged):
        with torch.no_grad():
            rows = [
                stock_logits(model, group.student, one.tokens).log_softmax(-1)[
                    range(len(one)), one.tokens
                ]
                for group in case.groups
                for one in group.completions
            ]
        np.testing.assert_allclose(trained, torch.cat(rows), atol=1e-4)
    again = registry.load(
        backend_name, ModelOptions(case.folder, "float32", False, OPTIONS, tmp_path / "adapter")
    )
    np.testing.assert_allclose(logprobs_of(again, case.groups, JSD), trained, atol=1e-5)
