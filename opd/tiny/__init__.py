"""A task and a model small enough to prove the method on any machine: eight tiles with digits, and
a Qwen3-VL of 0.6M parameters.

The model reads a digit on a crop almost always, and on the full image about every other time, so
there is a gap to close.
"""

from __future__ import annotations

from pathlib import Path

from opd.tiny.task import Scenes

MODEL = Path(__file__).parent / "model"
"""Folder of the checkpoint, in Hugging Face layout; `examples/tiny_model/pretrain_tiny.py` made
it."""

__all__ = ["MODEL", "Scenes"]
