"""Attention in blocks: value and every gradient against float64, whatever it keeps; and memory that
grows with rows, not their square."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from opd_mlx.batch import Masks, Visibility, lay_out_prefixes
from opd_mlx.device import this_device
from opd_mlx.kernels import scores
from opd_mlx.kernels.backward import Backward

B, J, N, G, T, P, E = 2, 2, 3, 2, 7, 5, 4


def plain(query, sources, masks, slope):
    """What is found, and gradients to queries and all keys and values, in float64 with every
    weight; masks are full ones."""
    wide = [
        [np.repeat(part, query.shape[2] // part.shape[2], axis=2) for part in pair]
        for pair in sources
    ]
    logits = np.concatenate(
        [
            np.einsum("bjngte,bjnke->bjngtk", query, key) + mask
            for (key, _), mask in zip(wide, masks, strict=True)
        ],
        axis=-1,
    )
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    keys, values = (np.concatenate(parts, axis=3) for parts in zip(*wide, strict=True))
    found = np.einsum("bjngtk,bjnke->bjngte", weights, values)
    outer = np.einsum("bjngte,bjnke->bjngtk", slope, values)
    outer = weights * (outer - (weights * outer).sum(-1, keepdims=True))
    slopes = [
        np.einsum("bjngtk,bjngte->bjnke", part, by)
        for part, by in ((outer, query), (weights, slope))
    ]
    gradients, start = [np.einsum("bjngtk,bjnke->bjngte", outer, keys)], 0
    for pair in sources:
        for part, whole in zip(pair, slopes, strict=True):
            its = whole[..., start : start + part.shape[3], :]
            gradients.append(
                its if part.shape[2] > 1 or query.shape[2] == 1 else its.sum(2, keepdims=True)
            )
        start += pair[0].shape[3]
    return found, gradients


def given(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def differentiated(query, sources, seen, slope, device):
    """The same by blocks, as a step computes it."""
    flat = [
        mx.array(part.astype(np.float32))
        for part in (query, *(part for pair in sources for part in pair))
    ]
    backward = Backward(
        lambda query, *rest: [
            scores.attention(query, list(zip(rest[::2], rest[1::2], strict=True)), seen, device)
        ],
        flat,
    )
    found = np.array(backward.outputs[0])
    return found, backward.start([mx.array(slope.astype(np.float32))])


def agree(query, sources, seen, masks, slope, device):
    found, gradients = differentiated(query, sources, seen, slope, device)
    expected, wanted = plain(query, sources, masks, slope)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


@pytest.fixture(
    params=[(3, 2**24), (3, 0), (128, 2**24), (1, 0)],
    ids=["few kept", "few again", "one", "row by row"],
)
def blocks(request):
    """A device by the rows of a block, and the bytes that are kept."""
    rows, kept = request.param
    return replace(this_device(), score_block_rows=rows, kept_score_bytes=kept)


def test_completions_over_a_shared_prompt(blocks):
    """Padding of the prompt, another for each; own keys causally."""
    query, slope, *rest = given(
        (B, J, N, G, T, E), (B, J, N, G, T, E), *2 * [(B, J, N, T, E)], *2 * [(B, J, 1, P, E)]
    )
    padding = np.where(np.arange(P) < np.array([P, 3])[:, None], 0, -np.inf)[
        :, None, None, None, None
    ]
    causal = np.where(np.arange(T) > np.arange(T)[:, None], -np.inf, 0)
    masks = Masks(
        mx.array(padding[:, :, 0].astype(np.float32)), mx.array(causal.astype(np.float32)), P
    )
    agree(query, [rest[:2], rest[2:]], masks.seen, [causal, padding], slope, blocks)


def test_vision_without_masks(blocks):
    query, slope, *rest = given(*2 * [(B, J, 1, 1, T, E)], *2 * [(B, J, 1, 9, E)])
    agree(query, [rest], lambda rows: [(slice(0, 9), None)], [np.zeros(9)], slope, blocks)


def prompts(length, *images):
    """Prompts of text with images at the given tokens."""
    found = []
    for index in images:
        visual = SimpleNamespace(
            index=np.array(index, np.int32),
            image=(np.diff(index, prepend=index[0]) > 1).cumsum().astype(np.int32),
        )
        tokens = np.arange(length + 1, dtype=np.int32)

        class One(SimpleNamespace):
            def __len__(self):
                return len(self.tokens)

        found.append(One(tokens=tokens, positions=tokens[None], visual=visual))
    return lay_out_prefixes(found)


@pytest.mark.parametrize(
    "rule",
    [Visibility(), Visibility(4), Visibility(blocks=True), Visibility(4, blocks=True)],
    ids=str,
)
def test_prompts_with_windows_and_images(blocks, rule):
    length = 11
    prefixes = prompts(length, [2, 3, 4, 5, 8, 9], [1, 2, 6, 7, 8, 9])
    row, key = np.arange(length)[:, None], np.arange(length)
    images = np.array(prefixes.images)
    sees = np.repeat((key <= row)[None], B, axis=0)
    if rule.blocks:
        sees = sees | ((images[:, :, None] == images[:, None]) & (images[:, None] >= 0))
    if rule.window:
        sees = sees & (row - key < rule.window)
    query, slope, *rest = given(*2 * [(B, J, 1, G, length, E)], *2 * [(B, J, 1, length, E)])
    agree(
        query,
        [rest],
        lambda rows: [prefixes.seen(rule, rows)],
        [np.where(sees, 0, -np.inf)[:, None, None, None]],
        slope,
        blocks,
    )
    # What a GPU's own attention takes, which all rows share.
    mask = prefixes.mask(rule)
    assert (
        mask is None
        if rule == Visibility()
        else np.array_equal(np.broadcast_to(mask[:, 0], sees.shape), sees)
    )


def memory(length, heads=4, width=16, **traits):
    """Bytes that a causal attention holds for its backward, and that both hold at most, beside what
    they are given."""
    device = replace(this_device(), **traits)
    mx.random.seed(0)
    query, *pair = mx.random.normal((3, 1, heads, 1, length, width))
    arrays = [query[:, :, :, None] + 0, *(part + 0 for part in pair)]
    del query, pair
    mx.eval(arrays)

    def seen(rows):
        return [
            (slice(0, rows.stop), lambda row: mx.where(mx.arange(rows.stop) > row, -mx.inf, 0.0))
        ]

    mx.set_cache_limit(0)
    gc.collect()  # else what an earlier test left is freed meanwhile, and the peak looks lower
    mx.synchronize()  # a stream lets go of arrays in a thread of its own
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    backward = Backward(
        lambda query, *pair: [scores.attention(query, [tuple(pair)], seen, device)], arrays
    )
    mx.eval(backward.outputs)
    mx.synchronize()
    held = mx.get_active_memory() - before
    slope = mx.ones_like(backward.outputs[0])
    mx.eval(backward.start([slope]))
    return held, mx.get_peak_memory() - before


def test_memory_grows_with_the_rows():
    """At twice the tokens at most twice as much, and far less than all scores once."""
    (_, once), (_, twice) = (
        memory(length, kept_score_bytes=0, score_block_bytes=2**20) for length in (1024, 2048)
    )
    assert twice <= 2.1 * once
    assert twice < 0.25 * 4 * 4 * 2048**2


def test_scores_are_kept_where_they_are_few():
    scores_of_256 = 4 * 4 * 256 * (256 + 128) // 2
    kept, _ = memory(256)
    again, _ = memory(256, kept_score_bytes=scores_of_256 - 1)
    assert kept - again == pytest.approx(scores_of_256, rel=0.1)
