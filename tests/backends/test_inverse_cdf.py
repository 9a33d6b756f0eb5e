"""Sampling at real vocabularies, against the inverse CDF of numpy in float64, on every backend."""

from __future__ import annotations

import numpy as np
import pytest

VOCABULARIES = (151_936, 262_208)
LAST = np.float32(1 - 2**-24)
NEAR = 1e-6
"""How far an end of an id's share may lie from where float64 has it."""


def logits_of(kind, size, seed=0):
    """Logits [V] of a shape that a language model gives."""
    rng = np.random.default_rng(seed)
    if kind == "flat":
        return np.zeros(size, np.float32)
    if kind == "zipf":
        return (-1.1 * np.log(rng.permutation(size) + 1.0)).astype(np.float32)
    values = rng.normal(0, 2, size).astype(np.float32)
    if kind == "peak":
        values[size // 3] = 18
    if kind == "first":
        values[:] = np.where(np.arange(size) == 0, 17, 0)
    return values


def cumulative(logits, temperature=1.0, banned=()):
    """Cumulative probabilities [V] in float64."""
    values = logits.astype(np.float64) / temperature
    values[list(banned)] = -np.inf
    powers = np.exp(values - values.max())
    return np.cumsum(powers) / powers.sum()


@pytest.fixture
def draw(backend_name):
    """Ids and log-probabilities that a backend draws from logits [V], or hidden states [V, D], by
    uniforms."""

    def of(logits, uniforms, temperature=1.0, banned=(), dtype="float32"):
        uniforms = np.asarray(uniforms, np.float32)
        head, hidden = logits.reshape(len(logits), -1), np.ones((len(uniforms), 1), np.float32)
        if backend_name == "mlx":
            import mlx.core as mx

            from opd.types import Sampling
            from opd_mlx import sampling
            from opd_mlx.sampling import _banned

            ban = _banned(Sampling(1.0, (), tuple(banned)), len(head))
            given = mx.array(hidden).astype(getattr(mx, dtype)), mx.array(head), mx.array(uniforms)
            return tuple(map(np.array, sampling.draw(*given, temperature, ban)))
        import torch

        from opd_torch import sampling
        from opd_torch.objective import operand

        weights = operand(torch.from_numpy(head).to(getattr(torch, dtype)))
        ban = torch.tensor(banned, dtype=torch.int64)
        given = torch.from_numpy(hidden).to(weights.dtype), weights, torch.from_numpy(uniforms)
        return tuple(found.numpy() for found in sampling.draw(*given, temperature, ban))

    return of


def off(tokens, uniforms, ends):
    """How far each uniform lies outside the share that float64 gives to the id that it drew."""
    starts = np.where(tokens > 0, ends[tokens - 1], 0.0)
    return np.maximum(0, np.maximum(starts - uniforms, uniforms - ends[tokens]))


@pytest.mark.parametrize("size", VOCABULARIES)
@pytest.mark.parametrize(("kind", "temperature"), [("normal", 1.0), ("zipf", 0.7), ("first", 1.3)])
def test_ids_are_those_of_float64(draw, size, kind, temperature):
    """Near an end of a share alone may rounding choose the neighbour; and log-probabilities are
    those of the ids."""
    logits = logits_of(kind, size)
    banned = (size // 3 + 1, size - 1)
    ends = cumulative(logits, temperature, banned)
    uniforms = (np.random.default_rng(1).integers(0, 2**24, 48) * 2.0**-24).astype(np.float32)
    tokens, logprobs = draw(logits, uniforms, temperature, banned)
    wanted = np.searchsorted(ends, uniforms.astype(np.float64), side="right")
    assert off(tokens, uniforms, ends).max() < NEAR
    assert (tokens != wanted).mean() < 0.05
    np.testing.assert_allclose(logprobs, np.log(np.diff(ends, prepend=0)[tokens]), atol=2e-5)


@pytest.mark.parametrize("size", VOCABULARIES)
@pytest.mark.parametrize("kind", ["normal", "peak"])
def test_every_id_can_be_drawn(draw, size, kind):
    """Rare ones first, and both ends of the vocabulary: each by the uniform in the middle of its
    share, above 2^-22."""
    logits = logits_of(kind, size)
    ends = cumulative(logits)
    shares = np.diff(ends, prepend=0)
    likely = np.flatnonzero(shares > 2**-22)
    chosen = np.unique(
        [*likely[np.argsort(shares[likely])][:24], *likely[:12], *likely[-12:], shares.argmax()]
    )
    middle = np.round((ends[chosen] - shares[chosen] / 2) * 2**24) / 2**24
    np.testing.assert_array_equal(draw(logits, middle)[0], chosen)


def test_distribution(draw):
    """Total variation, over some ids, of the shares by bisection: no more than uniforms of 24 bits
    cost by themselves."""
    size = VOCABULARIES[0]
    logits = logits_of("normal", size)
    ids = np.arange(size // 2, size // 2 + 33)
    ends = cumulative(logits)
    # The first uniform of which an id behind is drawn lies near the end of the share; bisected from
    # there.
    guess = np.ceil(ends[ids] * 2**24).astype(np.int64)
    low, high = guess - 16, guess + 16
    while (high - low).max() > 1:
        middle = (low + high) // 2
        behind = draw(logits, middle * 2.0**-24)[0] > ids
        low, high = np.where(behind, low, middle), np.where(behind, middle, high)
    shares, exact = np.diff(high) * 2.0**-24, np.diff(guess) * 2.0**-24
    assert np.abs(shares - exact).sum() < 0.02 * exact.sum()
    assert np.abs(high - guess).max() <= 1


@pytest.mark.parametrize("size", [5, 513, *VOCABULARIES])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_both_ends_of_the_unit_interval(draw, size, temperature):
    """Allowed ids alone, where the first and the last of the vocabulary are banned or cannot be."""
    logits = logits_of("normal", size)
    logits[1] = logits[-2] = -1e4
    banned = (0, size - 1)
    tokens, logprobs = draw(logits, [0.0, LAST, 0.0], temperature, banned)
    assert set(tokens.tolist()).isdisjoint({0, 1, size - 2, size - 1})
    assert tokens[0] == tokens[2] < 200
    assert tokens[1] > size - 400
    assert np.isfinite(logprobs).all()


def test_a_vocabulary_of_five_by_hand(draw):
    """Ids 0 and 4 are banned, 3 has no probability, and 1 has e^0 / (e^0 + e^1)."""
    logits = np.array([9.0, 0.0, 1.0, -200.0, 9.0], np.float32)
    tokens, logprobs = draw(logits, [0.0, 0.26, 0.27, LAST, 1.1], 1.0, (0, 4))
    assert tokens.tolist() == [1, 1, 2, 2, 2]
    wanted = [0.26894142, 0.26894142, 0.73105858, 0.73105858, 0.73105858]
    np.testing.assert_allclose(logprobs, np.log(wanted), rtol=1e-5)


def test_half_precision(draw, backend_name):
    """Logits of a head in half precision are float32, and so is what is drawn from them."""
    size = VOCABULARIES[0]
    if backend_name == "mlx":
        import mlx.core as mx

        logits = np.array(
            mx.array(logits_of("normal", size)).astype(mx.bfloat16).astype(mx.float32)
        )
    else:
        import torch

        logits = torch.from_numpy(logits_of("normal", size)).bfloat16().float().numpy()
    ends = cumulative(logits)
    uniforms = np.random.default_rng(2).random(48, dtype=np.float32)
    tokens, _ = draw(logits, uniforms, dtype="bfloat16")
    assert off(tokens, uniforms, ends).max() < NEAR


def test_greedy(draw):
    logits = logits_of("normal", VOCABULARIES[0])
    best = int(logits.argmax())
    assert draw(logits, [0.3, 0.9], 0.0)[0].tolist() == [best, best]
    assert draw(logits, [0.3], 0.0, (best,))[0].tolist() == [np.argsort(logits)[-2]]
