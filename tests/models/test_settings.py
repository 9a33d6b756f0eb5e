"""Every setting of every family's configuration: computed as stock transformers computes it,
harmless, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

import dataclasses

import transformers
from safetensors.numpy import load_file, save_file

from opd import registry
from opd.errors import ModelError
from opd.models import names, settings
from opd.objective import Objective
from opd.types import AdapterOptions, Completion, ModelOptions, Sampling
from tests.support import random_models
from tests.support.stock_cases import JSD, copied, group_of, ours, put, remade, stock, stock_model

FAMILIES = (*random_models.FAMILIES, "smolvlm2")
T, V, R = "text_config", "vision_config", "text_config.rope_parameters"
FULL, SLIDING = f"{R}.full_attention", f"{R}.sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def at(place, **values):
    return {f"{place}.{name}": value for name, value in values.items()}


SIZES = {**at(T, intermediate_size=80, num_key_value_heads=4, rms_norm_eps=1e-2, vocab_size=400)}
QWEN_SIZES = SIZES | at(V, depth=2, intermediate_size=40, num_heads=4)
SIGLIP_SIZES = SIZES | at(
    V, intermediate_size=40, num_attention_heads=4, num_hidden_layers=1, layer_norm_eps=1e-2
)

BOTH = {
    "qwen3_vl": [
        QWEN_SIZES
        | at(T, head_dim=24, num_hidden_layers=2)
        | at(R, rope_theta=500.0, mrope_section=[1, 2, 6])
        | at(V, num_position_embeddings=144, deepstack_visual_indexes=[1, 0])
        | {"tie_word_embeddings": False},
    ],
    "qwen2_5_vl": [
        QWEN_SIZES
        | at(V, window_size=64, fullatt_block_indexes=[0])
        | at(R, rope_theta=500.0, mrope_section=[1, 2, 3])
        | at(
            T,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ],
    "qwen3_5": [
        QWEN_SIZES
        | at(
            T,
            linear_conv_kernel_dim=3,
            linear_key_head_dim=10,
            linear_value_head_dim=6,
            linear_num_value_heads=6,
        )
        | at(R, rope_theta=500.0, partial_rotary_factor=0.5, mrope_section=[2, 2, 2])
        | at(V, num_position_embeddings=144)
        | at(
            T,
            layer_types=[
                "full_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
            ],
            attention_bias=True,
        ),
        at(R, partial_rotary_factor=0.5, mrope_section=[1, 3, 3]),
    ],
    "gemma3": [
        SIGLIP_SIZES
        | at(
            T,
            head_dim=16,
            query_pre_attn_scalar=33,
            sliding_window=5,
            layer_types=["full_attention"] + 2 * ["sliding_attention"],
        )
        | at(FULL, rope_type="linear", factor=8.0, rope_theta=300.0)
        | at(SLIDING, rope_type="linear", factor=2.0, rope_theta=70.0)
        | {"tie_word_embeddings": False, "vision_config.vision_use_head": True},
    ],
    "smolvlm": [SIGLIP_SIZES | at(R, rope_theta=500.0) | {"tie_word_embeddings": False}],
    "smolvlm2": [SIGLIP_SIZES | at(R, rope_theta=500.0)],
}
"""Settings that both backends compute, some together, each of which alone changes logits."""

TORCH = {
    "qwen3_vl": [
        at(T, hidden_act="gelu", attention_bias=True)
        | at(R, **YARN)
        | at(V, hidden_act="relu")
        | at(f"{V}.rope_parameters", rope_theta=500.0),
    ],
    "qwen2_5_vl": [
        at(R, **YARN, attention_factor=1.7) | at(V, hidden_act="gelu"),
        at(R, rope_type="linear", factor=4.0) | at(T, hidden_act="relu"),
    ],
    "qwen3_5": [
        at(T, hidden_act="gelu") | at(V, hidden_act="relu") | at(R, rope_type="linear", factor=4.0)
    ],
    "gemma3": [
        at(T, hidden_activation="silu", attention_bias=True)
        | at(V, hidden_act="relu")
        | at(FULL, **YARN)
        | at(SLIDING, **LLAMA3)
    ],
    "smolvlm": [
        at(T, hidden_act="gelu", attention_bias=True, mlp_bias=True)
        | at(V, hidden_act="relu")
        | at(R, **LLAMA3)
    ],
    "smolvlm2": [at(T, head_dim=16) | at(R, **YARN)],
}
"""Settings that torch computes and MLX refuses."""

NEITHER = {
    "qwen3_vl": [
        at(R, rope_type="dynamic", factor=4.0),
        at(R, partial_rotary_factor=0.5),
        at(R, mrope_section=[1, 1]),
        at(T, is_causal=False),
        at(V, in_channels=1),
        at(V, patch_size=[8, 8]),
        at(T, per_layer_config={"0": {"rms_norm_eps": 0.1}}),
        at(V, out_hidden_size=64),
        at(T, layer_types=["sliding_attention"] * 3),
    ],
    "qwen2_5_vl": [
        at(R, rope_type="dynamic", factor=4.0),
        at(T, head_dim=24),
        at(R, mrope_section=[2, 5, 5]),
        at(T, layer_types=["sliding_attention"] * 3),
        at(T, layer_types=["full_attention"]),
    ],
    "qwen3_5": [
        at(T, layer_types=["full_attention", "sliding_attention", "linear_attention", "mamba"]),
        at(R, rope_type="dynamic", factor=2.0),
    ],
    "gemma3": [
        at(T, attn_logit_softcapping=5.0),
        at(T, final_logit_softcapping=5.0),
        at(T, use_bidirectional_attention=True),
        at(FULL, rope_type="dynamic", factor=2.0),
        at(SLIDING, partial_rotary_factor=0.5),
        at(T, layer_types=["chunked_attention"] * 3),
    ],
    "smolvlm": [
        at(T, model_type="mistral"),
        at(T, model_type="qwen2"),
        at(R, rope_type="dynamic", factor=2.0),
        at(V, num_channels=1),
    ],
    "smolvlm2": [at(T, attention_chunk_size=4)],
}
"""Settings that neither backend computes."""

HARMLESS = {
    "_name_or_path": "else",
    "architectures": ["Else"],
    "transformers_version": "4.40.0",
    "output_hidden_states": True,
    "use_cache": False,
    "initializer_range": 0.5,
    "attention_dropout": 0.5,
    "max_position_embeddings": 8,
    "max_window_layers": 1,
    "pad_token_id": 3,
    "bos_token_id": 7,
    "eos_token_id": 9,
    "tokens_per_second": 9,
    "pretraining_tp": 2,
    "chunk_size_feed_forward": 2,
    "problem_type": "regression",
    "id2label": {"0": "x"},
    "label2id": {"x": 0},
    "return_dict": True,
    "video_token_id": 5,
    "is_encoder_decoder": False,
    "sliding_window_pattern": 9,
    # Read by mlx-vlm, and by nobody in transformers.
    "use_final_norm": False,
    "rope_traditional": True,
    "spatial_patch_size": 99,
    "in_chans": 4,
    "vision_feature_layer": 0,
    "skip_vision": True,
    "a_setting_of_2027": {"x": 1},
}
"""Settings that change nothing, written at every level at once."""


NEAR = {"qwen3_5": 1e-3}
"""Largest difference of a log-probability; see `tests.backends.mlx.test_families`."""

OPTIONS = AdapterOptions(rank=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of every family in which rotary positions are said once, its group, and what stock
    transformers says of it."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(family: str):
        if family not in made:
            folder = random_models.FAMILIES["smolvlm" if family == "smolvlm2" else family](
                root / family / "plain"
            )
            random_models.raise_norms(folder)
            content = json.loads((folder / "config.json").read_text())
            for name in (
                "rope_theta",
                "rope_scaling",
                "rope_local_base_freq",
                "partial_rotary_factor",
                "sliding_window_pattern",
            ):
                content["text_config"].pop(name, None)
            if family == "smolvlm2":
                content |= {
                    "model_type": "smolvlm",
                    "architectures": ["SmolVLMForConditionalGeneration"],
                }
                content["vision_config"]["model_type"] = "smolvlm_vision"
            (folder / "config.json").write_text(json.dumps(content))
            group = group_of(folder)
            made[family] = folder, group, stock(stock_model(folder), group)
        return made[family]

    return model


def each(table: dict[str, list[dict[str, object]]]):
    return [
        pytest.param(family, change, id=f"{family}-{number}")
        for family in table
        for number, change in enumerate(table[family])
    ]


@pytest.mark.parametrize(("family", "change"), each(BOTH))
def test_settings_that_both_backends_compute(models, tmp_path, family, change):
    folder, group, plain = models(family)
    out, model = remade(folder, tmp_path / "out", change)
    expected = stock(model, group)
    assert np.abs(expected - plain).max() > 0.01
    for name in ("cpu", "mlx"):
        np.testing.assert_allclose(
            ours(name, out, group), expected, atol=NEAR.get(family, 1e-4), err_msg=name
        )


@pytest.mark.parametrize(("family", "change"), each(TORCH))
def test_settings_that_torch_alone_computes(models, tmp_path, family, change):
    """And each of them alone is refused by MLX, which names it, and what does it."""
    folder, group, plain = models(family)
    out, model = remade(folder, tmp_path / "out", change)
    expected = stock(model, group)
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_allclose(ours("cpu", out, group), expected, atol=NEAR.get(family, 1e-4))
    with pytest.raises(ModelError, match=r"--backend cpu does$") as error:
        registry.load("mlx", ModelOptions(out))
    assert any(key in str(error.value) for key in change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "change"), each(NEITHER))
@pytest.mark.parametrize("name", ["cpu", "mlx"])
def test_settings_that_no_backend_computes(models, tmp_path, name, family, change):
    folder, _, _ = models(family)
    out = copied(folder, tmp_path / "out", **change)
    with pytest.raises(ModelError) as error:
        registry.load(name, ModelOptions(out))
    assert str(out) in str(error.value)
    told = ("layer_type", "model_type", "rope_type", *(key.rpartition(".")[2] for key in change))
    assert any(name in str(error.value) for name in told), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_harmless_changes_nothing(models, tmp_path, family):
    """Neither in stock transformers nor here."""
    folder, group, plain = models(family)
    changed = {
        f"{place}{name}": value
        for place in ("", "text_config.", "vision_config.")
        for name, value in HARMLESS.items()
    }
    out = copied(folder, tmp_path / "out", **changed)
    np.testing.assert_array_equal(stock(stock_model(out), group), plain)
    for name in ("cpu", "mlx"):
        np.testing.assert_allclose(
            ours(name, out, group), ours(name, folder, group), atol=1e-6, err_msg=name
        )


def configuration(folder: Path):
    return transformers.AutoConfig.from_pretrained(folder)


INNER = ("text_config", "vision_config", "rope_parameters", "full_attention", "sliding_attention")


def flat(config, place=""):
    """All settings by dotted key; a dictionary that is none of `INNER` is one setting."""
    found = {}
    for key, value in config.items():
        inner = isinstance(value, dict) and key in INNER
        found |= flat(value, f"{place}{key}.") if inner else {f"{place}{key}": value}
    return found


def other(value):
    """Another value of a setting."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}_2"
    return (
        [*value, "x"]
        if isinstance(value, list | tuple)
        else "x"
        if value is None
        else {**value, "x": 1}
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_every_setting_of_a_familys_class_is_in_the_table_or_harmless_or_refused(
    models, family, backend
):
    """So a setting that a later transformers adds is refused until somebody has read what it
    does."""
    folder, _, _ = models(family)
    found = configuration(folder)
    config, plain = found.to_dict(), settings.defaults(found)
    file = folder / "config.json"
    settings.check(config, plain, config, file, backend)
    table = settings.TABLE[config["model_type"]]
    for key in flat(plain):
        name = key.rpartition(".")[2]
        if name in settings.HARMLESS or key in settings.INNER_HARMLESS or key == "model_type":
            continue
        setting = table.get(key)
        if setting is not None and getattr(setting, backend) is None:
            continue
        changed = found.__class__.from_pretrained(folder).to_dict()
        put(changed, key, other(flat(config).get(key)))
        with pytest.raises(ModelError) as error:
            settings.check(changed, plain, config, file, backend)
        assert key in str(error.value)
    with pytest.raises(
        ModelError, match=f"{backend} backend does not compute text_config.a_new_one"
    ):
        settings.check(
            {**config, "text_config": {**config["text_config"], "a_new_one": 2}},
            {**plain, "text_config": {**plain["text_config"], "a_new_one": 1}},
            config,
            file,
            backend,
        )


def test_what_older_files_say_is_named_as_they_say_it(models, tmp_path):
    folder, _, _ = models("qwen2_5_vl")
    content = json.loads((folder / "config.json").read_text())
    sections = content["text_config"].pop("rope_parameters")["mrope_section"]
    content["text_config"]["rope_scaling"] = {
        "type": "yarn",
        "factor": 4.0,
        "mrope_section": sections,
    }
    out = copied(folder, tmp_path / "out", text_config=content["text_config"])
    with pytest.raises(
        ModelError,
        match=r'does not compute text_config.rope_scaling.type = "yarn"; --backend cpu does',
    ):
        registry.load("mlx", ModelOptions(out))


def test_a_setting_that_nobody_reads_is_told(models, tmp_path, caplog):
    folder, _, _ = models("qwen3_vl")
    out = copied(
        folder,
        tmp_path / "out",
        **{"text_config.attn_logit_softcapping": 5.0, "text_config.use_qk_norm": False},
    )
    registry.load("cpu", ModelOptions(out))
    told = [
        record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()
    ]
    assert told == [
        f"{out / 'config.json'}: text_config.attn_logit_softcapping = 5.0 has no effect: neither"
        " opd nor transformers reads it"
    ]


# Ties.


def with_head(folder, out, head, outer, inner, drop=""):
    """A copy whose file holds `head` (a function of the embedding), with what config.json says of
    ties outside and inside."""
    copied(folder, out, **{"tie_word_embeddings": outer, "text_config.tie_word_embeddings": inner})
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    if head is not None:
        weights["lm_head.weight"] = head(weights[name]).copy()
    if drop:
        weights.pop(name)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma3", "smolvlm"])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_head_in_the_file_is_used_as_stock_transformers_uses_it(
    models, tmp_path, family, outer, inner
):
    """Another head than the embedding, whatever config.json says; and it comes back from an
    export."""
    folder, group, _ = models(family)
    out = with_head(folder, tmp_path / "out", lambda embedding: embedding[::-1] * 1.5, outer, inner)
    expected = stock(stock_model(out), group)
    for name in ("cpu", "mlx"):
        np.testing.assert_allclose(ours(name, out, group), expected, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(
            ours(name, out, group, tune_vision=False, adapters=OPTIONS),
            expected,
            atol=1e-4,
            err_msg=f"{name}, adapters",
        )
    if outer and not inner:
        for name in ("cpu", "mlx"):
            registry.load(name, ModelOptions(out)).export(tmp_path / name, "model")
            found = load_file(tmp_path / name / "model.safetensors")
            np.testing.assert_array_equal(
                found["lm_head.weight"], load_file(out / "model.safetensors")["lm_head.weight"]
            )


@pytest.mark.parametrize("name", ["cpu", "mlx"])
def test_ties_with_one_of_the_two(models, tmp_path, name):
    """A copy of the embedding; the head alone, which is the embedding then; no head where weights
    are not tied."""
    folder, group, plain = models("qwen3_vl")
    copy = with_head(folder, tmp_path / "copy", lambda embedding: embedding, True, True)
    alone = with_head(
        folder, tmp_path / "alone", lambda embedding: embedding, True, True, drop="embedding"
    )
    for out in (copy, alone):
        np.testing.assert_allclose(ours(name, out, group), plain, atol=1e-4)
    registry.load(name, ModelOptions(alone)).export(tmp_path / "export", "model")
    assert (
        load_file(tmp_path / "export" / "model.safetensors").keys()
        == load_file(alone / "model.safetensors").keys()
    )
    none = with_head(folder, tmp_path / "none", None, False, True)
    with pytest.raises(ModelError, match=r"tensor lm_head.weight is missing"):
        registry.load(name, ModelOptions(none))


# Ids.


@pytest.mark.parametrize("name", ["cpu", "mlx"])
@pytest.mark.parametrize("beyond", [346, 100000, -1])
def test_a_token_beyond_the_embedding(models, name, beyond):
    folder, group, _ = models("qwen2_5_vl")
    backend = registry.load(name, ModelOptions(folder))
    tokens = group.student.tokens.copy()
    tokens[0] = beyond
    prompt = dataclasses.replace(group.student, tokens=tokens)
    completion = Completion(np.array([5, beyond, 6], np.int32), np.zeros(3, np.float32), False)
    ones = np.ones(3, np.float32)
    of_completion = dataclasses.replace(group, completions=(completion,), weights=(ones,))
    of_teacher = dataclasses.replace(group, teacher=prompt)
    for one in (of_completion, of_teacher):
        for verb in (backend.score, backend.accumulate):
            with pytest.raises(
                ModelError,
                match=f"token id {beyond} is beyond the model's embedding, which has 346 rows",
            ):
                verb([one], Objective(alpha=JSD.alpha, top_k=JSD.top_k))
    with pytest.raises(ModelError, match=f"token id {beyond} is beyond"):
        backend.sample([prompt], np.full((1, 1, 3), 0.5, np.float32), Sampling())


def test_names_are_todays_in_every_random_model(models):
    """So what `remade` writes is what it means."""
    for family in FAMILIES:
        folder, _, _ = models(family)
        kind = configuration(folder).model_type
        model = {name for name, _ in stock_model(folder).named_parameters()}
        assert model == {
            names.current_name(kind, name) for name in load_file(folder / "model.safetensors")
        }
