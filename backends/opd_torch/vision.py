"""Image features of many prompts: images of one size run together, an image of two prompts once, and frozen towers remember.

Legend: m images (or tiles) of one size, S visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd.memory import feature_bytes, host_memory
from opd.types import Prompt

Size: TypeAlias = tuple[int, int]
"""Rows and columns, of patches or of pixels."""

Frames: TypeAlias = list[tuple[Size, NDArray[np.generic]]]
"""A prompt's images as the tower takes them, in the order of their visual tokens, with the size that decides which run together."""

Batch: TypeAlias = tuple[Size, tuple[int, ...]]
"""Images that run together are of one size, and their arrays of one shape."""

UPLOADED_BYTES = 2**29
"""Images that stay on a GPU between the passes of a step, so that no pass waits for the host to cut and copy them."""


def visual_features(
    prompts: Sequence[Prompt], frames: Callable[[Prompt], Frames], tower: Callable[[Tensor, Size], list[Tensor]], device: torch.device
) -> list[Tensor]:
    """Features [S, width] of all visual tokens in the order of `prompts`, of each level that `tower` gives.

    `tower` takes m images of one size and gives [m, tokens of each, width] of each level. Prompts of equal key are computed once.
    Empty where no prompt has an image.
    """
    images: dict[Batch, list[Any]] = {}
    places: dict[str, list[tuple[Batch, int]]] = {}
    for prompt in prompts:
        if prompt.key not in places and len(prompt.visual.index):
            places[prompt.key] = []
            for size, image in _on_device(prompt, frames, device) if stays(device) else frames(prompt):
                its = size, tuple(image.shape)
                members = images.setdefault(its, [])
                places[prompt.key].append((its, len(members)))
                members.append(image)
    outputs = {its: tower(_stacked(members).to(device), its[0]) for its, members in images.items()}
    wanted = [place for prompt in prompts if len(prompt.visual.index) for place in places[prompt.key]]
    if not wanted:
        return []
    levels = range(len(outputs[wanted[0][0]]))
    if len(images) == 1 and [place for _, place in wanted] == list(range(len(images[wanted[0][0]]))):
        return [outputs[wanted[0][0]][level].flatten(0, 1) for level in levels]
    return [torch.cat([outputs[its][level][place] for its, place in wanted]) for level in levels]


def stays(device: torch.device) -> bool:
    """Whether images stay on a device: where they are copies."""
    return bool(device.type == "cuda")


_uploaded: dict[tuple[str, torch.device], list[tuple[Size, Tensor]]] = {}


def _on_device(prompt: Prompt, frames: Callable[[Prompt], Frames], device: torch.device) -> list[tuple[Size, Tensor]]:
    """`frames` of a prompt, from memory where they are there; the oldest are forgotten above UPLOADED_BYTES."""
    found = _uploaded.pop((prompt.key, device), None)
    if found is None:
        found = [(size, torch.from_numpy(image.copy()).to(device)) for size, image in frames(prompt)]
    _uploaded[prompt.key, device] = found
    spare = sum(image.nbytes for its in _uploaded.values() for _, image in its) - UPLOADED_BYTES
    for key in list(_uploaded)[:-1]:
        if spare > 0:
            spare -= sum(image.nbytes for _, image in _uploaded.pop(key))
    return found


def _stacked(images: list[Any]) -> Tensor:
    """Images of one shape as one tensor, from tensors or arrays."""
    return torch.stack(images) if isinstance(images[0], Tensor) else torch.from_numpy(np.stack(images))


class KnownFeatures:
    """Features of a frozen tower, by the prompt's key: computed once for rollout, student and teacher."""

    def __init__(self, room: int) -> None:
        """Keeps at most `room` bytes; see `opd.memory.feature_bytes`."""
        self.room = room
        self._levels: dict[str, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(level.nbytes for levels in self._levels.values() for level in levels)

    def features(self, prompts: Sequence[Prompt], compute: Callable[[Sequence[Prompt]], list[Tensor]]) -> list[Tensor]:
        """What `compute` gives, from memory where it is there; above the room the oldest are forgotten, and then what came last."""
        wanted = {prompt.key: prompt for prompt in prompts if len(prompt.visual.index)}
        new = [prompt for key, prompt in wanted.items() if key not in self._levels]
        counts = [len(prompt.visual.index) for prompt in new]
        # Copies, since a part of an array keeps all of it.
        cut = [[part.clone() for part in level.split(counts)] if len(new) > 1 else [level] for level in compute(new)]
        found = {key: self._levels.pop(key) for key in wanted if key in self._levels}
        found |= {prompt.key: list(levels) for prompt, levels in zip(new, zip(*cut, strict=True), strict=True)}
        self._levels |= found
        spare = self.nbytes - self.room
        for key in [*(key for key in self._levels if key not in wanted), *reversed(found)]:
            if spare > 0:
                spare -= sum(level.nbytes for level in self._levels.pop(key))
        each = [found[prompt.key] for prompt in prompts if prompt.key in found]
        return [torch.cat(level) for level in zip(*each, strict=True)]


def feature_room(device: torch.device) -> int:
    """Bytes of features that are kept on a device; see `opd.memory.feature_bytes`."""
    return feature_bytes(torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory())


def computed(again: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function`, and in the backward once more instead of keeping its activations, if `again`."""
    return checkpoint(function, *arguments, use_reentrant=False) if again and torch.is_grad_enabled() else function(*arguments)
