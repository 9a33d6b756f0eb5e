"""A model without a family file, LLaVA, trained by rows: against its own processor's prompts and its own forward, in float64."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import transformers
from safetensors.numpy import load_file, save_file

import opd_torch
from opd.errors import ModelError
from opd.objective import Objective
from opd.testing import check
from opd.types import Completion, Group, ModelOptions, Prompt, Sampling, Update, VisualTokens
from tests.random_models import TEXT, _copy_texts, _ids, _size, _write
from tests.torch_cases import Case, clone, gradients_of, loss_of, plain_loss_and_gradients, relative_error, stock_logits

JSD = Objective(alpha=0.5, top_k=20)
SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
TEMPLATE = (
    "<s>{%- for message in messages -%}USER: {%- for part in message.content -%}"
    "{{ '<image>\n' if part.type == 'image' else part.text }}{%- endfor -%}{%- endfor -%}{{ ' ASSISTANT:' }}"
)


def llava(folder):
    """A random LLaVA: CLIP's last layer but one, without its class token, and a Llama."""
    folder.mkdir()
    _copy_texts(folder, SPECIAL, TEMPLATE, "<s>", "</s>")
    text = {**TEXT, "model_type": "llama", "head_dim": 12, "vocab_size": _size(folder)}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "projection_dim": 32,
    }  # fmt: skip
    ids = _ids(folder, image_token_index="<image>")
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_seq_length=16, **ids)
    return _write(folder, transformers.LlavaForConditionalGeneration, config, 0)


def encode(folder, images, question):
    """The model's own processor's prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(**size), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    found = processor(text=[text], images=images, add_special_tokens=False, return_tensors="np")
    tokens = np.asarray(found["input_ids"][0], np.int32)
    index = np.flatnonzero(tokens == SPECIAL.index("<image>")).astype(np.int32)
    assert len(index) == 16 * len(images)
    visual = VisualTokens(index, np.repeat(np.arange(len(images), dtype=np.int32), 16), np.zeros((len(index), 4), np.float32))
    arrays = {"pixel_values": np.asarray(found["pixel_values"], np.float32)}
    return Prompt(tokens, np.arange(len(tokens), dtype=np.int32)[None], arrays, str(hash(tokens.tobytes())), visual)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    folder, rng = llava(root / "model"), np.random.default_rng(0)
    prompts = [
        encode(folder, [Image.fromarray(rng.integers(0, 255, (40, 64, 3), np.uint8)) for _ in range(count)], question)
        for count, question in ((1, "What digit is on the red tile?"), (2, "digit?"), (1, "What?"))
    ]
    groups = []
    for index, lengths in enumerate([(5, 3, 7), (1, 4)]):
        tokens = [rng.integers(4, 250, length).astype(np.int32) for length in lengths]
        completions = tuple(Completion(one, rng.normal(-5, 1.5, len(one)).astype(np.float32), False) for one in tokens)
        weights = tuple(rng.uniform(0.01, 0.1, len(one)).astype(np.float32) for one in tokens)
        groups.append(Group(prompts[index], prompts[index + 1], completions, weights))
    opd_torch.load_cpu(ModelOptions(folder)).save(root / "state")
    teacher = load_file(root / "state" / "teacher.safetensors")
    moved = {name: value + rng.normal(0, 0.1 * value.std() + 1e-3, value.shape).astype(np.float32) for name, value in teacher.items()}
    save_file(moved, root / "state" / "teacher.safetensors", metadata={"format": "pt"})
    return Case(folder, None, groups, root / "state")


@pytest.fixture(scope="module")
def double(case):
    return case.backend()


def test_value_and_gradient(case, double):
    backend = clone(double)
    loss, gradients = plain_loss_and_gradients(case, case.groups, JSD)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(loss, rel=1e-6)
    assert relative_error(gradients_of(backend), gradients) < 1e-6
    # Nothing reads CLIP's last layer.
    assert {name.split(".")[2] for name in backend.tensors("student").keys() - gradients.keys()} <= {"encoder", "post_layernorm"}


@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_samples_are_the_stock_distributions(case, double, temperature):
    backend, model = clone(double), case.stock()
    prompts = [group.student for group in case.groups]
    uniforms = np.random.default_rng(1).random((2, 2, 6), dtype=np.float32)
    for prompt, row, draws in zip(prompts, backend.sample(prompts, uniforms, Sampling(temperature, (), (3,))), uniforms, strict=True):
        for completion, u in zip(row, draws, strict=True):
            with torch.no_grad():
                logits = stock_logits(model, prompt, completion.tokens).numpy() / (temperature or 1.0)
            logits[:, 3] = -np.inf
            probabilities = np.exp(logits - logits.max(-1, keepdims=True))
            probabilities /= probabilities.sum(-1, keepdims=True)
            wanted = (np.cumsum(probabilities, -1) > u[:, None]).argmax(-1) if temperature else probabilities.argmax(-1)
            np.testing.assert_array_equal(completion.tokens, wanted)
            np.testing.assert_allclose(completion.logprobs, np.log(probabilities[range(6), completion.tokens]), rtol=1e-5)


def test_conformance(case):
    pairs = [(group.student, group.teacher) for group in (*case.groups, case.groups[0])]
    results = check(lambda: opd_torch.load_cpu(ModelOptions(case.folder)), pairs, (2,), (3,))
    assert [str(result) for result in results if not result.passed] == []


def test_files(case, tmp_path):
    """An export has the published names, the source's configuration, and gives the trained logits in transformers."""
    backend = case.backend()
    backend.accumulate(case.groups, JSD)
    assert backend.apply(Update(1e-2)).taken
    backend.export(tmp_path / "out", "model")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", case.folder))
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    group = case.groups[0]
    with torch.no_grad():
        wanted = stock_logits(model, group.student, group.completions[0].tokens).log_softmax(-1)
    scored = backend.score([group], JSD)[0][0].student_logprobs
    np.testing.assert_allclose(scored, wanted[range(5), group.completions[0].tokens], rtol=1e-5)


def test_it_says_so(case, caplog):
    with caplog.at_level(logging.WARNING):
        opd_torch.load_cpu(ModelOptions(case.folder))
    assert "no family file for 'llava', so a group's completions run as separate rows" in caplog.text
    with pytest.raises(ModelError, match=r"set model\.vision=true"):
        opd_torch.load_cpu(ModelOptions(case.folder, tune_vision=False))


def test_logits_that_are_not_the_heads_product_are_refused(case, monkeypatch):
    real = transformers.LlavaForConditionalGeneration.forward

    def capped(self, *arguments, **options):
        out = real(self, *arguments, **options)
        out.logits = torch.tanh(out.logits)
        return out

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", capped)
    with pytest.raises(ModelError, match="more than its head's product"):
        opd_torch.load_cpu(ModelOptions(case.folder))


def test_missing_weights_are_refused(case, tmp_path):
    import shutil

    shutil.copytree(case.folder, tmp_path / "broken")
    weights = load_file(case.folder / "model.safetensors")
    weights.pop(next(name for name in weights if "mlp.up_proj" in name))
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((tmp_path / "broken" / "config.json").read_text())["model_type"] == "llava"
    with pytest.raises(ModelError, match=r"weights and config\.json do not fit: 1 tensors"):
        opd_torch.load_cpu(ModelOptions(tmp_path / "broken"))
