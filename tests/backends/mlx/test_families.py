"""Every family on the MLX backend against stock transformers in float64, one plain row a completion: values, gradients, samples, files.

mlx-vlm's own forwards are no reference: Gemma 3's masks and Idefics3's padding are not the model's there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

import opd_mlx
from opd.objective import Objective, evaluate, log_softmax
from opd.prompts.encoder import PromptEncoder
from opd.testing.conformance import check
from opd.types import Completion, Group, ModelOptions, Sampling, Update
from opd_mlx.batch import lay_out
from opd_mlx.forward import hidden_states
from tests.support import random_models
from tests.support.mlx_cases import clone, loss_of, mac, relative_error

JSD = Objective(alpha=0.5, top_k=20)

SIZES = [[(64, 64)], [(96, 64), (48, 48)], [(40, 88)]]
"""Widths and heights of the images of each group's student; the teacher's are the next group's."""

LENGTHS = [(5, 3, 9), (1, 4), (6, 2)]
"""Tokens of each group's completions."""


NEAR = {"qwen3_5": 1e-3}
"""Largest difference of a log-probability from float64; float32 of stock transformers is off by 2.2e-4 where a gated norm is of little."""


@dataclass
class Case:
    """A model folder, groups for it, and a state folder in which the teacher differs from the student."""

    folder: Path
    encoder: PromptEncoder
    groups: list[Group]
    state: Path
    near: float
    loaded: opd_mlx.backend.MlxBackend

    def stock(self, policy: str = "student"):
        """The policy as transformers has it, in float64."""
        config = transformers.AutoConfig.from_pretrained(self.folder)
        architecture = getattr(transformers, config.architectures[0])
        model = architecture.from_pretrained(self.folder, dtype=torch.float64, attn_implementation="sdpa")
        weights = {name: torch.from_numpy(value).double() for name, value in load_file(self.state / f"{policy}.safetensors").items()}
        assert weights.keys() == dict(model.named_parameters()).keys()
        model.load_state_dict(weights, strict=False)
        return model.eval()


@pytest.fixture(scope="module", params=[name for name in random_models.FAMILIES if name != "qwen3_vl"])
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return make_case(root, random_models.FAMILIES[request.param](root / "model"))


def make_case(root: Path, folder: Path) -> Case:
    rng = np.random.default_rng(0)
    random_models.raise_norms(folder)
    encoder = PromptEncoder(folder)
    prompts = [
        encoder.encode(
            [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes],
            ("What digit is on the red tile?", "digit?", "What is red?")[index],
        )
        for index, sizes in enumerate(SIZES)
    ]
    groups = []
    for index, lengths in enumerate(LENGTHS):
        completions = tuple(
            Completion(rng.integers(10, 250, size=length).astype(np.int32), rng.normal(-5, 1.5, size=length).astype(np.float32), False)
            for length in lengths
        )
        weights = tuple(rng.uniform(0.01, 0.1, size=length).astype(np.float32) for length in lengths)
        groups.append(Group(prompts[index], prompts[(index + 1) % len(prompts)], completions, weights))
    state = root / "state"
    loaded = opd_mlx.load(ModelOptions(folder), mac())
    loaded.save(state)
    teacher = load_file(state / "teacher.safetensors")
    moved = {name: value + rng.normal(0, 0.2 * value.std() + 1e-3, size=value.shape).astype(np.float32) for name, value in teacher.items()}
    save_file(moved, state / "teacher.safetensors", metadata={"format": "pt"})
    loaded.load(state)
    return Case(folder, encoder, groups, state, NEAR.get(loaded._model.config["model_type"], 2e-5), loaded)


def stock_logits(model, prompt, tokens):
    """Logits [T, V] of stock transformers at the rows that predict `tokens`, from one plain row [prompt + tokens]."""
    ids = np.concatenate([prompt.tokens, tokens]).astype(np.int64)
    kinds = np.zeros_like(ids)
    kinds[prompt.visual.index] = 1
    kinds = torch.from_numpy(kinds)[None]
    given = {name: torch.from_numpy(value) for name, value in prompt.images.items()}
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].double()
    if model.config.model_type in ("idefics3", "smolvlm"):
        given = {name: value[None] for name, value in given.items()}
    elif model.config.model_type == "gemma3":
        given["token_type_ids"] = kinds
    else:
        given["mm_token_type_ids"] = kinds
    ids = torch.from_numpy(ids)[None]
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given)
    return out.logits[0, len(prompt.tokens) - 1 : -1]


def distribution(model, prompt, tokens, banned=()):
    """Log-probabilities [T, V] of stock transformers."""
    with torch.no_grad():
        logits = stock_logits(model, prompt, tokens).numpy()
    logits[:, list(banned)] = -np.inf
    return log_softmax(logits)


@pytest.fixture(scope="module")
def expected(case):
    """The step's loss and every gradient by name, from separate rows: the numpy objective gives the slope of the logits."""
    student, teacher = case.stock(), case.stock("teacher")
    loss = 0.0
    for group in case.groups:
        for completion, weights in zip(group.completions, group.weights, strict=True):
            logits = stock_logits(student, group.student, completion.tokens)
            with torch.no_grad():
                wanted = stock_logits(teacher, group.teacher, completion.tokens).numpy()
            result = evaluate(logits.detach().numpy(), wanted, completion.tokens, completion.logprobs, JSD)
            loss += float((weights * result.ratio * result.divergence).sum())
            logits.backward(torch.from_numpy(weights[:, None] * result.gradient))
    return loss, {name: parameter.grad.numpy() for name, parameter in student.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("again", [False, True])
def test_loss_and_every_gradient(case, expected, again):
    """Prompts of unequal lengths, images of unequal sizes and completions of unequal numbers in one call.

    Computed again in the backward: layers, and the segments of a delta net.
    """
    assert len({len(group.student) for group in case.groups}) == 3
    backend = clone(case.loaded, **({"checkpoint_above": 0, "delta_segment": 5} if again else {}))
    loss, gradients = expected
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(loss, rel=1e-5)
    found = backend.tensors("gradient")
    assert relative_error({name: found[name] for name in gradients}, gradients) < 1e-4
    without = found.keys() - gradients.keys()
    assert all(not found[name].any() for name in without)
    assert not any(not value.any() for value in gradients.values()), "a parameter without gradient proves nothing"


def test_score_is_the_stock_distribution(case):
    scored = clone(case.loaded).score(case.groups, JSD, top=3)
    student, teacher = case.stock(), case.stock("teacher")
    for group, row in zip(case.groups, scored, strict=True):
        for completion, one in zip(group.completions, row, strict=True):
            for model, prompt, logprobs, top in (
                (student, group.student, one.student_logprobs, one.student_top),
                (teacher, group.teacher, one.teacher_logprobs, one.teacher_top),
            ):
                wanted = distribution(model, prompt, completion.tokens)
                np.testing.assert_allclose(logprobs, wanted[range(len(completion)), completion.tokens], atol=case.near)
                np.testing.assert_allclose(top.logprobs, -np.sort(-wanted, -1)[:, :3], atol=case.near)


@pytest.mark.parametrize(("temperature", "policy"), [(1.0, "student"), (0.0, "teacher")])
def test_samples_are_the_stock_distributions(case, temperature, policy):
    """Longer than a window and a convolution, without a cache on the other side; likely tokens are banned."""
    model, length = case.stock(policy), 20
    prompts = [group.student for group in case.groups]
    first = [int(distribution(model, prompt, np.zeros(1, np.int32)).argmax()) for prompt in prompts]
    banned = sorted({*case.encoder.banned, *first[:2]})
    uniforms = np.random.default_rng(1).random((len(prompts), 2, length), dtype=np.float32)
    sampled = clone(case.loaded).sample(prompts, uniforms, Sampling(temperature, (), tuple(banned)), policy)
    for prompt, row, draws in zip(prompts, sampled, uniforms, strict=True):
        for completion, u in zip(row, draws, strict=True):
            logprobs = distribution(model, prompt, completion.tokens, banned)
            wanted = (np.cumsum(np.exp(logprobs), -1) > u[:, None]).argmax(-1) if temperature else logprobs.argmax(-1)
            np.testing.assert_array_equal(completion.tokens, wanted)
            np.testing.assert_allclose(completion.logprobs, logprobs[range(length), completion.tokens], atol=case.near)


def test_text_without_images(case):
    prompt = case.encoder.encode([], "What digit?")
    sampled = clone(case.loaded).sample([prompt], np.full((1, 1, 3), 0.5, np.float32), Sampling(1.0))[0][0]
    logprobs = distribution(case.stock(), prompt, sampled.tokens)
    np.testing.assert_allclose(sampled.logprobs, logprobs[range(3), sampled.tokens], atol=case.near)


def test_frozen_vision(case, expected):
    """Tower and projector keep still, and the rest has the gradient it had."""
    backend = opd_mlx.load(ModelOptions(case.folder, tune_vision=False))
    trained = backend.tensors("student").keys()
    frozen = case.loaded.tensors("student").keys() - trained
    assert frozen
    assert all(any(part in name for part in ("visual", "vision", "projector", "connector")) for name in frozen)
    assert not any(part in name for name in trained for part in ("visual", "vision", "projector", "connector"))
    whole = clone(case.loaded)
    whole._teacher = dict(whole._student)
    for one in (backend, whole):
        one.accumulate(case.groups, JSD)
    gradient = whole.tensors("gradient")
    assert backend._model.feature_cache._levels
    assert relative_error(backend.tensors("gradient"), {name: gradient[name] for name in trained}) < 1e-5


def test_a_checkpoint_and_the_export(case, tmp_path):
    """Names are transformers' own; the export has the source's, and loads in transformers with the same logits."""
    backend = clone(case.loaded)
    backend.accumulate(case.groups, JSD)
    backend.apply(Update(1e-2))
    backend.save(tmp_path / "state")
    again = opd_mlx.load(ModelOptions(case.folder))
    again.load(tmp_path / "state")
    for kind in ("student", "teacher"):
        found = again.tensors(kind)
        assert all(np.array_equal(value, found[name]) for name, value in backend.tensors(kind).items())
    backend.export(tmp_path / "out", "model")
    shapes = [
        {name: value.shape for name, value in load_file(folder / "model.safetensors").items()} for folder in (case.folder, tmp_path / "out")
    ]
    assert shapes[0] == shapes[1]
    architecture = type(case.stock())
    model, problems = architecture.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not any(problems[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    group, scored = case.groups[1], backend.score(case.groups[1:2], JSD)[0][1].student_logprobs
    tokens = group.completions[1].tokens
    wanted, before = (distribution(one, group.student, tokens) for one in (model, case.stock()))
    np.testing.assert_allclose(scored, wanted[range(len(tokens)), tokens], atol=case.near)
    assert np.abs(wanted - before).max() > 1e-2


def test_conformance(case):
    pairs = [(group.student, group.teacher) for group in case.groups]
    results = check(lambda: opd_mlx.load(ModelOptions(case.folder), mac(steps_ahead=1)), pairs, case.encoder.stop, case.encoder.banned)
    assert [str(result) for result in results if not result.passed] == []


def test_tiles_with_padding(tmp_path):
    """What a tile lacks is not attended to, and what it has is spread over all positions."""
    loaded = opd_mlx.load(ModelOptions(random_models.smolvlm(tmp_path)))
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    mask = np.ones((3, 32, 32), bool)
    mask[0, 24:] = mask[0, :, 16:] = mask[2, :, 8:] = False
    image = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    prompt = replace(
        PromptEncoder(tmp_path).encode([image], "What?"), images={"pixel_values": pixels, "pixel_attention_mask": mask}, key="padded"
    )
    with loaded._model.bound(loaded._student):
        (found,) = loaded._model.family.features(loaded._model.module, [prompt], loaded._model.device)
        found = np.array(found)
    model = transformers.Idefics3ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        out = model.model.get_image_features(torch.from_numpy(pixels).double()[None], torch.from_numpy(mask)[None])
    np.testing.assert_allclose(found, torch.cat(list(out.pooler_output)), atol=1e-5)


def test_half_precision(case, expected):
    """Near the exact gradient as a whole; and it stays half: nothing widens the rows. Transformers' own delta net is 0.34 away."""
    rough = case.near > 1e-4
    backend = opd_mlx.load(ModelOptions(case.folder, "bfloat16"))
    backend.load(case.state)
    loss, gradients = expected
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(loss, rel=0.1)
    found = backend.tensors("gradient")
    ours, theirs = (np.concatenate([values[name].ravel() for name in gradients]) for values in (found, gradients))
    assert 1e-4 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < (0.6 if rough else 0.2)
    batch = lay_out([group.student for group in case.groups], [[one.tokens for one in group.completions] for group in case.groups])
    with backend._model.bound(backend._student):
        assert hidden_states(backend._model, batch).dtype == mx.bfloat16
    sampled = backend.sample([case.groups[0].student], np.full((1, 2, 3), 0.5, np.float32), Sampling(1.0))[0][0]
    logprobs = distribution(case.stock(), case.groups[0].student, sampled.tokens)
    np.testing.assert_allclose(sampled.logprobs, logprobs[range(3), sampled.tokens], atol=0.8 if rough else 0.2)
