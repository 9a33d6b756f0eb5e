"""Prompts against the model's own processor, on folders as every version of transformers, and
mlx-vlm, lays them out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from opd.errors import ModelError
from opd.prompts.encoder import PromptEncoder
from opd.tiny import MODEL
from tests.support import random_models
from tests.support.layouts import (
    LAYOUTS,
    NAMED,
    PROCESSORS,
    TEXT_ALONE,
    read,
    stock,
    template,
    write,
)
from tests.support.prompt_cases import tokenizer_of

pytest.importorskip("torch")
# The stock processor leaves the files of additional_chat_templates open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

QUESTION = "What digit is on the red tile?"
WRITERS = {**random_models.FAMILIES, "idefics3": random_models.smolvlm}


@pytest.fixture(scope="module", params=PROCESSORS)
def source(request, tmp_path_factory):
    """A family's name, and its random model."""
    folder = WRITERS[request.param](tmp_path_factory.mktemp(request.param))
    write(folder / "config.json", read(folder / "config.json") | {"model_type": request.param})
    return request.param, folder


@pytest.fixture(params=LAYOUTS)
def laid_out(request, source, tmp_path):
    """A family's name, and its random model in one of the layouts."""
    kind, folder = source
    shutil.copytree(folder, tmp_path / "model")
    LAYOUTS[request.param](tmp_path / "model", kind)
    return kind, tmp_path / "model"


def noise(size, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def wanted(processor, images, question=QUESTION):
    content = [{"type": "image", "image": image} for image in images] + [
        {"type": "text", "text": question}
    ]
    options = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "np",
    }
    return processor.apply_chat_template([[{"role": "user", "content": content}]], **options)


def same(prompt, theirs):
    np.testing.assert_array_equal(prompt.tokens, theirs["input_ids"][0])
    assert prompt.images.keys() == theirs.keys() & {
        "pixel_values",
        "image_grid_thw",
        "pixel_attention_mask",
    }
    for key, value in prompt.images.items():
        np.testing.assert_array_equal(
            value, theirs[key][0] if value.ndim == theirs[key].ndim - 1 else theirs[key]
        )


def test_prompts_are_the_own_processors_in_every_layout(laid_out, monkeypatch, tmp_path):
    kind, folder = laid_out
    encoder, processor = PromptEncoder(folder), stock(folder, kind, monkeypatch)
    for images in ([noise((200, 50))], [noise((40, 40)), noise((120, 64), 1)], []):
        same(encoder.encode(images, QUESTION), wanted(processor, images))
    # What is exported serves the same prompt, by whatever place a program reads.
    encoder.save(folder)
    exported = stock(folder, kind, monkeypatch)
    chosen, named = exported.tokenizer.get_chat_template(), exported.chat_template
    assert (named["default"] if isinstance(named, dict) else named) == chosen
    held = [
        read(folder / name).get("chat_template")
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json")
    ]
    assert {one for one in held if one} <= {chosen}
    for one in (encoder, PromptEncoder(folder)):
        same(one.encode([noise((200, 50))], QUESTION), wanted(exported, [noise((200, 50))]))


MARKS = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer_config.json",
)


@pytest.mark.parametrize("missing", range(len(MARKS)))
def test_the_order_of_places_is_the_own_processors(source, tmp_path, monkeypatch, missing):
    """Another template in each place; the first `missing` places have none."""
    kind, folder = source
    shutil.copytree(folder, tmp_path / "model")
    LAYOUTS["4.52"](tmp_path / "model", kind)
    held = (tmp_path / "model/chat_template.jinja").read_text()
    for mark, name in enumerate(MARKS):
        path, text = tmp_path / "model" / name, f"{mark}{held}"
        if name.endswith(".jinja"):
            path.write_text(text) if mark >= missing else path.unlink()
        elif mark >= missing:
            write(path, read(path) | {"chat_template": text})
    encoder = PromptEncoder(tmp_path / "model")
    processor = stock(tmp_path / "model", kind, monkeypatch)
    if missing < 3:  # a processor without a template of its own has no use for its tokenizer's
        same(encoder.encode([noise((64, 64))], QUESTION), wanted(processor, [noise((64, 64))]))
    encoder.save(tmp_path / "model")
    for name in MARKS:  # programs differ in the place that they prefer
        path = tmp_path / "model" / name
        text = path.read_text() if name.endswith(".jinja") else read(path).get("chat_template")
        assert text in (None, f"{missing}{held}"), name
    processor = stock(tmp_path / "model", kind, monkeypatch)
    assert processor.chat_template == processor.tokenizer.get_chat_template() == f"{missing}{held}"


def test_templates_by_name_are_resolved_and_stay(source, tmp_path, monkeypatch):
    kind, folder = source
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    LAYOUTS["4.57"](model, kind)
    encoder = PromptEncoder(model)
    encoder.save(model)
    assert (model / "additional_chat_templates/tool_use.jinja").read_text() == TEXT_ALONE
    # An adapter is written into a folder without a tokenizer.
    (tmp_path / "adapter").mkdir()
    encoder.save(tmp_path / "adapter")
    assert (tmp_path / "adapter/additional_chat_templates/tool_use.jinja").read_text() == TEXT_ALONE
    write(model / "chat_template.json", {"chat_template": TEXT_ALONE})
    with pytest.raises(ModelError, match="conflicting files"):
        PromptEncoder(model)
    (model / "chat_template.json").unlink()
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="none of its chat templates is named 'default'"):
        PromptEncoder(model)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("form", [list, dict])
def test_one_file_may_hold_several_templates(tmp_path, name, form):
    """A list of names and templates, or a map: `default` is taken, and the others stay."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    named = {"tool_use": TEXT_ALONE, "default": template(model)}

    def formed():
        listed = [{"name": one, "template": text} for one, text in named.items()]
        return listed if form is list else dict(named)

    write(model / name, read(model / name) | {"chat_template": formed()})
    PromptEncoder(model).save(model)
    plain = tmp_path / "plain"
    shutil.copytree(MODEL, plain)
    PromptEncoder(plain).save(plain)
    named["default"] = template(plain)
    assert read(model / name)["chat_template"] == formed()


@pytest.mark.parametrize(
    "held", [3, [1], {"default": 3}, [{"name": "default"}], {"tools": "x"}], ids=str
)
def test_templates_of_other_types_are_one_line(tmp_path, held):
    random_models.qwen3_vl(tmp_path / "model")
    for name in ("chat_template.json", "processor_config.json"):
        write(tmp_path / "model" / name, {"chat_template": held})
        with pytest.raises(ModelError) as caught:
            PromptEncoder(tmp_path / "model")
        assert "\n" not in str(caught.value)
        (tmp_path / "model" / name).unlink()


def test_a_first_token_is_added_as_the_own_processor_adds_it(tmp_path, monkeypatch):
    """A tokenizer may put a token before every text; a template that writes the token itself must
    not have it twice."""
    folder = random_models.gemma3(tmp_path / "model")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    begin = next(token["id"] for token in tokens["added_tokens"] if token["content"] == "<bos>")
    tokens["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [begin], "tokens": ["<bos>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    LAYOUTS["5"](folder, "gemma3")
    for text in (
        (folder / "chat_template.jinja").read_text(),
        (folder / "chat_template.jinja").read_text().removeprefix("{{ bos_token }}"),
    ):
        (folder / "chat_template.jinja").write_text(text)
        prompt = PromptEncoder(folder).encode([noise((64, 64))], QUESTION)
        same(prompt, wanted(stock(folder, "gemma3", monkeypatch), [noise((64, 64))]))
        assert np.flatnonzero(prompt.tokens == begin).tolist() == [0]


@pytest.mark.parametrize("setting", [True, False])
def test_the_own_processor_reads_no_add_special_tokens(tmp_path, monkeypatch, setting):
    """Whether a first token is added needs no such setting: transformers loads no tokenizer whose
    file has one."""
    folder = random_models.gemma3(tmp_path / "model")
    LAYOUTS["5"](folder, "gemma3")
    settings = folder / "tokenizer_config.json"
    write(settings, read(settings) | {"add_special_tokens": setting})
    with pytest.raises(AttributeError, match="add_special_tokens conflicts with the method"):
        stock(folder, "gemma3", monkeypatch)
    with pytest.raises(ModelError, match="add_special_tokens conflicts") as caught:
        PromptEncoder(folder)
    assert "\n" not in str(caught.value)


def test_tokens_of_images_are_those_that_the_processor_names(tmp_path, monkeypatch):
    """Another spelling of every token of an image, in tokenizer, template and settings."""
    folder = random_models.gemma3(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        for usual in NAMED["gemma3"].values():
            text = text.replace(usual, usual.upper())
        (folder / name).write_text(text)
    prompt = PromptEncoder(folder).encode([noise((64, 64))], QUESTION)
    write(folder / "processor_config.json", {"image_seq_length": 16})
    same(prompt, wanted(stock(folder, "gemma3", monkeypatch), [noise((64, 64))]))
    assert len(prompt.visual.index) == 16


def test_an_old_file_without_a_template_is_one_line(tmp_path):
    """The file is there to hold the template, so a folder in which it does not was cut short."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    write(model / "chat_template.json", {"processor_class": PROCESSORS["qwen3_vl"]})
    with pytest.raises(ModelError) as caught:
        PromptEncoder(model)
    assert str(caught.value) == f"{model / 'chat_template.json'} has no chat_template"


@pytest.mark.parametrize(
    ("generation", "added"),
    [(None, []), ({}, []), (5, [5]), ([5, 4], [5, 4]), ("own", []), ([4, "own"], [4])],
    ids=str,
)
def test_completions_end_at_the_ids_of_both_files(tmp_path, generation, added):
    """The ids of generation_config.json first, then the tokenizer's own where it is not among
    them."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    own = tokenizer_of(model).eos_token_id
    file = model / "generation_config.json"
    if generation is None:
        file.unlink()
    else:
        named = [
            own if one == "own" else one
            for one in (generation if isinstance(generation, list) else [generation])
        ]
        write(
            file,
            (
                {}
                if generation == {}
                else {"eos_token_id": named if isinstance(generation, list) else named[0]}
            ),
        )
    assert PromptEncoder(model).stop == (*added, own)
