"""Attention over a prompt's keys and a completion's own, joined from two kernels, against plain
attention, row by row."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from opd.types import Prompt, VisualTokens
from opd_torch.batch import lay_out
from opd_torch.kernels import flash
from opd_torch.kernels import joined as module
from tests.backends.torch.test_memory import peak_bytes

H, G, D, SCALE = 4, 2, 6, 0.4
NOTHING = VisualTokens(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))

SHAPES = {
    "even": ([6, 6], [(3, 3), (3, 3)]),
    "one prompt": ([9], [(4, 1, 2)]),
    "prompts": ([3, 8, 5], [(2, 2), (2, 2), (2, 2)]),
    "counts": ([7, 7, 7], [(2,), (5, 1, 3), ()]),
    "all": ([2, 9, 4, 6], [(1, 4), (), (3, 0, 2), (7,)]),
}


def batch_of(prompts, completions):
    made = [
        Prompt(
            np.arange(length, dtype=np.int32),
            np.arange(length, dtype=np.int32)[None],
            {},
            "",
            NOTHING,
        )
        for length in prompts
    ]
    return lay_out(
        made,
        [[np.arange(length) for length in members] for members in completions],
        torch.device("cpu"),
    )


def inputs_of(batch, dtype=torch.float64, seed=0, large=1.0):
    """Query, own keys and values, the prefixes' keys and values; and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    rows, prefixes = len(batch.tokens), batch.prefixes.ragged
    shapes = [
        (rows, H, D),
        (rows, G, D),
        (rows, G, D),
        *[(prefixes.rows, G, prefixes.longest, D)] * 2,
    ]
    made = [
        (large * torch.randn(shape, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]
    return made, torch.randn(rows, H, D, generator=generator, dtype=torch.float64).to(dtype)


def joined(batch, inputs):
    return module.joined(*inputs, batch, SCALE)


def plain(shape, inputs):
    """Row by row: a row sees its prompt but for the last token, which runs with the completions,
    and its completion up to itself."""
    query, key, value, *prefix = inputs
    prompts, completions = SHAPES[shape]
    out, row = [], 0
    for number, members in enumerate(completions):
        seen = [part[number, :, : prompts[number] - 1] for part in prefix]
        for length in members:
            for last in range(row + 1, row + length + 1):
                own = [part[row:last].transpose(0, 1) for part in (key, value)]
                keys, values = (
                    torch.cat(both, 1).repeat_interleave(H // G, 0)
                    for both in zip(seen, own, strict=True)
                )
                scores = SCALE * (keys @ query[last - 1][:, :, None])
                out.append((scores.softmax(1) * values).sum(1))
            row += length
    return torch.stack(out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(shape, bias, monkeypatch):
    """Prompts of unequal lengths together, and one by one, as on a GPU; padded rows have scores
    that would overflow."""
    monkeypatch.setattr(flash, "takes_bias", lambda query: bias)
    batch = batch_of(*SHAPES[shape])
    inputs, gradient = inputs_of(batch, large=30.0)
    ours, theirs = joined(batch, inputs), plain(shape, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    found, wanted = (torch.autograd.grad(out, inputs, gradient) for out in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_kernel_logarithms_are_natural():
    """What the joining rests on, of a kernel without documentation."""
    batch = batch_of([5], [(4,)])
    (query, _, _, key, value), _ = inputs_of(batch)
    query = query[None].transpose(1, 2)
    _, totals, _ = flash.attention(query, key, value, None, False, SCALE)
    scores = SCALE * query @ key.repeat_interleave(H // G, 1).transpose(2, 3)
    torch.testing.assert_close(totals, scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_precisions(dtype, most):
    batch = batch_of(*SHAPES["all"])
    inputs, gradient = inputs_of(batch, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = joined(batch, inputs), plain("all", exact)
    assert ours.dtype == dtype
    found, wanted = (
        torch.autograd.grad(ours, inputs, gradient),
        torch.autograd.grad(theirs, exact, gradient.double()),
    )
    for one, other in zip((ours, *found), (theirs, *wanted), strict=True):
        assert one.dtype == dtype
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < most


def test_a_prompts_keys_are_not_copied():
    """Twice as many completions need more only for themselves (and the kernel for each thread, so
    the prompt is a long one)."""
    peaks = []
    for n in (2, 4):
        batch = batch_of([8000], [(4,) * n])
        inputs, gradient = inputs_of(batch, torch.float32)
        peaks.append(
            peak_bytes(
                lambda batch=batch, inputs=inputs, gradient=gradient: joined(
                    batch, inputs
                ).backward(gradient)
            )
        )
    keys = 2 * G * 8000 * D * 4
    assert peaks[1] - peaks[0] < keys / 4
    assert peaks[1] < 3 * keys
