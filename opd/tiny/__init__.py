"""A task and a model that are small enough to show the method on any machine: scenes of eight tiles
with digits, and a Qwen3-VL of 0.6M parameters.

The model almost always reads a digit on a crop, and about every other digit on the full image, so
there is a gap to close.
"""

from __future__ import annotations

from pathlib import Path

from opd.tiny.task import Scenes

MODEL = Path(__file__).parent / "model"
"""Folder of the embedded checkpoint, in Hugging Face layout, which
`examples/tiny_model/pretrain_tiny.py` wrote."""

__all__ = ["MODEL", "Scenes"]
