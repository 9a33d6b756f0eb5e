"""Checkpoints and adapters by names of older transformers; tensors that nobody reads; quantised
weights; settings of PEFT."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file

from opd import registry
from opd.errors import ModelError
from opd.models import peft_files
from opd.models.choice import ModelChoice
from opd.models.names import current_name, is_left_out
from opd.prompts.processor import open_encoder
from opd.types import AdapterOptions, ModelOptions
from tests.support import random_models
from tests.support.adapter_cases import OPTIONS, language_layers, under_peft, write_adapter
from tests.support.stock_cases import copied, group_of, ours, stock, stock_model

BACKENDS = ("cpu", "mlx")

SPELLINGS = {
    "qwen2_5_vl": [{"model.visual.": "visual.", "model.language_model.": "model."}],  # before 4.52
    "gemma3": [
        {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.vision_model.",
            # 4.50, 4.51, and what is published
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
        {"model.vision_tower.": "model.vision_tower.vision_model."},  # 4.52 to 4.57
        {
            "model.language_model.": "language_model.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },  # a part of both
    ],
    "llava": [
        {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
        {"model.vision_tower.": "model.vision_tower.vision_model."},
    ],
}
"""By family: what writers of other versions say instead of what transformers says today."""

CASES = [
    (family, number) for family, spellings in SPELLINGS.items() for number in range(len(spellings))
]


def renamed(name: str, spelling: dict[str, str]) -> str:
    start = next((start for start in spelling if name.startswith(start)), "")
    return spelling.get(start, "") + name.removeprefix(start)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of every family by the names of today."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(family):
        if family not in made:
            folder = random_models.raise_norms(
                (random_models.FAMILIES | {"llava": random_models.llava})[family](root / family)
            )
            weights = {
                current_name(family, name): value
                for name, value in load_file(folder / "model.safetensors").items()
            }
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            made[family] = folder, group_of(folder)
        return made[family]

    return model


def rewritten(folder, out, change):
    """A copy whose weights `change` gives from those of the original."""
    copied(folder, out)
    save_file(
        change(load_file(folder / "model.safetensors")),
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return out


@pytest.mark.parametrize(("family", "number"), CASES)
def test_names_of_other_versions(models, tmp_path, family, number):
    """Loaded as stock transformers loads them, and exported by the names that the source had."""
    folder, group = models(family)
    spelling = SPELLINGS[family][number]
    older = rewritten(
        folder,
        tmp_path / "older",
        lambda weights: {renamed(name, spelling): value for name, value in weights.items()},
    )
    expected = stock(stock_model(folder), group)
    for name in BACKENDS if family != "llava" else ("cpu",):
        np.testing.assert_allclose(ours(name, older, group), expected, atol=5e-5, err_msg=name)
        if family != "llava":
            registry.load(name, ModelOptions(older)).export(tmp_path / name, "model")
            assert (
                load_file(tmp_path / name / "model.safetensors").keys()
                == load_file(older / "model.safetensors").keys()
            )


@pytest.mark.parametrize(("family", "number"), CASES)
def test_adapters_by_names_of_other_versions(models, tmp_path, family, number):
    """As peft has the same adapter by the names of today."""
    folder, group = models(family)
    spelling = SPELLINGS[family][number]
    layers = {
        f"model.language_model.layers.{i}.{name}": size
        for i in range(2)
        for name, size in (("self_attn.q_proj", (48, 48)), ("mlp.down_proj", (48, 64)))
    }
    if family == "qwen2_5_vl":
        layers["model.visual.blocks.0.attn.proj"] = (32, 32)
    elif family == "gemma3":
        layers["model.vision_tower.encoder.layers.0.mlp.fc1"] = (48, 32)
    adapter = write_adapter(tmp_path / "adapter", folder, layers)
    expected = stock(under_peft(stock_model(folder), adapter).double(), group)
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = peft_files.PREFIX
    older = {
        prefix + renamed(name.removeprefix(prefix), spelling): value
        for name, value in tensors.items()
    }
    assert spelling.keys().isdisjoint({"model.language_model."}) or older.keys() != tensors.keys()
    save_file(older, adapter / "adapter_model.safetensors")
    for name in BACKENDS if family != "llava" else ("cpu",):
        np.testing.assert_allclose(
            ours(name, folder, group, adapter=adapter), expected, atol=5e-5, err_msg=name
        )
        found = ours(name, folder, group, tune_vision=False, adapters=OPTIONS, adapter=adapter)
        np.testing.assert_allclose(found, expected, atol=5e-5, err_msg=name)


UNREAD = {
    "model.vision_tower.embeddings.position_ids": np.arange(64)[None],
    "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32),
    "model.language_model.rotary_emb.inv_freq": np.ones(6, np.float32),
    "model.language_model.rotary_emb_local.original_inv_freq": np.ones(6, np.float32),
    "v_head.summary.weight": np.ones((1, 48), np.float32),
    "v_head.summary.bias": np.ones(1, np.float32),
    "score.weight": np.ones((1, 48), np.float32),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("family", ["gemma3", "smolvlm"])
def test_tensors_that_nobody_reads_are_left_out_and_told(models, tmp_path, caplog, name, family):
    folder, group = models(family)
    more = rewritten(folder, tmp_path / "more", lambda weights: weights | UNREAD)
    np.testing.assert_array_equal(ours(name, more, group), ours(name, folder, group))
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == [
        f"{more}: 7 tensors are left out, since no forward reads them; the first is {min(UNREAD)}"
    ]
    registry.load(name, ModelOptions(more)).export(tmp_path / "out", "model")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(written[key], value) for key, value in UNREAD.items())


def test_a_name_in_todays_and_an_older_spelling(models, tmp_path):
    folder, _ = models("gemma3")
    key = "model.language_model.norm.weight"
    twice = rewritten(
        folder,
        tmp_path / "twice",
        lambda weights: weights | {"language_model.model.norm.weight": weights[key]},
    )
    for name in BACKENDS:
        with pytest.raises(ModelError, match="which are two names of one tensor"):
            registry.load(name, ModelOptions(twice))


def test_weights_and_their_buffers_are_told_apart():
    for name in (
        "model.visual.pos_embed.weight",
        "model.vision_tower.embeddings.position_embedding.weight",
        "lm_head.weight",
    ):
        assert not is_left_out("gemma3", name)
    assert is_left_out("qwen3_5", "mtp.fc.weight")
    assert not is_left_out("qwen3_vl", "mtp.fc.weight")


# Quantised weights.


def with_scale(weights, end, dtype, scale=".weight_scale"):
    """One layer's weight in another type, under another end of its name, with a scale beside."""
    name = next(
        name for name in weights if name.endswith("layers.0.mlp.up_proj.weight")
    ).removesuffix(".weight")
    value = weights.pop(f"{name}.weight")
    return weights | {f"{name}{end}": value.astype(dtype), f"{name}{scale}": np.ones(1, np.float32)}


@pytest.mark.parametrize(
    ("config", "change", "method"),
    [
        (
            {"quant_method": "awq", "bits": 4},
            lambda w: with_scale(w, ".qweight", np.int32, ".scales"),
            "awq",
        ),
        (
            {"quant_method": "gptq", "bits": 4},
            lambda w: with_scale(w, ".qweight", np.int32, ".g_idx"),
            "gptq",
        ),
        (
            {"quant_method": "fp8"},
            lambda w: with_scale(w, ".weight", np.float32, ".weight_scale_inv"),
            "fp8",
        ),
        (
            {"quant_method": "fbgemm_fp8"},
            lambda w: with_scale(w, ".weight", np.float32),
            "fbgemm_fp8",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            lambda w: with_scale(w, ".weight_packed", np.int32),
            "compressed-tensors, pack-quantized",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            lambda w: with_scale(w, ".weight", np.uint8, ".weight.absmax"),
            "bitsandbytes",
        ),
        ({"quant_method": "hqq"}, lambda w: with_scale(w, ".W_q", np.uint8, ".scale"), "hqq"),
        (None, lambda w: with_scale(w, ".qweight", np.int32, ".qzeros"), "gptq or awq"),
        (None, lambda w: with_scale(w, ".weight", np.int8, ".weight.SCB"), "bitsandbytes"),
        (
            None,
            lambda w: {
                name: value.astype(np.int8) if "up_proj" in name else value
                for name, value in w.items()
            },
            "I8, without scales",
        ),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_quantised_weights_are_named(models, tmp_path, name, config, change, method):
    folder, _ = models("qwen3_vl")
    out = rewritten(folder, tmp_path / "packed", change)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps(content | ({"quantization_config": config} if config else {}))
    )
    with pytest.raises(ModelError) as error:
        registry.load(name, ModelOptions(out))
    assert f"these weights are quantised ({method}; the first is " in str(error.value)
    assert "name the original model" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_without_scales(models, tmp_path, name, kind):
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    folder, _ = models("qwen3_vl")
    out = copied(folder, tmp_path / "out")
    weights = {
        key: value.to(kind) if "up_proj" in key else value
        for key, value in load(folder / "model.safetensors").items()
    }
    save(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError,
        match=r"these weights are quantised \(fp8, without scales; the first is .*up_proj.weight\)",
    ):
        registry.load(name, ModelOptions(out))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("key", "said", "method"),
    [
        ("quantization_config", {"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        (
            "quantization_config",
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes",
        ),
        ("text_config.quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization", {"group_size": 64, "bits": 4}, "mlx"),
        ("compression_config", {"format": "dense"}, "an unknown format"),
    ],
)
def test_a_left_over_setting_over_plain_weights(models, tmp_path, caplog, name, key, said, method):
    """Ignored, in one line; the export says no more that it is quantised."""
    folder, group = models("qwen3_vl")
    out = copied(folder, tmp_path / "left", **{key: said})
    np.testing.assert_array_equal(ours(name, out, group), ours(name, folder, group))
    told = [record.getMessage() for record in caplog.records if "quantised" in record.getMessage()]
    assert told == [
        f"{out / 'config.json'}: {key} says that the weights are quantised ({method}), but they are"
        " plain, so it is ignored"
    ]
    registry.load(name, ModelOptions(out)).export(tmp_path / "export", "model")
    assert "quantization" not in (tmp_path / "export" / "config.json").read_text()
    assert "compression" not in (tmp_path / "export" / "config.json").read_text()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "key", ["quantization_config", "quantization", "text_config.quantization_config"]
)
@pytest.mark.parametrize("said", ["int4", 4, ["awq"], False])
def test_a_quantisation_that_is_no_object(models, tmp_path, name, key, said):
    """No library reads one; encoder and backend name the key."""
    out = copied(models("qwen3_vl")[0], tmp_path / "odd", **{key: said})
    line = re.escape(
        f"{out / 'config.json'}: {key} is {json.dumps(said)}, not an object of settings; remove the"
        " key if"
    )
    with pytest.raises(ModelError, match=line):
        open_encoder(out)
    with pytest.raises(ModelError, match=line):
        registry.load(name, ModelOptions(out))


# What an adapter's files say.


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    folder, _ = models("qwen3_vl")
    return write_adapter(
        tmp_path_factory.mktemp("plain") / "adapter", folder, language_layers(layers=1)
    )


def with_settings(adapter, out, **settings):
    shutil.copytree(adapter, out)
    config = json.loads((out / peft_files.CONFIG).read_text())
    (out / peft_files.CONFIG).write_text(json.dumps(config | settings))
    return out


def other(value):
    """A value of a setting that is not its plain one."""
    return {
        bool: lambda: not value,
        int: lambda: value + 7,
        float: lambda: value + 0.5,
        str: lambda: f"{value}x",
    }.get(type(value), lambda: {"x": 1} if isinstance(value, dict) else ["x"])()


def test_every_setting_of_peft_is_known_or_refused(adapter, tmp_path):
    """Each on its own at another value: allowed are those of which peft itself computes the same
    adapter from the stored tensors."""
    import peft

    allowed = {*peft_files.SAME_FUNCTION, *peft_files.READ}
    settings = peft.LoraConfig().to_dict()
    assert settings.keys() >= {*peft_files.PLAIN}
    refused = set()
    for name, value in settings.items():
        if name in peft_files.READ:
            continue
        changed = with_settings(adapter, tmp_path / name, **{name: other(value)})
        if name in allowed:
            peft_files.read(changed)
        else:
            refused.add(name)
            with pytest.raises(
                ModelError, match=f"{name} = .* is not supported; only plain LoRA is"
            ):
                peft_files.read(changed)
    assert refused >= {
        *(
            "use_dora",
            "use_rslora",
            "alora_invocation_tokens",
            "use_qalora",
            "layer_replication",
            "lora_bias",
            "target_parameters",
        ),
        *(
            "trainable_token_indices",
            "modules_to_save",
            "bias",
            "fan_in_fan_out",
            "rank_pattern",
            "alpha_pattern",
            "megatron_config",
        ),
        *("velora_config", "monteclora_config", "kasa_config", "arrow_config", "use_bdlora"),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"init_lora_weights": kind}, f'init_lora_weights = "{kind}" is not supported')
            for kind in (
                "pissa",
                "pissa_niter_16",
                "olora",
                "loftq",
                "corda",
                "lora_ga",
                "something_new",
            )
        ),
        (
            {"use_rslroa": True},
            "use_rslroa = true is not supported; only plain LoRA is; did you mean 'use_rslora'?",
        ),
        ({"a_setting_of_2027": {"x": 1}}, 'a_setting_of_2027 = {"x": 1} is not supported'),
        ({"r": 0}, "r = 0 and lora_alpha = 9.0 are no rank and scale"),
        ({"lora_alpha": float("inf")}, "are no rank and scale"),
        ({"r": "3"}, "r and lora_alpha are not both numbers"),
    ],
)
def test_settings_that_change_the_function(adapter, tmp_path, settings, message):
    with pytest.raises(ModelError) as error:
        peft_files.read(with_settings(adapter, tmp_path / "changed", **settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": start} for start in peft_files.PLAIN_STARTS]
)
def test_starts_that_leave_the_base_alone(models, adapter, tmp_path, settings):
    """As peft computes the adapter as it is stored."""
    if settings["init_lora_weights"] == "eva":
        settings |= {"eva_config": {"rho": 2.0}}
    folder, group = models("qwen3_vl")
    if settings["init_lora_weights"] in ("orthogonal", "mica"):  # peft wants an even rank there
        adapter = write_adapter(
            tmp_path / "even", folder, language_layers(layers=1), options=AdapterOptions(4, 8.0)
        )
    changed = with_settings(adapter, tmp_path / "changed", **settings)
    expected = stock(under_peft(stock_model(folder).float(), changed), group)
    np.testing.assert_allclose(ours("cpu", folder, group, adapter=changed), expected, atol=1e-4)


LANGUAGE = "base_model.model.model.language_model"
UP = f"{LANGUAGE}.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: (
                t | {f"{LANGUAGE}.embed_tokens.lora_embedding_A": np.ones((3, 9), np.float32)}
            ),
            "it holds model.language_model.embed_tokens.lora_embedding_A",
        ),
        (
            lambda t: t | {f"{UP}.lora_magnitude_vector": np.ones(3, np.float32)},
            "it holds model.language_model.layers.0.mlp.up_proj.lora_magnitude_vector",
        ),
        (
            lambda t: t | {f"{UP}.lora_B.bias": np.ones(3, np.float32)},
            "it holds model.language_model.layers.0.mlp.up_proj.lora_B.bias",
        ),
        (
            lambda t: t | {"base_model.model.lm_head.weight": np.ones((3, 3), np.float32)},
            "it holds lm_head.weight",
        ),
        (
            lambda t: {
                name: value
                for name, value in t.items()
                if not name.endswith("q_proj.lora_B.weight")
            },
            "model.language_model.layers.0.self_attn.q_proj.lora_B.weight is missing",
        ),
        (
            lambda t: {
                name: value
                for name, value in t.items()
                if not name.endswith("q_proj.lora_A.weight")
            },
            "it holds model.language_model.layers.0.self_attn.q_proj.lora_B.weight",
        ),
        (
            lambda t: {name.replace("up_proj", "up_porj"): value for name, value in t.items()},
            (
                "no linear layer model.language_model.layers.0.mlp.up_porj; did you mean"
                " 'model.language_model.layers.0.mlp.up_proj'?"
            ),
        ),
        (
            lambda t: (
                t
                | {
                    f"base_model.model.lm_head.lora_{side}.weight": np.ones(shape, np.float32)
                    for side, shape in (("A", (3, 48)), ("B", (346, 3)))
                }
            ),
            "changes the head, lm_head",
        ),
    ],
)
def test_tensors_of_an_adapter_that_are_none_of_lora(models, adapter, tmp_path, change, message):
    folder, _ = models("qwen3_vl")
    out = with_settings(adapter, tmp_path / "changed")
    save_file(change(load_file(adapter / peft_files.WEIGHTS)), out / peft_files.WEIGHTS)
    for name in BACKENDS:
        with pytest.raises(ModelError) as error:
            registry.load(name, ModelOptions(folder, adapter=out))
        assert message in str(error.value), name
        assert "\n" not in str(error.value)


# model.base.


def test_another_base_for_an_adapter(models, adapter, tmp_path):
    folder, _ = models("qwen3_vl")
    for base in ("unsloth/Qwen3-VL-4B-Instruct-unsloth-bnb-4bit", "someone/Model-AWQ"):
        named = with_settings(
            adapter, tmp_path / base.partition("/")[2], base_model_name_or_path=base
        )
        with pytest.raises(
            ModelError,
            match=f"'{base}', holds quantised weights; name the original: --set model.base=",
        ) as error:
            ModelChoice(path=str(named)).folder()
        assert not str(error.value).lower().endswith(("bnb-4bit", "awq", "unsloth"))
        assert ModelChoice(path=str(named), base=str(folder)).folder() == folder
    gone = with_settings(
        adapter, tmp_path / "gone", base_model_name_or_path=str(tmp_path / "nowhere")
    )
    with pytest.raises(
        ModelError,
        match=r"its base is not here: .*no such folder.*; name another with --set model.base=",
    ):
        ModelChoice(path=str(gone)).folder()
    options = ModelChoice(path=str(gone), base=str(folder), tune="lora").options()
    assert (options.path, options.adapter) == (folder, gone)


def test_a_base_that_is_none(models, adapter, tmp_path):
    folder, _ = models("qwen3_vl")
    for path in (str(folder), "tiny", "org/model"):
        with pytest.raises(Exception, match=r"model.base = 'tiny': '.*' is no .*adapter") as error:
            ModelChoice(path=path, base="tiny").folder()
        assert type(error.value).__name__ == "RecipeError"
    itself = with_settings(
        adapter, tmp_path / "itself", base_model_name_or_path=str(tmp_path / "itself")
    )
    for choice in (ModelChoice(path=str(itself)), ModelChoice(path=str(adapter), base=str(itself))):
        with pytest.raises(
            ModelError, match="is an adapter itself; export it, and name the export"
        ):
            choice.folder()
