"""Idefics3 and SmolVLM: a Llama, and a SigLIP tower that sees an image in tiles and once more as a whole.

Source: `modeling_idefics3.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.types import Prompt
from opd_mlx.batch import Rule
from opd_mlx.families.qwen3_vl import head_counts
from opd_mlx.families.siglip import encode, tower_bytes
from opd_mlx.layers.attention import AttentionLayer, angles_at
from opd_mlx.layers.layer import KeysValues, Layer
from opd_mlx.vision import Piece, visual_features


class Idefics3:
    """See `Family`."""

    model_types = ("idefics3", "smolvlm")
    names: Mapping[str, str] = {
        "language_model.lm_head.": "lm_head.",
        "language_model.": "model.text_model.",
        "vision_model.": "model.vision_model.",
        "connector.": "model.connector.",
    }
    raised: tuple[str, ...] = ()
    vision = ("vision_model.", "connector.")

    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        """See `Family`. Raises ValueError where the text is none that this family computes."""
        from mlx_vlm.models.idefics3 import Model, ModelConfig, TextConfig, VisionConfig

        text, vision = config["text_config"], config["vision_config"]
        rope, width = text["rope_parameters"], text["hidden_size"] // text["num_attention_heads"]
        if (text.get("head_dim") or width) != width:
            raise ValueError(
                f"text_config.head_dim = {text['head_dim']} is not hidden_size / num_attention_heads; --backend cpu computes it"
            )
        args = TextConfig.from_dict({**text, "rope_theta": rope["rope_theta"]})
        towers = VisionConfig.from_dict({**vision, "model_type": "idefics3"})
        module = Model(ModelConfig(args, towers, "idefics3", scale_factor=config["scale_factor"]))
        module.vision_model.post_layernorm.eps = vision["layer_norm_eps"]
        if tied:
            module.language_model.pop("lm_head")
        return module

    def text(self, module: Any) -> Any:
        """See `Family`."""
        return module.language_model

    def layers(self, module: Any, config: Mapping[str, Any]) -> list[Layer]:
        """See `Family`."""
        return [AttentionLayer(layer, *head_counts(config), layer.self_attn.scale, Rule()) for layer in self.text(module).layers]

    def embed(self, module: Any, tokens: mx.array) -> mx.array:
        """See `Family`."""
        return cast("mx.array", module.language_model.embed_tokens(tokens))

    def angles(self, module: Any, positions: mx.array, dtype: mx.Dtype) -> tuple[KeysValues, ...]:
        """One kind."""
        args = module.config.text_config
        return (angles_at(positions[0], args.rope_theta, args.hidden_size // args.num_attention_heads, dtype),)

    def features(self, module: Any, prompts: Sequence[Prompt], again: float = 0) -> list[mx.array]:
        """See `Family`."""
        tower = module.vision_model
        side = tower.embeddings.patch_size

        def tiles(prompt: Prompt) -> list[Piece]:
            """Values [3, H, W] of each tile; its size is that in patches, and which of them are no padding."""
            masks = prompt.images["pixel_attention_mask"].astype(bool)
            count, height, width = masks.shape
            real = np.asarray(masks.reshape(count, height // side, side, width // side, side).any((2, 4)))
            return [((one.shape, one.tobytes()), tile) for one, tile in zip(real, prompt.images["pixel_values"], strict=True)]

        def run(found: NDArray[Any], size: tuple[tuple[int, int], bytes]) -> list[mx.array]:
            real = np.frombuffer(size[1], bool).reshape(size[0])
            places = _places(real, tower.embeddings.num_patches_per_side)
            keys = None if real.all() else np.flatnonzero(real).astype(np.int32)
            return [module.connector(encode(tower, found, again, places, keys))]

        return visual_features(prompts, tiles, run)

    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return dict(config)

    def vision_bytes(self, config: Mapping[str, Any], prompt: Prompt, itemsize: int) -> int:
        """See `Family`."""
        return tower_bytes(config, prompt, itemsize)


def _places(real: NDArray[np.bool_], side: int) -> NDArray[np.int32]:
    """Rows of the table of `side` x `side` positions for a tile's patches [L]; a smaller tile is spread over the whole table."""
    bounds = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    row, column = (
        np.searchsorted(bounds, np.minimum(np.arange(count, dtype=np.float32) * np.float32(1 / many), np.float32(1 - 1e-6)), "right")
        for count, many in zip(real.shape, (real[:, 0].sum(), real[0].sum()), strict=True)
    )
    return np.where(real, row[:, None] * side + column, 0).reshape(-1).astype(np.int32)
