"""Config, weights, tokenizer and image processor of a folder against one another: one line, before
anything is allocated."""

from __future__ import annotations

import json
import shutil
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

from opd.errors import DataError, ModelError
from opd.models import consistency
from opd.plan import read_config as read_plan_config
from opd.prompts.encoder import PromptEncoder
from opd.prompts.processor import needs_torchvision, open_encoder
from opd.tiny import MODEL
from opd_cli import main
from tests.support import random_models

DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CONFIG, IMAGES, TOKENS, GENERATION = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "generation_config.json",
)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def change(file, **values):
    """Sets values in a JSON file; `a__b` is b inside of a."""
    content = json.loads(file.read_text())
    for name, value in values.items():
        *path, last = name.split("__")
        inner = content
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    file.write_text(json.dumps(content))


def refused(folder):
    with pytest.raises(ModelError) as caught:
        open_encoder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_every_random_model_is_of_one_piece(tmp_path):
    pytest.importorskip("torch")
    for name, writer in {**random_models.FAMILIES, "llava": random_models.llava}.items():
        open_encoder(writer(tmp_path / name))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            IMAGES,
            {"patch_size": 16},
            (
                "preprocessor_config.json: patch_size is 16, but vision_config.patch_size in"
                " config.json is 8"
            ),
        ),
        (
            IMAGES,
            {"merge_size": 4},
            "merge_size is 4, but vision_config.spatial_merge_size in config.json is 2; the proc",
        ),
        (
            IMAGES,
            {"temporal_patch_size": 1},
            "temporal_patch_size is 1, but vision_config.temporal_patch_size in config.json is 2",
        ),
        (IMAGES, {"patch_size": -8}, "patch_size is -8, but"),
        (IMAGES, {"patch_size": 0}, "patch_size is 0, but"),
        (IMAGES, {"patch_size": 10**12}, "patch_size is 1000000000000, but"),
        (IMAGES, {"patch_size": "8"}, "preprocessor_config.json"),
        (IMAGES, {"image_mean": [0.5]}, "image_mean is [0.5], but images have 3 channels"),
        (
            IMAGES,
            {"image_std": [0.5] * 4},
            "image_std is [0.5, 0.5, 0.5, 0.5], but images have 3 channels",
        ),
        (IMAGES, {"image_mean": "half"}, "image_mean is 'half', but images have 3 channels"),
        (
            IMAGES,
            {"image_std": [0.5, 0.0, 0.5]},
            "image_std is [0.5, 0.0, 0.5], and pixels are divided by it",
        ),
        (
            IMAGES,
            {"size": {"shortest_edge": 10**12, "longest_edge": 10**13}},
            "size.longest_edge is",
        ),
        (
            IMAGES,
            {"size": {"shortest_edge": 2**30, "longest_edge": 2**31}},
            "size.shortest_edge is 1073741824, not a whole number between",
        ),
        (
            IMAGES,
            {"size": {"shortest_edge": -1, "longest_edge": 65536}},
            "size.shortest_edge is -1, not",
        ),
        (IMAGES, {"size": {"height": 4, "width": 4}}, "preprocessor_config.json"),
        (IMAGES, {"size": "large"}, "cannot be loaded"),
        (
            IMAGES,
            {"rescale_factor": "much"},
            "preprocessor_config.json: rescale_factor is 'much', not a number above 0",
        ),
        (
            IMAGES,
            {"rescale_factor": 0},
            "preprocessor_config.json: rescale_factor is 0, not a number above 0",
        ),
        (
            IMAGES,
            {"rescale_factor": True},
            "preprocessor_config.json: rescale_factor is True, not a number above 0",
        ),
        (
            IMAGES,
            {"do_resize": "false"},
            "preprocessor_config.json: do_resize is 'false', neither true nor false",
        ),
        (
            IMAGES,
            {"do_normalize": [None]},
            "preprocessor_config.json: do_normalize is [None], neither true nor false",
        ),
        (
            IMAGES,
            {"image_std": [0.5, -0.5, 0.5]},
            "image_std is [0.5, -0.5, 0.5], and pixels are divided by it",
        ),
        (IMAGES, {"image_processor_type": "Mine"}, "tokenizer or image processor cannot be loaded"),
        (IMAGES, {"resample": 99}, "preprocessor_config.json cannot be used"),
        (
            CONFIG,
            {"vision_config__patch_size": 16},
            "patch_size is 8, but vision_config.patch_size in config.json is 16",
        ),
        (CONFIG, {"vision_config__in_channels": 1}, "images have 1 channels"),
        (
            CONFIG,
            {"vision_config__depth": 0},
            "vision_config.depth is 0, not a whole number between 1 and 4,096",
        ),
        (
            CONFIG,
            {"vision_config__patch_size": "8"},
            "vision_config.patch_size is '8', not a whole number",
        ),
        (CONFIG, {"vision_config": [1]}, "config.json cannot be used"),
        (CONFIG, {"text_config": "large"}, "config.json cannot be used"),
        (
            CONFIG,
            {"text_config__num_hidden_layers": 10**9},
            "text_config.num_hidden_layers is 1000000000, not a whole number between",
        ),
        (
            CONFIG,
            {"text_config__num_hidden_layers": 4000},
            "config.json describes 4,000 layers, and the weights hold",
        ),
        (CONFIG, {"text_config__num_hidden_layers": -3}, "text_config.num_hidden_layers is -3"),
        (CONFIG, {"text_config__num_hidden_layers": 3.0}, "text_config.num_hidden_layers is 3.0"),
        (
            CONFIG,
            {"text_config__num_attention_heads": True},
            "text_config.num_attention_heads is True",
        ),
        (CONFIG, {"text_config__vocab_size": 10**12}, "text_config.vocab_size is 1000000000000"),
        (
            CONFIG,
            {"text_config__vocab_size": 999},
            "vocab_size is 999, but model.language_model.embed_tokens.weight in model.s",
        ),
        (
            CONFIG,
            {"text_config__hidden_size": 128},
            "hidden_size is 128, but model.language_model.embed_tokens.weight",
        ),
        (
            CONFIG,
            {"text_config__rms_norm_eps": 10**30},
            "text_config.rms_norm_eps is 1000000000000000000000000000000, which no model has",
        ),
        (
            CONFIG,
            {"text_config__rope_theta": float("inf")},
            "text_config.rope_theta is inf, which no model has",
        ),
        (
            CONFIG,
            {"image_token_id": 7},
            "config.json: image_token_id is 7, but the tokenizer's '<|image_pad|>' has the id 342",
        ),
        (
            CONFIG,
            {"image_token_id": "342"},
            "config.json cannot be used: Validation error for field 'image_token_id'",
        ),
        (
            CONFIG,
            {"vision_start_token_id": 340},
            "vision_start_token_id is 340, but the tokenizer's '<|vision_start|>' has the id 339",
        ),
        (
            CONFIG,
            {"video_token_id": 1},
            "video_token_id is 1, but the tokenizer's '<|video_pad|>' has the id 343",
        ),
        (
            CONFIG,
            {"eos_token_id": "<|im_end|>"},
            "config.json: eos_token_id holds '<|im_end|>'; it is the id of a token below 346",
        ),
        (CONFIG, {"text_config__eos_token_id": 346}, "config.json: eos_token_id holds 346"),
        (GENERATION, {"eos_token_id": "336"}, "generation_config.json: eos_token_id holds '336'"),
        (
            GENERATION,
            {"eos_token_id": [336, None]},
            "generation_config.json: eos_token_id holds None",
        ),
        (
            GENERATION,
            {"eos_token_id": [336, 9999]},
            "generation_config.json: eos_token_id holds 9999; it is the id of a token below 346",
        ),
        (GENERATION, {"eos_token_id": -1}, "generation_config.json: eos_token_id holds -1"),
        (GENERATION, {"eos_token_id": 336.0}, "generation_config.json: eos_token_id holds 336.0"),
        (
            GENERATION,
            {"eos_token_id": {"id": 336}},
            "generation_config.json: eos_token_id holds {'id': 336}",
        ),
        (GENERATION, {"eos_token_id": True}, "generation_config.json: eos_token_id holds True"),
        ("tokenizer_config.json", {"eos_token": 5}, ""),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, ""),
        ("tokenizer_config.json", {"additional_special_tokens": 5}, ""),
        ("tokenizer_config.json", {"chat_template": 5}, ""),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}, ""),
        (TOKENS, {"model": []}, "tokenizer or image processor cannot be loaded"),
        (TOKENS, {"added_tokens": {}}, "tokenizer or image processor cannot be loaded"),
        (TOKENS, {"model__vocab": {}}, ""),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_one_line(model, file, values, message):
    change(model / file, **values)
    assert message in refused(model)


@pytest.mark.parametrize("file", [CONFIG, IMAGES, TOKENS, GENERATION, "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", DEEP],
    ids=["nothing", "cut", "list", "bytes", "deep"],
)
def test_files_of_any_kind_are_one_line(model, file, content):
    (model / file).write_bytes(content)
    refused(model)


def add_token(model, token, number):
    content = json.loads((model / TOKENS).read_text())
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    content["added_tokens"].append({"id": number, "content": token, **flags})
    (model / TOKENS).write_text(json.dumps(content))


def test_a_token_beyond_the_embedding_is_named(model):
    add_token(model, "<|mine|>", 346)
    assert (
        "the tokenizer's token '<|mine|>' has the id 346, beyond the embedding's 346 rows"
        in refused(model)
    )
    add_token(model, "<|yours|>", 347)
    assert "has the id 346, and 1 more are, beyond" in refused(model)


def test_a_padding_token_beyond_the_embedding_is_allowed_until_a_question_has_it(model):
    add_token(model, "<|pad|>", 346)
    change(model / "tokenizer_config.json", pad_token="<|pad|>")
    encoder = open_encoder(model)
    with pytest.raises(
        DataError,
        match=r"the token '<\|pad\|>', whose id 346 is beyond the 346 rows of the embedding",
    ):
        encoder.encode([], "What is <|pad|>?")


def test_a_processor_that_fails_at_a_row_loses_the_row_alone(model):
    encoder = open_encoder(model)
    kinds = {
        ZeroDivisionError: DataError,
        AttributeError: DataError,
        MemoryError: MemoryError,
        KeyboardInterrupt: KeyboardInterrupt,
    }
    for kind, raised in kinds.items():
        image = Mock(size=(37, 41), width=37, height=41)
        image.resize.side_effect = kind("x\ny")
        with pytest.raises(raised) as caught:
            encoder.encode([image], "What?")
        image.resize.assert_called_once()
        assert raised is not DataError or "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "file", "values", "message"),
    [
        (
            "gemma3",
            IMAGES,
            {"size": {"height": 32, "width": 64}},
            "size.height is 32, but vision_config.image_size in config.json is 64",
        ),
        (
            "gemma3",
            "processor_config.json",
            {"image_seq_length": 256},
            "image_seq_length is 256, but mm_tokens_per_image in con",
        ),
        ("gemma3", CONFIG, {"image_token_index": 3}, "config.json: image_token_i"),
        (
            "gemma3",
            IMAGES,
            {"do_resize": False},
            "do_resize is False, which is not supported for this model; set it to true",
        ),
        (
            "gemma3",
            IMAGES,
            {"do_pan_and_scan": True},
            "do_pan_and_scan is True, which is not supported for this model",
        ),
        (
            "smolvlm",
            IMAGES,
            {"do_resize": False},
            "do_resize is False, which is not supported for this model",
        ),
        ("smolvlm", IMAGES, {"size": None}, "size.longest_edge is None, not a whole number"),
        (
            "smolvlm",
            IMAGES,
            {"max_image_size": 7},
            "max_image_size.longest_edge is None, but vision_config.image_size",
        ),
        (
            "smolvlm",
            IMAGES,
            {"max_image_size": {"longest_edge": 64}},
            "max_image_size.longest_edge is 64, but vision_config.image_size",
        ),
        (
            "smolvlm",
            IMAGES,
            {"size": {"longest_edge": 10**9}},
            "size.longest_edge is 1000000000, not a whole number between 1 and 16,384",
        ),
        (
            "smolvlm",
            "processor_config.json",
            {"image_seq_len": 169},
            "image_seq_len is 169, but (vision_config.image_size / patch_size /",
        ),
        (
            "qwen2_5_vl",
            IMAGES,
            {"patch_size": 16},
            "patch_size is 16, but vision_config.patch_size in config.json is",
        ),
        (
            "qwen3_5",
            IMAGES,
            {"merge_size": 4},
            "merge_size is 4, but vision_config.spatial_merge_size in config.json is 2",
        ),
        ("llava", CONFIG, {"image_token_index": 2}, ""),
    ],
)
def test_other_families(tmp_path, family, file, values, message):
    pytest.importorskip("torch")
    folder = {**random_models.FAMILIES, "llava": random_models.llava}[family](tmp_path / "model")
    if not (folder / file).is_file():
        (folder / file).write_text("{}")
    change(folder / file, **values)
    assert message in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "notes.md"])
def test_links_that_leave_the_folder_are_refused(model, tmp_path, name):
    outside = tmp_path / name
    shutil.copyfile(model / name if (model / name).is_file() else model / "config.json", outside)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    assert f"{model / name} is a link to {outside}, outside of the model folder" in refused(model)


def test_an_index_that_leaves_the_folder_is_refused(model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "model.safetensors")
    shutil.copyfile(tmp_path / "model.safetensors", model / "part.safetensors")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../model.safetensors"}})
    )
    assert "outside of the model folder" in refused(model)


NEEDS = [
    ("qwen2_5_vl", "Qwen2_5_VLProcessor"),
    ("smolvlm", "SmolVLMProcessor"),
    ("gemma3", ""),
    ("llava", ""),
    (None, ""),
]


@pytest.mark.parametrize(("family", "needs"), NEEDS)
def test_processors_that_need_torchvision_are_known(tmp_path, family, needs):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert needs_torchvision(tmp_path) == needs


def test_a_plan_refuses_absurd_sizes_before_it_adds_them_up(model):
    change(model / CONFIG, text_config__num_hidden_layers=10**9)
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000000"):
        read_plan_config(model)


def test_nothing_is_written_where_parts_do_not_fit(model, tmp_path):
    change(model / IMAGES, patch_size=16)
    done = CliRunner().invoke(
        main,
        [*"train tiny --backend cpu --model".split(), str(model), "--out", str(tmp_path / "run")],
    )
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.output
    assert not (tmp_path / "run").exists()


def test_a_model_that_states_little_is_completed(model):
    """Defaults of transformers count as stated: the tower computes with them."""
    content = json.loads((model / CONFIG).read_text())
    del content["vision_config"]["patch_size"]
    (model / CONFIG).write_text(json.dumps(content))
    assert "patch_size is 8, but vision_config.patch_size in config.json is 16" in refused(model)
    PromptEncoder(model)


BOUNDS = {
    "vocab_size": 2**24,
    "num_attention_heads": 2**16,
    "num_hidden_layers": 2**12,
    "num_channels": 2**8,
}


@pytest.mark.parametrize("section", ["", "text_config", "vision_config"])
@pytest.mark.parametrize(("key", "largest"), BOUNDS.items())
def test_sizes_reach_up_to_their_bounds(tmp_path, section, key, largest):
    for size in (1, largest):
        consistency.check_sizes(tmp_path, {section: {key: size}} if section else {key: size})
    for size in (0, largest + 1):
        with pytest.raises(
            ModelError, match=f"{key} is {size}, not a whole number between 1 and {largest:,}$"
        ):
            consistency.check_sizes(tmp_path, {section: {key: size}} if section else {key: size})


def test_other_numbers_reach_up_to_their_bounds(tmp_path):
    for number in (2**53, -(2**53)):
        consistency.check_sizes(tmp_path, {"scales": [1.0, number]})
    for number in (2**53 + 1, -(2**53) - 1):
        with pytest.raises(ModelError, match=r"scales\.1 is .*, which no model has"):
            consistency.check_sizes(tmp_path, {"scales": [1.0, number]})
    for edge in (1, 16384):
        consistency.check_edge(tmp_path, "size", edge, 16384)
    for edge in (0, 16385, True, 8.0):
        with pytest.raises(
            ModelError, match=f"size is {edge}, not a whole number between 1 and 16,384"
        ):
            consistency.check_edge(tmp_path, "size", edge, 16384)


@pytest.mark.parametrize("file", [CONFIG, GENERATION])
def test_the_last_row_of_the_embedding_may_end_a_completion(model, file):
    change(model / file, eos_token_id=[336, 345])
    assert (345 in open_encoder(model).stop) is (file == GENERATION)
    change(model / file, eos_token_id=[336, 346])
    assert f"{file}: eos_token_id holds 346; it is the id of a token below 346" in refused(model)
