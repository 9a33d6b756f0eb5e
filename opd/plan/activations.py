"""What rows hold in a forward for its backward, by a backend's rough figures."""

from __future__ import annotations

from typing import NamedTuple

from opd.models.adapters import part_of_model
from opd.plan.shape import Shape, item_of
from opd.planner import Footprint, Rows
from opd.types import ModelOptions

FORWARD = 0.45
"""The share of a layer's activations that pass by in a forward without a backward."""


class Held(NamedTuple):
    """Bytes: `total`, what is held at the end of a forward; `layer`, what passes by in the backward
    of the widest layer; `forward`, what passes by in it where no backward follows."""

    total: float
    layer: float
    forward: float


def held_of(
    shape: Shape, options: ModelOptions, rows: Rows, rough: Footprint, recompute: bool = False
) -> Held:
    """What the rows hold; with `recompute` each layer's inputs, and one layer whole."""
    item, text = item_of(options), rows.kind != "patches"
    layers = shape.layers if text else shape.tower
    each = [rough.layer(one, rows) for one in layers]
    forward = FORWARD * max(kept for kept, _ in each)
    if rows.kind == "prompts" and not layers[-1].state:
        # The last layer gives of a prompt the keys and values for completions alone.
        each[-1] = (4.0 * item * rows.total * layers[-1].key, 0.0)
    layer = max(kept * recompute + passes for kept, passes in each)
    if recompute:
        width = sum(one.width for one in layers)
        cache = rows.count * shape.cache(rows.length, item) * (rows.kind == "prompts")
        total = float(rows.total * (rough.stream if text else item) * width + cache)
    else:
        adapted = sum(part_of_model(name) == "language" for name in shape.adapters(options)) * text
        narrow = item * adapted * (options.adapters.rank if options.adapters else 0)
        total = sum(kept for kept, _ in each) + rows.total * narrow
    if rows.kind == "completions":
        # The states of recurrences, and the rows that the head reads.
        total += rows.count * shape.cache(0, item) + 12 * rows.total * shape.table[1]
    return Held(total, layer, forward)
