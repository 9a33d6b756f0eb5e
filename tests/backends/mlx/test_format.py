"""Checkpoints in MLX's own format, as the mlx-community has them: of every family, whole and
quantised, against stock mlx-vlm."""

from __future__ import annotations

import json

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_vlm import utils
from PIL import Image
from safetensors.numpy import load_file, save_file

import opd_mlx
from opd import registry
from opd.errors import ModelError
from opd.objective import Objective
from opd.prompts.encoder import PromptEncoder
from opd.testing.conformance import relative_error
from opd.types import Completion, Group, ModelOptions, Update
from tests.support import random_models
from tests.support.adapter_cases import OPTIONS, logprobs_of
from tests.support.random_models import FAMILIES

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    """A Hugging Face checkpoint whose rows are whole groups of 64 and 32."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "qwen3_vl":
        return random_models.qwen3_vl(folder, hidden=64, mlp=128, head_dim=16)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("hidden_size", 64), ("intermediate_size", 128)):
            patch.setitem(random_models.TEXT, name, size)
        return published(FAMILIES[request.param](folder))


def published(folder):
    """With what mlx-vlm reads, and published checkpoints have, where transformers writes it
    otherwise."""
    config, weights = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    if config["model_type"] == "qwen2_5_vl":
        config |= {
            name: value for name, value in config["text_config"].items() if name != "model_type"
        }
        config["vision_config"]["model_type"] = "qwen2_5_vl"
    elif config["model_type"] == "gemma3":
        config["text_config"]["mm_tokens_per_image"] = config["mm_tokens_per_image"]
    elif config["model_type"] == "idefics3":  # its tied head is stored too
        weights["lm_head.weight"] = weights["model.text_model.embed_tokens.weight"].copy()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def whole(source, folder):
    """The checkpoint as mlx-vlm writes it without quantising it."""
    folder.mkdir()
    utils.save_weights(folder, utils.load_model(source, lazy=True))
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def groups_of(folder, images):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)) for _ in range(images)]
    prompt = PromptEncoder(folder).encode(pictures, "digit?")
    tokens = rng.integers(10, 250, 6).astype(np.int32)
    zeros = np.zeros(6, np.float32)
    return [
        Group(prompt, prompt, (Completion(tokens, zeros, False),), (zeros + np.float32(1 / 6),))
    ]


def stock_logprobs(folder, groups):
    """By stock mlx-vlm, of a row of text alone, shorter than every window: with images its masks
    are not those of every family."""
    model, prompt = utils.load_model(folder), groups[0].student
    tokens = groups[0].completions[0].tokens
    row = mx.array(np.concatenate([prompt.tokens, tokens]))[None]
    logits = np.array(
        model.language_model(row).logits[0, len(prompt.tokens) - 1 : -1].astype(mx.float32),
        np.float64,
    )
    return logits[range(len(tokens)), tokens] - np.log(np.exp(logits).sum(-1))


def adapted(folder, **more):
    return registry.load("mlx", ModelOptions(folder, tune_vision=False, adapters=OPTIONS, **more))


def test_a_whole_checkpoint_is_what_it_was_made_of(source, tmp_path):
    """Read, and written back as Hugging Face has it."""
    folder = whole(source, tmp_path / "mlx")
    ours, theirs = (registry.load("mlx", ModelOptions(path)) for path in (folder, source))
    expected = theirs.tensors("student")
    assert ours.tensors("student").keys() == expected.keys()
    assert all(
        np.abs(value - expected[name]).max() < 1e-6
        for name, value in ours.tensors("student").items()
    )
    text = groups_of(source, 0)
    np.testing.assert_allclose(
        logprobs_of(ours, text, JSD), stock_logprobs(folder, text), atol=1e-4
    )
    ours.export(tmp_path / "out", "model")
    written, stored = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(source / "model.safetensors"),
    )
    again = registry.load("mlx", ModelOptions(tmp_path / "out")).tensors("student")
    assert all(np.abs(value - expected[name]).max() < 1e-6 for name, value in again.items())
    assert {value.dtype for value in written.values()} == {value.dtype for value in stored.values()}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_checkpoints(source, tmp_path, bits):
    """As `opd export --quantize` writes them, which is mlx-vlm's own way: read, trained on, written
    back plain."""
    torch = pytest.importorskip("torch")
    import transformers

    from tests.support.torch_cases import delta_rule_in_float64, stock_logits

    folder = tmp_path / "packed"
    folder.mkdir()
    opd_mlx.quantize(source, folder, bits, group=32)
    backend, text, groups = adapted(folder), groups_of(source, 0), groups_of(source, 2)
    plain = registry.load("mlx", ModelOptions(source))
    np.testing.assert_allclose(
        logprobs_of(backend, text, JSD), stock_logprobs(folder, text), atol=1e-4
    )
    assert np.abs(logprobs_of(backend, text, JSD) - logprobs_of(plain, text, JSD)).max() > (
        1e-2 if bits == 4 else 1e-4
    )
    for _ in range(2):
        backend.accumulate(groups, JSD)
        assert backend.apply(Update(1e-2)).taken
    backend.export(tmp_path / "out", "model")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float64
    )
    tokens = groups[0].completions[0].tokens
    with torch.no_grad(), delta_rule_in_float64():
        wanted = stock_logits(model, groups[0].student, tokens).log_softmax(-1)[
            range(len(tokens)), tokens
        ]
    np.testing.assert_allclose(logprobs_of(backend, groups, JSD), wanted, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_what_transformers_writes_otherwise_is_quantised_too(family, tmp_path):
    """Sizes of the text below `text_config`, or beside it: mlx-vlm knows published files alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("hidden_size", 64), ("intermediate_size", 128)):
            patch.setitem(random_models.TEXT, name, size)
        source = FAMILIES[family](tmp_path / "model")
    before = (source / "config.json").read_bytes()
    (tmp_path / "packed").mkdir()
    opd_mlx.quantize(source, tmp_path / "packed", 8, group=32)
    assert (source / "config.json").read_bytes() == before
    text = groups_of(source, 0)
    found = logprobs_of(adapted(tmp_path / "packed"), text, JSD)
    np.testing.assert_allclose(found, stock_logprobs(tmp_path / "packed", text), atol=1e-4)
    np.testing.assert_allclose(
        found, logprobs_of(registry.load("mlx", ModelOptions(source)), text, JSD), atol=0.05
    )


def test_what_mlx_vlm_cannot_load_is_one_line(tmp_path):
    source = random_models.qwen3_vl(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights.pop("model.language_model.norm.weight")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match="mlx-vlm, which quantises, cannot load this model of type 'qwen3_vl': "
    ) as caught:
        opd_mlx.quantize(source, tmp_path / "packed", 8)
    assert "\n" not in str(caught.value)


def test_gradients_over_norms_of_mlx(source, tmp_path):
    """What is trained has the gradient it has over the Hugging Face checkpoint."""
    groups, gradients = groups_of(source, 1), []
    state = tmp_path / "state"
    for folder in (whole(source, tmp_path / "mlx"), source):
        backend = registry.load("mlx", ModelOptions(folder))
        if not state.is_dir():
            backend.save(state)
            shift(state / "teacher.safetensors")
        backend.load(state)
        backend.accumulate(groups, JSD)
        gradients.append(backend.tensors("gradient"))
    assert relative_error(*gradients) < 1e-3


def shift(file):
    """Moves a saved teacher away from the student."""
    rng, weights = np.random.default_rng(2), load_file(file)
    moved = {
        name: value + rng.normal(0, 0.1 * value.std() + 1e-3, value.shape).astype(np.float32)
        for name, value in weights.items()
    }
    save_file(moved, file, metadata={"format": "pt"})
