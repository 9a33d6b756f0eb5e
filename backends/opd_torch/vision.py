"""Computes the image features of many prompts.

Images of one size run together, prompts of equal key run once, and features of a frozen tower are
cached.

Legend: m images (or tiles) of one size, S visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.types import Prompt
from opd_torch.device import Device

Size: TypeAlias = tuple[int, int]
"""Rows and columns of an image, in patches or in pixels."""

ImageBatch: TypeAlias = list[tuple[Size, NDArray[np.generic]]]
"""A prompt's images in the order of their visual tokens: the size, and the array for the tower."""

Tower: TypeAlias = Callable[[Tensor, Size], list[Tensor]]
"""Computes features [m, tokens per image, width] for each level, from m images of one size."""

Shape: TypeAlias = tuple[Size, tuple[int, ...]]
"""The size of an image and the shape of the image's array; images with equal ones run together."""


def visual_features(
    prompts: Sequence[Prompt],
    images_of: Callable[[Prompt], ImageBatch],
    tower: Tower,
    device: Device,
) -> list[Tensor]:
    """Computes features [S, width] for each level of the `tower`, in the order of `prompts`.

    Prompts of equal key are computed once. The list is empty if no prompt has an image.
    """
    batches: dict[Shape, list[Tensor | NDArray[np.generic]]] = {}
    places: dict[str, list[tuple[Shape, int]]] = {}
    for prompt in prompts:
        if prompt.key in places or not len(prompt.visual.index):
            continue
        places[prompt.key] = []
        images = (
            _on_device(prompt, images_of, device) if device.uploaded_bytes else images_of(prompt)
        )
        for size, image in images:
            shape = size, tuple(image.shape)
            members = batches.setdefault(shape, [])
            places[prompt.key].append((shape, len(members)))
            members.append(image)
    outputs = {
        shape: tower(_stacked(members).to(device.torch), shape[0])
        for shape, members in batches.items()
    }
    wanted = [
        place for prompt in prompts if len(prompt.visual.index) for place in places[prompt.key]
    ]
    if not wanted:
        return []
    first = wanted[0][0]
    levels = range(len(outputs[first]))
    if len(batches) == 1 and [place for _, place in wanted] == list(range(len(batches[first]))):
        return [outputs[first][level].flatten(0, 1) for level in levels]
    return [
        torch.cat([outputs[shape][level][place] for shape, place in wanted]) for level in levels
    ]


_uploaded: dict[tuple[str, torch.device], list[tuple[Size, Tensor]]] = {}
"""Images on a device by the prompt's key, least recently used first."""


def _on_device(
    prompt: Prompt, images_of: Callable[[Prompt], ImageBatch], device: Device
) -> list[tuple[Size, Tensor]]:
    """Uploads a prompt's images to the device, or finds them there.

    Above `Device.uploaded_bytes` the least recently used images are dropped.
    """
    images = _uploaded.pop((prompt.key, device.torch), None)
    if images is None:
        images = [
            (size, torch.from_numpy(image.copy()).to(device.torch))
            for size, image in images_of(prompt)
        ]
    _uploaded[prompt.key, device.torch] = images
    over = sum(image.nbytes for uploaded in _uploaded.values() for _, image in uploaded)
    over -= device.uploaded_bytes
    for key in list(_uploaded)[:-1]:
        if over > 0:
            over -= sum(image.nbytes for _, image in _uploaded.pop(key))
    return images


def _stacked(images: Sequence[Tensor | NDArray[np.generic]]) -> Tensor:
    """Stacks images of one shape, which are all tensors or all arrays."""
    tensors = [image for image in images if isinstance(image, Tensor)]
    return torch.stack(tensors) if tensors else torch.from_numpy(np.stack(images))


class FeatureCache:
    """Caches the features of a frozen tower by the prompt's key, so that rollout, student and
    teacher compute them once.
    """

    def __init__(self, capacity: int) -> None:
        """Caches at most `capacity` bytes (`Device.feature_bytes`)."""
        self.capacity = capacity
        self._levels: dict[str, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all cached features."""
        return sum(level.nbytes for levels in self._levels.values() for level in levels)

    def features(
        self, prompts: Sequence[Prompt], compute: Callable[[Sequence[Prompt]], list[Tensor]]
    ) -> list[Tensor]:
        """Features [S, width] for each level; calls `compute` with the prompts that are not cached.

        Above the capacity the least recently used features are dropped first, then the newest.
        """
        wanted = {prompt.key: prompt for prompt in prompts if len(prompt.visual.index)}
        new = [prompt for key, prompt in wanted.items() if key not in self._levels]
        counts = [len(prompt.visual.index) for prompt in new]
        # Copies, because a view would keep the features of all prompts alive.
        parts = [
            [part.clone() for part in torch.split(level, counts)] if len(new) > 1 else [level]
            for level in compute(new)
        ]
        used = {key: self._levels.pop(key) for key in wanted if key in self._levels}
        computed = zip(new, zip(*parts, strict=True), strict=True)
        used |= {prompt.key: list(levels) for prompt, levels in computed}
        self._levels |= used
        over = self.nbytes - self.capacity
        for key in [*(key for key in self._levels if key not in wanted), *reversed(used)]:
            if over > 0:
                over -= sum(level.nbytes for level in self._levels.pop(key))
        each = [used[prompt.key] for prompt in prompts if prompt.key in used]
        return [torch.cat(level) for level in zip(*each, strict=True)]
