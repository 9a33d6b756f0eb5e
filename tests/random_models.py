"""Tiny models with random weights, in Hugging Face layout, that transformers and mlx-vlm both load.

Weights are scaled by fan-in, so that activations, logits and gradients are of order one and a wrong term cannot hide in zeros.
Numpy writes them: a test of the MLX backend needs no torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

import opd

SOURCE = Path(opd.__file__).parent / "tiny" / "model"
"""Tokenizer, chat template, preprocessor and special tokens come from here."""

WEIGHTS = {".safetensors", ".bin", ".md"}


def qwen3_vl(folder: Path, seed: int = 0, **sizes: int | bool) -> Path:
    """Writes a random Qwen3-VL checkpoint into `folder` and returns it.

    `sizes` and their defaults: hidden 48, layers 3, heads 4, kv_heads 2, head_dim 12, mlp 64, vision_hidden 32, vision_layers 3,
    vision_heads 2, vision_mlp 48, positions 64 (a square), patch 8, deepstack 1 (layers that feed the text), tied True.
    """
    size = {
        "hidden": 48, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 12, "mlp": 64, "vision_hidden": 32, "vision_layers": 3,
        "vision_heads": 2, "vision_mlp": 48, "positions": 64, "patch": 8, "deepstack": 1, "tied": True,
    }  # fmt: skip
    unknown = sizes.keys() - size.keys()
    assert not unknown, f"unknown sizes: {sorted(unknown)}"
    size |= sizes
    folder.mkdir(parents=True, exist_ok=True)
    for file in SOURCE.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS:
            shutil.copy(file, folder)
    config = _config(json.loads((SOURCE / "config.json").read_text()), size)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    rng = np.random.default_rng(seed)
    shapes = _shapes(size, config["text_config"]["vocab_size"])
    save_file({name: _values(rng, name, shape) for name, shape in shapes.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(source: dict, size: dict[str, int]) -> dict:
    """The source's config.json at other sizes, with the fields that mlx-vlm reads beside those that transformers reads."""
    third = size["head_dim"] // 6
    sections = {"mrope_section": [size["head_dim"] // 2 - 2 * third, third, third], "mrope_interleaved": True}
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
        "deepstack_visual_indexes": list(range(size["vision_layers"] - 1))[-size["deepstack"] :] if size["deepstack"] else [],
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
    mergers = {"model.visual.merger": vision} | {f"model.visual.deepstack_merger_list.{i}": 4 * vision for i in range(size["deepstack"])}
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
    """Fan-in scaled weights; norms about one; embeddings 0.3 and positions 0.2 as in a trained tiny model."""
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
