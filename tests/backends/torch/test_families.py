"""Every family on the torch backend against stock transformers, row by row, in float64: values, gradients, samples, files."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers
from safetensors.numpy import load_file, save_file

import opd_torch
from opd.objective import Objective
from opd.testing.conformance import check
from opd.types import Completion, Group, ModelOptions, Sampling, Update
from opd_torch import footprint, gradient, vision
from opd_torch.layers import gated_delta, layer
from tests.support import random_models
from tests.support.torch_cases import (
    clone,
    delta_rule_in_float64,
    gradients_of,
    loss_of,
    make_case,
    on_device,
    plain_delta_rule,
    plain_loss_and_gradients,
    relative_error,
    stock_logits,
)

FAMILIES = [name for name in random_models.FAMILIES if name != "qwen3_vl"]  # that one has tests/backends/torch/test_exact.py
JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    with delta_rule_in_float64():
        yield make_case(root, random_models.FAMILIES[request.param](root / "model"))


@pytest.fixture(scope="module")
def double(case):
    return case.backend()


@pytest.fixture(scope="module")
def expected(case):
    return plain_loss_and_gradients(case, case.groups, JSD)


def test_value_and_gradient(case, double, expected):
    backend = clone(double)
    loss, gradients = expected
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(loss, rel=1e-6)
    assert relative_error(gradients_of(backend), gradients) < 1e-6
    assert min(np.abs(value).max() for value in gradients.values()) > 0, "a parameter without gradient proves nothing"


def test_a_completion_longer_than_the_window(case, double):
    """Beside a short one; in Gemma 3 its last rows see neither the prompt nor its own first tokens in the sliding layers."""
    rng, old = np.random.default_rng(4), case.groups[0]
    allowed = np.setdiff1d(np.arange(250), case.encoder.banned)
    tokens = [rng.choice(allowed, length).astype(np.int32) for length in (24, 2)]
    completions = tuple(Completion(one, np.full(len(one), -5, np.float32), False) for one in tokens)
    groups = [Group(old.student, old.teacher, completions, tuple(rng.uniform(0.1, 1, len(one)).astype(np.float32) for one in tokens))]
    loss, gradients = plain_loss_and_gradients(case, groups, JSD)
    backend = clone(double)
    assert loss_of(groups, backend.accumulate(groups, JSD)) == pytest.approx(loss, rel=1e-6)
    # transformers' norms are float32 in a float64 model; over more rows that shows.
    assert relative_error(gradients_of(backend), gradients) < 1e-5


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_layers_computed_again_in_the_backward(case, double, expected, monkeypatch, share):
    """All, or as many of the first as do not fit in a GPU's memory."""
    calls = []
    real = layer.checkpoint
    monkeypatch.setattr(layer, "checkpoint", lambda function, *rest, **options: calls.append(function) or real(function, *rest, **options))
    backend = on_device(clone(double), checkpoint_above=0)
    if share < 1:
        monkeypatch.setattr(gradient, "recompute_share", lambda model, wanted: share)
    backend.accumulate(case.groups, JSD)
    text, tower = case.stock().config.text_config, case.stock().config.vision_config
    layers, blocks = text.num_hidden_layers, getattr(tower, "depth", 0) or tower.num_hidden_layers
    names = [getattr(function, "__name__", "block") for function in calls]
    assert names.count("prefix") == names.count("completion") == ceil(share * layers)
    assert (len(names) - 2 * ceil(share * layers)) % ceil(share * blocks) == 0 < len(names) - 2 * ceil(share * layers)
    assert relative_error(gradients_of(backend), expected[1]) < 1e-6


def test_a_gpu_keeps_what_fits(double, monkeypatch):
    """Above the bound: all but the share whose activations fit; a CPU computes all layers again."""
    backend = clone(double)

    def shares(*wanted):
        return [footprint.recompute_share(backend._student, size * 2**30) for size in wanted]

    monkeypatch.setattr(footprint, "free_bytes", lambda model: 6 * 2**30)
    assert shares(1, 2, 3) == [0, 0, 1]
    on_device(backend, torch=torch.device("cuda"))
    assert shares(2, 6, 8) == [0, 0, 0.25]
    monkeypatch.setattr(footprint, "free_bytes", lambda model: -1)
    assert shares(8) == [1]


def test_score_is_the_stock_distribution(case, double):
    backend = clone(double)
    student, teacher = case.stock(), case.stock("teacher")
    for group, row in zip(case.groups, backend.score(case.groups, JSD, top=3), strict=True):
        for completion, one in zip(group.completions, row, strict=True):
            for model, prompt, logprobs, top in (
                (student, group.student, one.student_logprobs, one.student_top),
                (teacher, group.teacher, one.teacher_logprobs, one.teacher_top),
            ):
                with torch.no_grad():
                    wanted = stock_logits(model, prompt, completion.tokens).log_softmax(-1).numpy()
                np.testing.assert_allclose(logprobs, wanted[range(len(completion)), completion.tokens], rtol=1e-6)
                np.testing.assert_array_equal(top.tokens, np.argsort(-wanted, -1)[:, :3])


@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_samples_are_the_stock_distributions(case, double, temperature):
    """Longer than any window; greedy, or by inverse CDF, from whole rows without a cache."""
    backend, model = clone(double), case.stock()
    prompts = [group.student for group in case.groups[:3]]
    uniforms = np.random.default_rng(1).random((3, 2, 20), dtype=np.float32)
    banned = list(case.encoder.banned)
    sampled = backend.sample(prompts, uniforms, Sampling(temperature, (), tuple(banned)))
    for prompt, row, draws in zip(prompts, sampled, uniforms, strict=True):
        for completion, u in zip(row, draws, strict=True):
            with torch.no_grad():
                logits = stock_logits(model, prompt, completion.tokens).numpy() / (temperature or 1.0)
            logits[:, banned] = -np.inf
            probabilities = np.exp(logits - logits.max(-1, keepdims=True))
            probabilities /= probabilities.sum(-1, keepdims=True)
            wanted = (np.cumsum(probabilities, -1) > u[:, None]).argmax(-1) if temperature else probabilities.argmax(-1)
            np.testing.assert_array_equal(completion.tokens, wanted)
            np.testing.assert_allclose(completion.logprobs, np.log(probabilities[range(20), completion.tokens]), rtol=1e-5)


def test_text_without_images(case, double):
    """Beside a prompt with an image."""
    prompt = case.encoder.encode([], "What digit?")
    sampled = clone(double).sample([case.groups[0].student, prompt], np.full((2, 1, 3), 0.5, np.float32), Sampling(1.0))[1][0]
    with torch.no_grad():
        logprobs = stock_logits(case.stock(), prompt, sampled.tokens).log_softmax(-1)
    np.testing.assert_allclose(sampled.logprobs, logprobs[range(3), sampled.tokens], rtol=1e-6)


def test_images_stay_on_a_gpu(case, double, expected, monkeypatch):
    """Between the passes of a step, in a store whose oldest entries go first; what is computed of them is the same."""
    known, uploads = {}, []
    monkeypatch.setattr(vision, "_uploaded", known)
    real = vision._on_device
    monkeypatch.setattr(
        vision, "_on_device", lambda prompt, images, device: real(prompt, lambda one: uploads.append(1) or images(one), device)
    )
    backend = on_device(clone(double), uploaded_bytes=2**29)
    backend.accumulate(case.groups, JSD)
    assert relative_error(gradients_of(backend), expected[1]) < 1e-6
    keys = {prompt.key for group in case.groups if group.tokens for prompt in (group.student, group.teacher)}
    assert len(uploads) == len(known) == len(keys)
    on_device(clone(double), uploaded_bytes=1).accumulate(case.groups[:1], JSD)
    assert list(known) == [(case.groups[0].student.key, torch.device("cpu"))]


def test_frozen_vision(case, tmp_path, expected):
    """The same gradient but for what makes image features, which is neither trained nor copied for the teacher; images are seen once."""
    backend = case.backend("float64", tune_vision=False)
    names = set(backend.tensors("student"))
    frozen = {name for name in expected[1] if any(part in name for part in ("visual", "vision", "projector", "connector"))}
    assert frozen
    assert names == set(expected[1]) - frozen
    group = replace(case.groups[0], teacher=case.groups[0].student)
    seen = []
    real = type(backend._student.family).features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(backend._student.family),
            "features",
            lambda self, module, prompts, *rest: seen.append(len(prompts)) or real(self, module, prompts, *rest),
        )
        backend.accumulate([group], Objective(form="sampled"))
        backend.accumulate(case.groups[:1], JSD)
    assert sum(seen) == 2
    tuned = case.backend("float64", tune_vision=True)
    tuned.accumulate([group], Objective(form="sampled"))
    tuned.accumulate(case.groups[:1], JSD)
    wanted = gradients_of(tuned)
    assert relative_error(gradients_of(backend), {name: wanted[name] for name in names}) < 1e-9


def test_conformance(case):
    encoder = case.encoder
    pairs = [(group.student, group.teacher) for group in case.groups[:4]]
    results = check(lambda: opd_torch.load_cpu(ModelOptions(case.folder)), pairs, encoder.stop, encoder.banned)
    assert [str(result) for result in results if not result.passed] == []


def test_files(case, tmp_path):
    """A state comes back; an export has the published names, loads in transformers, and gives the same logits."""
    backend = case.backend()
    backend.accumulate(case.groups, JSD)
    assert backend.apply(Update(1e-2)).taken
    backend.save(tmp_path / "state")
    other = opd_torch.load_cpu(ModelOptions(case.folder, "float64"))
    other.load(tmp_path / "state")
    assert relative_error(other.tensors("student"), backend.tensors("student")) == 0
    backend.export(tmp_path / "out", "model")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load_file(case.folder / "model.safetensors"))
    assert (tmp_path / "out" / "config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    group = case.groups[1]
    with torch.no_grad():
        wanted, before = (stock_logits(one, group.student, group.completions[0].tokens).log_softmax(-1) for one in (model, case.stock()))
    # The file is float32, the backend here float64.
    scored = backend.score([group], JSD)[0][0].student_logprobs
    np.testing.assert_allclose(scored, wanted[range(1), group.completions[0].tokens], rtol=1e-5)
    assert float((wanted - before).abs().max()) > 1e-2


def test_smolvlm2(tmp_path):
    """The same modules under another name; its processor needs torchvision, so the prompts are SmolVLM's."""
    case = make_case(tmp_path, random_models.smolvlm(tmp_path / "model"))
    config = json.loads((case.folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "smolvlm_vision"
    (case.folder / "config.json").write_text(json.dumps(config | {"model_type": "smolvlm"}))
    backend, groups = case.backend(), case.groups[:2]
    assert type(backend._student.module).__name__ == "SmolVLMForConditionalGeneration"
    loss, gradients = plain_loss_and_gradients(case, groups, JSD)
    assert loss_of(groups, backend.accumulate(groups, JSD)) == pytest.approx(loss, rel=1e-6)
    assert relative_error(gradients_of(backend), gradients) < 1e-6


def test_delta_net_as_it_stands(tmp_path):
    """Against transformers' own float32 delta net, within what float32 allows."""
    case = make_case(tmp_path, random_models.qwen3_5(tmp_path / "model"))
    backend = case.backend()
    loss, gradients = plain_loss_and_gradients(case, case.groups[:2], JSD)
    assert loss_of(case.groups[:2], backend.accumulate(case.groups[:2], JSD)) == pytest.approx(loss, rel=1e-5)
    assert relative_error(gradients_of(backend), gradients) < 1e-4


def test_heads_that_are_left_out_are_kept(tmp_path):
    """Published Qwen3.5 files also hold heads for further tokens, which are neither loaded nor lost."""
    folder = random_models.qwen3_5(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"mtp.fc.weight": np.arange(6, dtype=np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    opd_torch.load_cpu(ModelOptions(folder)).export(tmp_path / "out", "model")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == weights.keys() | {"mtp.fc.weight"}
    np.testing.assert_array_equal(exported["mtp.fc.weight"], np.arange(6))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_delta_rule_is_the_recurrence(chunk):
    """Value and every gradient, for rows longer and shorter than a chunk, from a state that is not zero."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [normal(2, 10, 2, 5), normal(2, 10, 2, 5), normal(2, 10, 4, 3), -normal(2, 10, 4).exp(), normal(2, 10, 4).sigmoid()]
    inputs = [x.requires_grad_() for x in (*inputs, normal(2, 4, 5, 3))]
    weights = normal(2, 10, 4, 3), normal(2, 4, 5, 3)
    ours, theirs = gated_delta.gated_delta_rule(*inputs, chunk=chunk), plain_delta_rule(*inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    found, wanted = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), inputs) for outputs in (ours, theirs)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_bfloat16_is_near(case):
    """Statistics, the gradient as a whole, on float32 masters, and samples; of the delta net transformers' own autocast is 0.34 away."""
    groups = case.groups[:2]
    exact, rough = case.backend("float32"), case.backend("bfloat16")
    wanted = loss_of(groups, exact.accumulate(groups, JSD))
    assert loss_of(groups, rough.accumulate(groups, JSD)) == pytest.approx(wanted, rel=0.15)
    ours, theirs = (np.concatenate([value.ravel() for value in one.tensors("gradient").values()]) for one in (rough, exact))
    assert 1e-4 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < (0.4 if "qwen3_5" in case.folder.parent.name else 0.1)
    assert {value.dtype for value in rough._gradient.values()} == {torch.float32}
    prompt = groups[0].student
    sampled = tuple(rough.sample([prompt], np.full((1, 2, 4), 0.5, np.float32), Sampling(1.0))[0])
    scored = rough.score([Group(prompt, prompt, sampled, tuple(np.ones(4, np.float32) for _ in sampled))], JSD)[0]
    for one, other in zip(sampled, scored, strict=True):
        np.testing.assert_allclose(one.logprobs, other.student_logprobs, atol=0.2)
