"""Tiny models with random weights, in Hugging Face layout, that transformers and mlx-vlm both load.

Weights are scaled by fan-in, so that activations, logits and gradients are of order one and a wrong
term cannot hide in zeros. Numpy writes a Qwen3-VL, so that a test of the MLX backend needs no
torch; transformers writes the other families, as it writes published checkpoints.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import opd

SOURCE = Path(opd.__file__).parent / "tiny" / "model"
"""Tokenizer, chat template, preprocessor and special tokens come from here."""

WEIGHTS = {".safetensors", ".bin", ".md"}

Sizes: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Other sizes of a model that transformers writes: "text" and "vision", by the names of its
configuration."""

NONE: Sizes = {}


def qwen3_vl(folder: Path, seed: int = 0, **sizes: int | bool) -> Path:
    """Writes a random Qwen3-VL checkpoint into `folder` and returns it.

    `sizes` and their defaults: hidden 48, layers 3, heads 4, kv_heads 2, head_dim 12, mlp 64,
    vision_hidden 32, vision_layers 3, vision_heads 2, vision_mlp 48, positions 64 (a square), patch
    8, deepstack 1 (layers that feed the text), tied True, vocabulary 0 (as many as the tokenizer
    has).
    """
    size = {
        "hidden": 48,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 12,
        "mlp": 64,
        "vision_hidden": 32,
        "vision_layers": 3,
        "vision_heads": 2,
        "vision_mlp": 48,
        "positions": 64,
        "patch": 8,
        "deepstack": 1,
        "tied": True,
        "vocabulary": 0,
    }
    unknown = sizes.keys() - size.keys()
    assert not unknown, f"unknown sizes: {sorted(unknown)}"
    size |= sizes
    folder.mkdir(parents=True, exist_ok=True)
    for file in SOURCE.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS:
            shutil.copy(file, folder)
    config = _config(json.loads((SOURCE / "config.json").read_text()), size)
    config["text_config"]["vocab_size"] = size["vocabulary"] or config["text_config"]["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    rng = np.random.default_rng(seed)
    shapes = _shapes(size, config["text_config"]["vocab_size"])
    save_file(
        {name: _values(rng, name, shape) for name, shape in shapes.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def _config(source: dict, size: dict[str, int]) -> dict:
    """The source's config.json at other sizes, with the fields that mlx-vlm reads beside those that
    transformers reads."""
    third = size["head_dim"] // 6
    sections = {
        "mrope_section": [size["head_dim"] // 2 - 2 * third, third, third],
        "mrope_interleaved": True,
    }
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": source["text_config"]["vocab_size"],
        "hidden_size": size["hidden"],
        "intermediate_size": size["mlp"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["head_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", **sections},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **sections},
        "tie_word_embeddings": bool(size["tied"]),
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": size["vision_layers"],
        "hidden_size": size["vision_hidden"],
        "intermediate_size": size["vision_mlp"],
        "num_heads": size["vision_heads"],
        "num_position_embeddings": size["positions"],
        "patch_size": size["patch"],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "out_hidden_size": size["hidden"],
        "deepstack_visual_indexes": (
            list(range(size["vision_layers"] - 1))[-size["deepstack"] :]
            if size["deepstack"]
            else []
        ),
    }
    special = {key: value for key, value in source.items() if key.endswith("_token_id")}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float32",
        "tie_word_embeddings": bool(size["tied"]),
        **special,
        "text_config": text,
        "vision_config": vision,
    }


def _shapes(size: dict[str, int], vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inputs: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (out, inputs)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, width: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (width,)
        if bias:
            shapes[f"{name}.bias"] = (width,)

    hidden, vision = size["hidden"], size["vision_hidden"]
    shapes["model.visual.patch_embed.proj.weight"] = (vision, 3, 2, size["patch"], size["patch"])
    shapes["model.visual.patch_embed.proj.bias"] = (vision,)
    shapes["model.visual.pos_embed.weight"] = (size["positions"], vision)
    for i in range(size["vision_layers"]):
        block = f"model.visual.blocks.{i}"
        norm(f"{block}.norm1", vision, bias=True)
        norm(f"{block}.norm2", vision, bias=True)
        linear(f"{block}.attn.qkv", 3 * vision, vision, bias=True)
        linear(f"{block}.attn.proj", vision, vision, bias=True)
        linear(f"{block}.mlp.linear_fc1", size["vision_mlp"], vision, bias=True)
        linear(f"{block}.mlp.linear_fc2", vision, size["vision_mlp"], bias=True)
    mergers = {"model.visual.merger": vision} | {
        f"model.visual.deepstack_merger_list.{i}": 4 * vision for i in range(size["deepstack"])
    }
    for merger, width in mergers.items():
        norm(f"{merger}.norm", width, bias=True)
        linear(f"{merger}.linear_fc1", 4 * vision, 4 * vision, bias=True)
        linear(f"{merger}.linear_fc2", hidden, 4 * vision, bias=True)
    shapes["model.language_model.embed_tokens.weight"] = (vocabulary, hidden)
    for i in range(size["layers"]):
        layer = f"model.language_model.layers.{i}"
        linear(f"{layer}.self_attn.q_proj", size["heads"] * size["head_dim"], hidden)
        linear(f"{layer}.self_attn.k_proj", size["kv_heads"] * size["head_dim"], hidden)
        linear(f"{layer}.self_attn.v_proj", size["kv_heads"] * size["head_dim"], hidden)
        linear(f"{layer}.self_attn.o_proj", hidden, size["heads"] * size["head_dim"])
        norm(f"{layer}.self_attn.q_norm", size["head_dim"])
        norm(f"{layer}.self_attn.k_norm", size["head_dim"])
        linear(f"{layer}.mlp.gate_proj", size["mlp"], hidden)
        linear(f"{layer}.mlp.up_proj", size["mlp"], hidden)
        linear(f"{layer}.mlp.down_proj", hidden, size["mlp"])
        norm(f"{layer}.input_layernorm", hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
    norm("model.language_model.norm", hidden)
    if not size["tied"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Fan-in scaled weights; norms about one; embeddings 0.3 and positions 0.2 as in a trained tiny
    model."""
    values = rng.standard_normal(shape)
    if name.endswith(".bias"):
        values *= 0.1
    elif "norm" in name:
        values = 1.0 + 0.1 * values
    elif "pos_embed" in name:
        values *= 0.2
    elif "embed_tokens" in name or "lm_head" in name:
        values *= 0.3
    else:
        values /= np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def qwen2_5_vl(folder: Path, seed: int = 0, more: Sizes = NONE) -> Path:
    """A random Qwen2.5-VL: windows of 2 x 2 merged patches in all vision blocks but the last, mRoPE
    in chunks, biased projections."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes = {**TEXT, **more.get("text", {})}
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    rope = {
        "rope_type": "default",
        "mrope_section": [width // 2 - 2 * (width // 6), width // 6, width // 6],
    }
    text = {**TEXT, "rope_parameters": {**rope, "rope_theta": 10000.0}}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 32,
        "out_hidden_size": TEXT["hidden_size"],
        "fullatt_block_indexes": [2],
    }
    config = Qwen2_5_VLConfig(
        **_sized(text, vision, more), **_special_ids(), tie_word_embeddings=True
    )
    extra = {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", **rope}}
    return _write(
        folder,
        Qwen2_5_VLForConditionalGeneration,
        config,
        seed,
        text=extra,
        vision={"in_chans": 3, "spatial_patch_size": 8},
    )


def qwen3_5(folder: Path, seed: int = 0, more: Sizes = NONE) -> Path:
    """A random Qwen3.5: two layers of gated delta net, one of gated attention with a quarter of the
    width rotated, one of delta net."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }
    text = {
        **TEXT,
        "head_dim": 24,
        "num_hidden_layers": 4,
        "layer_types": [LINEAR, LINEAR, "full_attention", LINEAR],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": rope,
        "full_attention_interval": 3,
        "partial_rotary_factor": 0.25,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "num_position_embeddings": 64,
    }
    config = Qwen3_5Config(**_sized(text, vision, more), **_special_ids(), tie_word_embeddings=True)
    return _write(folder, Qwen3_5ForConditionalGeneration, config, seed)


def gemma3(folder: Path, seed: int = 0, more: Sizes = NONE) -> Path:
    """A random Gemma 3: two layers with a window of 16 tokens and one without; an image alone is 16
    tokens."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    _copy_texts(folder, GEMMA_TOKENS, GEMMA_TEMPLATE, "<bos>", "<end_of_turn>", **named)
    text = {
        **TEXT,
        "head_dim": 12,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 10,
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": _size(folder),
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "vision_use_head": False,
        "patch_size": 8,
    }
    ids = _ids(
        folder, **{key.replace("_token", "_token_index"): token for key, token in named.items()}
    )
    config = Gemma3Config(**_sized(text, vision, more), mm_tokens_per_image=16, **ids)
    processor = {
        "image_processor_type": "Gemma3ImageProcessor", "size": {"height": 64, "width": 64},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    extra = {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2}
    return _write(
        folder,
        Gemma3ForConditionalGeneration,
        config,
        seed,
        text=extra,
        rename=("vision_tower.", "vision_tower.vision_model."),
    )


def smolvlm(folder: Path, seed: int = 0, more: Sizes = NONE) -> Path:
    """A random SmolVLM (Idefics3): tiles of 32 x 32 pixels, 4 tokens each, after a shuffle of 2 x 2
    patches; a tied head."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    _copy_texts(folder, SMOL_TOKENS, SMOL_TEMPLATE, "<|im_start|>", "<end_of_utterance>")
    text = {
        **TEXT,
        "model_type": "llama",
        "head_dim": TEXT["hidden_size"] // 4,
        "vocab_size": _size(folder),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    ids = _ids(folder, image_token_id="<image>")
    config = Idefics3Config(
        **_sized(text, vision, more), scale_factor=2, tie_word_embeddings=True, **ids
    )
    processor = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 96},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return _write(
        folder, Idefics3ForConditionalGeneration, config, seed, text={"rope_theta": 10000.0}
    )


def llava(folder: Path, seed: int = 0) -> Path:
    """A random LLaVA, which has no family file: CLIP's last layer but one, without its class token,
    and a Llama; an image is 16 tokens."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    _copy_texts(folder, LLAVA_TOKENS, LLAVA_TEMPLATE, "<s>", "</s>")
    text = {**TEXT, "model_type": "llama", "head_dim": 12, "vocab_size": _size(folder)}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 32,
    }
    ids = _ids(folder, image_token_index="<image>")
    config = LlavaConfig(text_config=text, vision_config=vision, image_seq_length=16, **ids)
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    both = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(both))
    return _write(folder, LlavaForConditionalGeneration, config, seed)


def llava_next(folder: Path, seed: int = 0) -> Path:
    """A random LLaVA-NeXT: as LLaVA, and an image stands as a whole and in tiles of 32 x 32,
    without their padding."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    llava(folder, seed)
    shapes = [[32, 64], [64, 32], [64, 64]]
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "llava_next",
        "image_grid_pinpoints": shapes,
    }
    for name, change in (
        (
            "preprocessor_config.json",
            {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": shapes},
        ),
        ("processor_config.json", {"processor_class": "LlavaNextProcessor"}),
    ):
        (folder / name).write_text(
            json.dumps({**json.loads((folder / name).read_text()), **change})
        )
    return _write(
        folder, LlavaNextForConditionalGeneration, LlavaNextConfig.from_dict(config), seed
    )


def raise_norms(folder: Path) -> Path:
    """Norms of the text that multiply by their weights alone stand about 1, as trained ones do: so
    that logits are of order one."""
    weights = load_file(folder / "model.safetensors")
    if json.loads((folder / "config.json").read_text())["model_type"] in (
        "qwen2_5_vl",
        "idefics3",
        "llava",
    ):
        for name in weights:
            if "norm" in name and not any(part in name for part in ("vis", "connector")):
                weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FAMILIES = {
    "qwen3_vl": qwen3_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_5": qwen3_5,
    "gemma3": gemma3,
    "smolvlm": smolvlm,
}
"""A random model of every family, by a short name."""

LINEAR = "linear_attention"
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 346,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

GEMMA_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]
GEMMA_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}{{ '<start_of_turn>' + message.role + '\n' }}{%-"
    " for part in message.content -%}{{ '<start_of_image>' if part.type == 'image' else part.text |"
    " trim }}{%- endfor -%}{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{"
    " '<start_of_turn>model\n' }}{%- endif -%}"
)
SMOL_TOKENS = [
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
    ),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
SMOL_TEMPLATE = (
    "<|im_start|>{%- for message in messages -%}{{ message.role | capitalize }}{{ ':' if"
    " message.content[0].type == 'image' else ': ' }}{%- for part in message.content -%}{{"
    " '<image>' if part.type == 'image' else part.text }}{%- endfor -%}{{ '<end_of_utterance>\n'"
    " }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)
LLAVA_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
LLAVA_TEMPLATE = (
    "<s>{%- for message in messages -%}USER: {%- for part in message.content -%}{{ '<image>\n' if"
    " part.type == 'image' else part.text }}{%- endfor -%}{%- endfor -%}{{ ' ASSISTANT:' }}"
)


def _sized(text: dict[str, Any], vision: dict[str, Any], more: Sizes) -> dict[str, Any]:
    """Arguments of a configuration; a tower speaks to the text in its width."""
    text, vision = text | more.get("text", {}), vision | more.get("vision", {})
    return {
        "text_config": text,
        "vision_config": (
            vision
            | ({"out_hidden_size": text["hidden_size"]} if "out_hidden_size" in vision else {})
        ),
    }


def _special_ids() -> dict[str, int]:
    return {
        key: value
        for key, value in json.loads((SOURCE / "config.json").read_text()).items()
        if key.endswith("_token_id")
    }


def _copy_texts(
    folder: Path, special: list[str], template: str, begin: str, end: str, **named: str
) -> None:
    """A byte-level tokenizer with a family's own special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["What digit is on the red tile?\n\n", "The red tile shows 7.\n\n"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 300,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    names = {"bos_token": begin, "eos_token": end, "pad_token": special[0]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names, extra_special_tokens=named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_token_id})
    )


def _ids(folder: Path, **names: str) -> dict[str, int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {key: tokenizer.token_to_id(token) for key, token in names.items()}


def _size(folder: Path) -> int:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def _write(
    folder: Path,
    architecture: Any,
    config: Any,
    seed: int,
    text: Any = None,
    vision: Any = None,
    rename: tuple[str, str] = ("", ""),
) -> Path:
    """Saves a model with random weights, in the layout of published checkpoints where transformers
    writes another one.

    `text` and `vision`: what their config.json says besides; `rename`: a prefix of tensor names,
    and theirs.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        for file in SOURCE.iterdir():
            if file.is_file() and file.suffix not in WEIGHTS and file.name != "config.json":
                shutil.copy(file, folder)
    generation = (folder / "generation_config.json").read_text()
    model = architecture(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(random_values(rng, name, tuple(parameter.shape))))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        rename[1] + name.removeprefix(rename[0]) if name.startswith(rename[0]) else name: value
        for name, value in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(generation)
    written = json.loads((folder / "config.json").read_text())
    written["text_config"] |= text or {}
    written["vision_config"] |= vision or {}
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    return folder


def random_values(
    rng: np.random.Generator, name: str, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """As `_values`, for the names of all families: decays and gates of a delta net stay in their
    usual ranges."""
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.5, 4.0, shape)).astype(np.float32)
    if name.endswith("dt_bias"):
        return rng.uniform(-1.0, 1.0, shape).astype(np.float32)
    if "position_embedding" in name:
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)
    if "norm" in name and name.endswith("weight") and _centred(name):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if "projection_weight" in name:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
    return _values(rng, name, shape)


def _centred(name: str) -> bool:
    """Norms of Gemma 3 and Qwen3.5 multiply by 1 + weight; `random_values` cannot tell families
    apart, and both scales are good tests."""
    return "vision" not in name and "visual" not in name and "linear_attn" not in name
