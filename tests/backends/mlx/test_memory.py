"""What the MLX backend's head stage allocates: some chunk buffers, whatever the number of rows; and
prompt rows never meet it."""

from __future__ import annotations

import gc

import pytest

mx = pytest.importorskip("mlx.core")

from opd.objective import Objective
from opd_mlx.objective import default_chunk, divergence_head

V, D, CHUNK = 6_000, 8, 32


def chunk_buffers(count, objective, rows, gradient=True):
    """Peak of the head stage over `count` rows in units of one float32 array [CHUNK, V]; inputs and
    results not counted."""
    mx.random.seed(0)
    student, teacher = mx.random.normal((2, count, D))
    heads = mx.random.normal((2, V, D))
    tokens, values = mx.random.randint(0, V, (count,)), mx.random.uniform(shape=(count,))
    inputs = [student, heads[0] + 0, teacher, heads[1] + 0, tokens, -values, values]
    mx.eval(inputs)
    gc.collect()  # else what an earlier test left is freed meanwhile, and the peak looks lower
    mx.synchronize()  # a stream lets go of arrays in a thread of its own
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    divergence_head(*inputs, objective, chunk=CHUNK, block_bytes=4 * V * rows, gradient=gradient)
    results = 4 * (V * D + count * D if gradient else 0)
    return (mx.get_peak_memory() - before - results) / (4 * CHUNK * V)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(alpha=0.5, top_k=None),
        Objective(alpha=0.0, top_k=None),
        Objective(alpha=1.0, top_k=None, temperature=0.7),
        Objective(alpha=0.5, top_k=100),
        Objective(form="sampled"),
    ],
)
@pytest.mark.parametrize(("rows", "most"), [(CHUNK, 7.1), (4, 4.1)])
def test_head_stage(objective, rows, most):
    """A GPU's block is the chunk. Where blocks are smaller, one may or may not be gone when the
    next begins: MLX frees it in a thread of its own, after it told of the end. Were one left behind
    by every chunk, twelve more would show here.
    """
    few, many = (chunk_buffers(count * CHUNK, objective, rows) for count in (4, 16))
    late = rows / CHUNK if rows < CHUNK else 0
    assert 2 < few <= most
    assert many <= min(most, few + late + 0.1)


def test_a_chunk_is_64_mib():
    assert (
        default_chunk(151_936) * 151_936 * 4
        <= 64 * 2**20
        < (default_chunk(151_936) + 1) * 151_936 * 4
    )
    assert default_chunk(10**7) == 16
