"""A model folder with random weights: the size and the speed of a model, without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from opd.models.files import SINGLE
from opd.models.inert import copy_files

BLOCK = 2**20
"""Random numbers, of which all weights are made."""


def write_random_model(source: Path, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes the data files of the model in `source` and weights of these `shapes` into `folder`.

    Weights are bfloat16: normal with a deviation of 1/50, norms 1, biases 0. Raises ModelError
    where a file of `source` cannot be read.
    """
    copy_files(source, folder)
    normal = np.random.default_rng(0).standard_normal(BLOCK, np.float32) / 50
    random, one, zero = normal.view(np.uint32) >> 16, np.array([0x3F80]), np.zeros(1)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            flat = one if "norm" in name and name.endswith("weight") else zero
            values = np.resize(random if len(shape) > 1 else flat, BLOCK).astype(np.uint16)
            for start in range(0, prod(shape), BLOCK):
                out.write(values[: prod(shape) - start].tobytes())
