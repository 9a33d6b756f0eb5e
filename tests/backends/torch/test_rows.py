"""A model without a family file, LLaVA, trained by rows, from its files to its export: against its
own processor and forward."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import transformers
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import opd_torch
from opd.errors import BackendError, DataError, ModelError
from opd.models import adapters
from opd.objective import Objective
from opd.prompts.processor import ProcessorEncoder, open_encoder
from opd.testing.conformance import check
from opd.types import AdapterOptions, Completion, Group, ModelOptions, Sampling, Update
from opd_cli import main
from tests.support.adapter_cases import under_peft
from tests.support.prompt_cases import QUESTION, expected, tokenizer_of
from tests.support.random_models import llava, llava_next, raise_norms
from tests.support.torch_cases import (
    Case,
    loss_of,
    make_case,
    plain_loss_and_gradients,
    relative_error,
    stock_logits,
)

JSD = Objective(alpha=0.5, top_k=20)


def noise(*sizes):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
        for width, height in sizes
    ]


@pytest.mark.parametrize(
    "sizes", [[(64, 40)], [(32, 32)], [(7, 90)], [(33, 31), (200, 40)], [(40, 64)] * 3, []]
)
def test_prompts_are_its_own_processors(case, sizes):
    images = noise(*sizes)
    theirs = expected("llava", case.folder, images)
    tokens, prompt = theirs["input_ids"][0], case.encoder.encode(images, QUESTION)
    np.testing.assert_array_equal(prompt.tokens, tokens)
    np.testing.assert_array_equal(prompt.positions, np.arange(len(tokens))[None])
    assert prompt.images.keys() == ({"pixel_values"} if sizes else set())
    if sizes:
        np.testing.assert_array_equal(prompt.images["pixel_values"], theirs["pixel_values"])
    np.testing.assert_array_equal(prompt.visual.index, np.flatnonzero(tokens == 3))
    np.testing.assert_array_equal(prompt.visual.image, np.repeat(np.arange(len(sizes)), 16))
    np.testing.assert_array_equal(
        prompt.visual.boxes,
        np.repeat([(0, 0, *size) for size in sizes] or np.zeros((0, 4)), 16, axis=0),
    )
    assert (
        case.encoder.encode([*images[:-1], Image.new("RGB", (64, 40))], QUESTION).key != prompt.key
    )


def test_prompts_of_images_between_texts(case):
    images = noise((64, 40), (32, 48))
    text = "<s>USER:Left <image>\n or right <image>\n? ASSISTANT:"
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder)
    wanted = tokenizer(text.replace("<image>", "<image>" * 16), add_special_tokens=False)[
        "input_ids"
    ]
    prompt = case.encoder.encode(images, "Left <image> or right <image>?")
    np.testing.assert_array_equal(prompt.tokens, wanted)
    assert (case.encoder.stop, case.encoder.banned) == ((2,), (3,))
    assert case.encoder.decode([*tokenizer("seven")["input_ids"], 2]) == "seven"
    with pytest.raises(DataError, match="3 '<image>' markers for 2 images"):
        case.encoder.encode(images, "<image><image><image>?")


def test_images_that_touch_are_told_apart(case, tmp_path):
    shutil.copytree(case.folder, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<image>\n", "<image>"))
    prompt = ProcessorEncoder(tmp_path / "model").encode(
        noise((64, 40), (32, 48), (9, 9)), "digit?"
    )
    assert len(set(np.diff(prompt.visual.index))) == 1
    np.testing.assert_array_equal(prompt.visual.image, np.repeat([0, 1, 2], 16))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    folder, rng = llava(root / "model"), np.random.default_rng(0)
    encoder = ProcessorEncoder(folder)
    prompts = [
        encoder.encode(
            [Image.fromarray(rng.integers(0, 255, (40, 64, 3), np.uint8)) for _ in range(count)],
            question,
        )
        for count, question in ((1, "What digit is on the red tile?"), (2, "digit?"), (1, "What?"))
    ]
    groups = []
    for index, lengths in enumerate([(5, 3, 7), (1, 4)]):
        tokens = [rng.integers(4, 250, length).astype(np.int32) for length in lengths]
        completions = tuple(
            Completion(one, rng.normal(-5, 1.5, len(one)).astype(np.float32), False)
            for one in tokens
        )
        weights = tuple(rng.uniform(0.01, 0.1, len(one)).astype(np.float32) for one in tokens)
        groups.append(Group(prompts[index], prompts[index + 1], completions, weights))
    opd_torch.load_cpu(ModelOptions(folder)).save(root / "state")
    teacher = load_file(root / "state" / "teacher.safetensors")
    moved = {
        name: value + rng.normal(0, 0.1 * value.std() + 1e-3, value.shape).astype(np.float32)
        for name, value in teacher.items()
    }
    save_file(moved, root / "state" / "teacher.safetensors", metadata={"format": "pt"})
    return Case(folder, encoder, groups, root / "state")


@pytest.fixture(scope="module")
def double(case):
    return case.loaded()


def of_what_is_read(backend, gradients):
    """The gradient by the names of `gradients`; what nothing reads has none."""
    found = backend.tensors("gradient")
    assert not any(found[name].any() for name in found.keys() - gradients.keys())
    return {name: found[name] for name in gradients}


def test_value_and_gradient(case, double):
    backend = double.backend()
    loss, gradients = plain_loss_and_gradients(case, case.groups, JSD)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(
        loss, rel=1e-6
    )
    assert relative_error(of_what_is_read(backend, gradients), gradients) < 1e-6
    # Nothing reads CLIP's last layer.
    assert {
        name.split(".")[2] for name in backend.tensors("student").keys() - gradients.keys()
    } <= {"encoder", "post_layernorm"}


@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_samples_are_the_stock_distributions(case, double, temperature):
    backend, model = double.backend(), case.stock()
    prompts = [group.student for group in case.groups]
    uniforms = np.random.default_rng(1).random((2, 2, 6), dtype=np.float32)
    for prompt, row, draws in zip(
        prompts,
        backend.sample(prompts, uniforms, Sampling(temperature, (), (3,))),
        uniforms,
        strict=True,
    ):
        for completion, u in zip(row, draws, strict=True):
            with torch.no_grad():
                logits = stock_logits(model, prompt, completion.tokens).numpy() / (
                    temperature or 1.0
                )
            logits[:, 3] = -np.inf
            probabilities = np.exp(logits - logits.max(-1, keepdims=True))
            probabilities /= probabilities.sum(-1, keepdims=True)
            wanted = (
                (np.cumsum(probabilities, -1) > u[:, None]).argmax(-1)
                if temperature
                else probabilities.argmax(-1)
            )
            np.testing.assert_array_equal(completion.tokens, wanted)
            np.testing.assert_allclose(
                completion.logprobs, np.log(probabilities[range(6), completion.tokens]), rtol=1e-5
            )


def test_conformance(case):
    pairs = [(group.student, group.teacher) for group in (*case.groups, case.groups[0])]
    results = check(lambda: opd_torch.load_cpu(ModelOptions(case.folder)), pairs, (2,), (3,))
    assert [str(result) for result in results if not result.passed] == []


def test_files(case, tmp_path):
    """An export has the published names, the source's configuration, and gives the trained logits
    in transformers."""
    backend = case.backend()
    backend.accumulate(case.groups, JSD)
    assert backend.apply(Update(1e-2)).taken
    backend.export(tmp_path / "out", "model")
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", case.folder)
    )
    assert {name: value.dtype for name, value in ours.items()} == {
        name: value.dtype for name, value in theirs.items()
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        case.folder / "config.json"
    ).read_bytes()
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert not any(
        found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    group = case.groups[0]
    with torch.no_grad():
        wanted = stock_logits(model, group.student, group.completions[0].tokens).log_softmax(-1)
    scored = backend.score([group], JSD)[0][0].student_logprobs
    np.testing.assert_allclose(scored, wanted[range(5), group.completions[0].tokens], rtol=1e-5)


def test_it_says_so(case, caplog):
    with caplog.at_level(logging.WARNING):
        opd_torch.load_cpu(ModelOptions(case.folder))
    assert (
        "no family file for 'llava', so a group's completions run as separate rows" in caplog.text
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config.json": {"image_token_index": None}}, "no image_token_id"),
        (
            {"config.json": {"rope_parameters": {"mrope_section": [2, 2, 2]}}},
            "positions of several axes",
        ),
        (
            {
                "config.json": {"model_type": "llava_onevision"},
                "processor_config.json": {"processor_class": "LlavaOnevisionProcessor"},
                "video_preprocessor_config.json": {
                    "video_processor_type": "LlavaOnevisionVideoProcessor"
                },
            },
            "needs torchvision",
        ),
        (
            {"preprocessor_config.json": {"image_processor_type": "NoImageProcessor"}},
            "cannot be loaded",
        ),
        (
            {"processor_config.json": {"processor_class": "NoProcessor"}},
            "name no processor of images and text",
        ),
        ({"chat_template.jinja": None}, "neither processor nor tokenizer has a chat template"),
        ({"config.json": {"model_type": "no_model"}}, "model_type 'no_model' is not supported"),
    ],
)
def test_what_cannot_be_encoded_is_refused(case, tmp_path, change, says):
    shutil.copytree(case.folder, tmp_path / "model")
    for name, values in change.items():
        file = tmp_path / "model" / name
        if values is None:
            file.unlink()
            continue
        file.write_text(
            json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values})
        )
    with pytest.raises(ModelError) as refusal:
        open_encoder(tmp_path / "model")
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_bound_on_pixels_is_refused(case):
    with pytest.raises(
        ModelError,
        match=r"model\.max_pixels: models of type 'llava' have no file that says how to bound",
    ):
        open_encoder(case.folder, max_pixels=100)


def test_arrays_with_a_value_for_every_token_are_refused(case, monkeypatch):
    """As of PaliGemma, whose prompt sees itself in both directions and its answer does not."""
    encoder = ProcessorEncoder(case.folder)
    call = transformers.LlavaProcessor.__call__
    monkeypatch.setattr(
        transformers.LlavaProcessor,
        "__call__",
        lambda self, **given: call(self, **{**given, "return_mm_token_type_ids": True}),
    )
    with pytest.raises(
        ModelError,
        match=(
            "a value for every token as mm_token_type_ids, for which it needs a file in"
            " opd/prompts/families"
        ),
    ):
        encoder.encode(noise((64, 40)), "digit?")


def test_full_tuning_without_the_tower(case, double):
    """The tower and the projector stay; what trains has the gradient it has beside them."""
    backend = opd_torch.load_cpu(ModelOptions(case.folder, "float64", tune_vision=False))
    names = set(backend.tensors("student"))
    assert names == {
        name
        for name in double.model.parameters
        if "vision_tower" not in name and "projector" not in name
    }
    reference = opd_torch.load_cpu(ModelOptions(case.folder, "float64"))
    for one in (backend, reference):
        one.accumulate(case.groups, JSD)
    whole = reference.tensors("gradient")
    assert relative_error(backend.tensors("gradient"), {name: whole[name] for name in names}) < 1e-9


def test_adapters_go_to_the_language_model(case, tmp_path):
    """Trained adapters, and the model with them merged, are what peft and transformers make of
    them."""
    options = ModelOptions(
        case.folder, "float64", False, adapters=AdapterOptions(rank=3, alpha=9.0)
    )
    backend = opd_torch.load_cpu(options)
    layers = set(adapters.adapted_layers(backend.tensors("student")))
    assert len(layers) == 3 * 7
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    for _ in range(2):
        backend.accumulate(case.groups, JSD)
        assert backend.apply(Update(5e-2)).taken
    backend.export(tmp_path / "adapter", "adapter")
    backend.export(tmp_path / "merged", "model")
    load = partial(transformers.AutoModelForImageTextToText.from_pretrained, dtype=torch.float64)
    group, tokens = case.groups[0], case.groups[0].completions[0].tokens
    scored = backend.score([group], JSD)[0][0].student_logprobs
    for model in (
        under_peft(load(case.folder), tmp_path / "adapter").base_model.model,
        load(tmp_path / "merged"),
    ):
        with torch.no_grad():
            wanted = stock_logits(model, group.student, tokens).log_softmax(-1)
        np.testing.assert_allclose(scored, wanted[range(len(tokens)), tokens], rtol=1e-5)
    with torch.no_grad():
        before = stock_logits(load(case.folder), group.student, tokens).log_softmax(-1)
    assert np.abs(scored - before.numpy()[range(len(tokens)), tokens]).max() > 1e-2


def later(model, ids):
    """A stack whose first row sees the last."""
    out = real_hidden(model, **ids)
    out.last_hidden_state = out.last_hidden_state + out.last_hidden_state[:, -1:]
    return out


real_hidden = transformers.LlavaModel.forward


def backwards(model, **ids):
    """A stack that stretches the places it is told."""
    return real_hidden(
        model,
        **{
            **ids,
            **(
                {"position_ids": 3 * ids["position_ids"]}
                if ids.get("position_ids") is not None
                else {}
            ),
        },
    )


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda model, **ids: later(model, ids), "its tokens see later ones"),
        (backwards, "its positions do not count up"),
    ],
)
def test_models_that_rows_would_compute_otherwise_are_refused(case, monkeypatch, forward, says):
    monkeypatch.setattr(transformers.LlavaModel, "forward", forward)
    with pytest.raises(ModelError, match=says):
        opd_torch.load_cpu(ModelOptions(case.folder))


def test_models_with_positions_of_several_axes_are_refused(case, monkeypatch):
    monkeypatch.setattr(transformers.LlavaModel, "get_rope_index", lambda self: None, raising=False)
    with pytest.raises(ModelError, match="its positions have several axes"):
        opd_torch.load_cpu(ModelOptions(case.folder))


def test_code_of_a_repository_is_never_run(tmp_path, monkeypatch):
    """Even where somebody would say yes."""
    folder = llava(tmp_path / "model")
    config = json.loads((folder / "processor_config.json").read_text())
    own = {"processor_class": "Own", "auto_map": {"AutoProcessor": "processing_own.Own"}}
    (folder / "processor_config.json").write_text(json.dumps({**config, **own}))
    (folder / "processing_own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlavaProcessor as Own\n"
    )
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    with pytest.raises(
        ModelError, match="its own processor needs Python code of its own files, which is never run"
    ):
        open_encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_llava_next(tmp_path):
    """Whose images are tiles of many sizes: its own prompts, and its own distributions, with one
    image and with two."""
    case = make_case(tmp_path, raise_norms(llava_next(tmp_path / "model")))
    tokenizer = tokenizer_of(case.folder)
    processor = transformers.LlavaNextProcessor(
        transformers.AutoImageProcessor.from_pretrained(case.folder, backend="pil"),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    images = noise((64, 40), (120, 48))
    turn = [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": image} for image in images),
                {"type": "text", "text": QUESTION},
            ],
        }
    ]
    theirs = processor.apply_chat_template(
        [turn], tokenize=True, return_dict=True, return_tensors="np"
    )
    prompt = case.encoder.encode(images, QUESTION)
    np.testing.assert_array_equal(prompt.tokens, theirs["input_ids"][0])
    assert prompt.images.keys() == {"pixel_values", "image_sizes"}
    assert all(np.array_equal(value, theirs[name]) for name, value in prompt.images.items())
    assert all(count > 16 for count in np.bincount(prompt.visual.image))
    backend = case.backend()
    loss, gradients = plain_loss_and_gradients(case, case.groups, JSD)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(
        loss, rel=1e-6
    )
    assert relative_error(of_what_is_read(backend, gradients), gradients) < 1e-6
    frozen = opd_torch.load_cpu(ModelOptions(case.folder, tune_vision=False))
    assert not any(
        "image_newline" in name or "vision" in name for name in frozen.tensors("student")
    )


@pytest.fixture
def rows(tmp_path):
    """A few rows of data, one of them with two images."""
    lines = []
    for index, sizes in enumerate([[(64, 40)], [(48, 48), (80, 30)], [(90, 90)]]):
        names = [f"{index}-{number}.png" for number in range(len(sizes))]
        for name, image in zip(names, noise(*sizes), strict=True):
            image.save(tmp_path / name)
        lines.append(
            json.dumps(
                {
                    "images": names,
                    "question": "What digit is it?",
                    "boxes": [[4, 4, 30, 28]],
                    "answer": "7",
                }
            )
        )
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def opd(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_the_command_line_from_training_to_answers(case, rows, tmp_path):
    """With nothing said but the model, that is preset lora: adapters, the vision tower frozen."""
    few = (
        "--set rollout.prompts=2 --set rollout.completions=2 "
        "--set rollout.max_tokens=5 --set measure.max_tokens=5"
    ).split()
    run = tmp_path / "run"
    given = ["--backend", "cpu", "--data", rows, "--json", *few]
    summary = json.loads(
        opd("train", "--model", case.folder, "--steps", 2, "--out", run, *given).stdout
    )
    assert summary["steps"] == 2
    assert summary["before"]["full_accuracy"] >= 0
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (
        len(json.loads(opd("sample", "--model", run, "--count", 3, *given).stdout)["answers"]) == 3
    )
    assert json.loads(opd("gap", "--model", case.folder, *given).stdout)["gap"] is not None
    opd("export", run, "--out", tmp_path / "model", "--backend", "cpu")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float64
    )
    adapted = opd_torch.load_cpu(ModelOptions(case.folder, "float64", adapter=run / "adapter"))
    group, tokens = case.groups[0], case.groups[0].completions[0].tokens
    with torch.no_grad():
        wanted = stock_logits(model, group.student, tokens).log_softmax(-1)[
            range(len(tokens)), tokens
        ]
    np.testing.assert_allclose(
        adapted.score([group], JSD)[0][0].student_logprobs, wanted, rtol=1e-4
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (
        tokenizer.chat_template
        == transformers.AutoTokenizer.from_pretrained(case.folder).chat_template
    )


def test_all_weights_train_too(case, rows, tmp_path):
    few = (
        "--set rollout.prompts=2 --set rollout.completions=1 "
        "--set rollout.max_tokens=3 --set measure.count=0"
    ).split()
    given = [
        "--backend",
        "cpu",
        "--model",
        case.folder,
        "--data",
        rows,
        "--steps",
        1,
        "--out",
        tmp_path / "run",
    ]
    opd(
        "train",
        *given,
        *few,
        *"--set model.tune=full --set model.vision=false --set model.dtype=float32".split(),
    )
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "run" / "model", case.folder)
    )
    changed = {name for name, value in theirs.items() if not np.array_equal(ours[name], value)}
    assert changed
    assert not any("vision_tower" in name or "projector" in name for name in changed)


def test_mlx_refuses_it_before_weights_are_read(case, rows, tmp_path):
    pytest.importorskip("mlx.core")
    shutil.copytree(case.folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    result = opd(
        "train",
        "--model",
        tmp_path / "model",
        "--data",
        rows,
        "--backend",
        "mlx",
        "--out",
        tmp_path / "run",
        code=2,
    )
    assert (
        "the mlx backend has no file for models of type 'llava'; train it with --backend cuda"
        " or cpu" in result.stderr
    )
    assert not (tmp_path / "run").exists()


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
    shutil.copytree(case.folder, tmp_path / "broken")
    weights = load_file(case.folder / "model.safetensors")
    weights.pop(next(name for name in weights if "mlp.up_proj" in name))
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((tmp_path / "broken" / "config.json").read_text())["model_type"] == "llava"
    with pytest.raises(ModelError, match=r"weights and config\.json do not fit: 1 tensors"):
        opd_torch.load_cpu(ModelOptions(tmp_path / "broken"))


def test_where_it_looks_cannot_be_said(case):
    backend = opd_torch.load_cpu(ModelOptions(case.folder))
    assert not backend.attends
    with pytest.raises(BackendError, match="has no family file, so that its attention cannot be"):
        backend.attend([case.groups[0].student], [[]])
