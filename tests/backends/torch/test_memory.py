"""What the torch backend's head stage allocates: a few chunk buffers, whatever the number of rows;
and prompt rows never meet it."""

from __future__ import annotations

import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.profiler import ProfilerActivity, profile

from opd.objective import Objective
from opd_torch.device import this_device
from opd_torch.objective import default_chunk, divergence_head

V, D, CHUNK = 20_000, 8, 32


def peak_bytes(run):
    """Largest sum of bytes that the allocator held during `run`, temporaries inside operators
    included."""
    run()
    gc.collect()  # else what an earlier test left is freed meanwhile, and the peak looks lower
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def chunk_buffers(count, objective, gradient=True, rows=CHUNK, vocabulary=V):
    """Peak of the head stage over `count` rows in units of one float32 array [CHUNK, vocabulary],
    results not counted."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(count, D, generator=generator) for _ in range(2))
    heads = [torch.randn(vocabulary, D, generator=generator) for _ in range(2)]
    tokens = torch.randint(vocabulary, (count,), generator=generator)
    values = torch.rand(count)
    peak = peak_bytes(
        lambda: divergence_head(
            student,
            heads[0],
            teacher,
            heads[1],
            tokens,
            -values,
            values,
            objective,
            chunk=CHUNK,
            block_bytes=4 * vocabulary * rows,
            gradient=gradient,
        )
    )
    results = 4 * (vocabulary * D + count * D if gradient else 0)
    return (peak - results) / (4 * CHUNK * vocabulary)


@pytest.mark.parametrize(
    ("objective", "most"),
    [
        (Objective(alpha=0.5, top_k=None), 4),
        (Objective(alpha=0.0, top_k=None), 4),
        (Objective(alpha=1.0, top_k=None, temperature=0.7), 4),
        (Objective(alpha=0.5, top_k=100), 3.2),
        (Objective(form="sampled"), 3.2),
    ],
)
@pytest.mark.parametrize("rows", [CHUNK, 4])
def test_head_stage(objective, most, rows):
    """Logits of both policies, and of the rows of a block one or two arrays more; a GPU's block is
    the chunk."""
    once, twice = (
        chunk_buffers(count * CHUNK, objective, rows=rows, vocabulary=V // 2) for count in (2, 4)
    )
    assert 2 < once <= 2 + (most - 2) * rows / CHUNK + 0.02
    assert twice <= once + 0.02


def test_head_stage_without_gradient():
    assert chunk_buffers(2 * CHUNK, Objective(top_k=100), gradient=False, rows=13) <= 3.2


def test_a_cpu_s_block_is_a_mebibyte():
    """Of a chunk of 32 rows with 80 kB each, 13 at a time."""
    rows = this_device("cpu").head_block_bytes // (4 * V)
    assert rows == 13
    assert 2.4 < chunk_buffers(CHUNK, Objective(top_k=100), rows=rows) < 2.6


def test_a_chunk_is_64_mib():
    assert (
        default_chunk(151_936) * 151_936 * 4
        <= 64 * 2**20
        < (default_chunk(151_936) + 1) * 151_936 * 4
    )
    assert default_chunk(10**7) == 16
