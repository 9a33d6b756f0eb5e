"""What only the MLX backend has to show of its families: padded tiles, and rows that stay half."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

import transformers
from PIL import Image

from opd.prompts.processor import open_encoder
from opd.types import ModelOptions
from opd_mlx.batch import lay_out
from opd_mlx.forward import hidden_states
from tests.support import random_models
from tests.support.mlx_cases import make_case, opened


@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_rows_stay_half(family, tmp_path):
    """In a bfloat16 model nothing widens them."""
    case = make_case(tmp_path, random_models.FAMILIES[family](tmp_path / "model"))
    loaded = opened(ModelOptions(case.folder, "bfloat16"))
    prompts = [group.student for group in case.groups]
    batch = lay_out(prompts, [[one.tokens for one in group.completions] for group in case.groups])
    with loaded.model.bound(loaded.student):
        assert hidden_states(loaded.model, batch).dtype == mx.bfloat16


def test_tiles_with_padding(tmp_path):
    """What a tile lacks is not attended to, and what it has is spread over all positions."""
    loaded = opened(ModelOptions(random_models.smolvlm(tmp_path)))
    computes = loaded.model
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    mask = np.ones((3, 32, 32), bool)
    mask[0, 24:] = mask[0, :, 16:] = mask[2, :, 8:] = False
    image = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    images = {"pixel_values": pixels, "pixel_attention_mask": mask}
    prompt = open_encoder(tmp_path).encode([image], "What?")
    prompt = replace(prompt, images=images, key="padded")
    with computes.bound(loaded.student):
        (found,) = computes.family.features(computes.module, [prompt], computes.device)
        found = np.array(found)
    architecture = transformers.Idefics3ForConditionalGeneration
    model = architecture.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        given = torch.from_numpy(pixels).double()[None], torch.from_numpy(mask)[None]
        out = model.model.get_image_features(*given)
    np.testing.assert_allclose(found, torch.cat(list(out.pooler_output)), atol=1e-5)
