"""Features of a frozen vision tower that are kept: never more than their bound, which follows from
the device."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from opd.memory import feature_bytes, host_memory


def prompt(key, tokens):
    return SimpleNamespace(key=key, visual=SimpleNamespace(index=np.arange(tokens)))


@pytest.fixture
def arrays():
    """Weak references to the arrays that were computed; torch's tensors share their memory."""
    return []


@pytest.fixture
def cache(backend_name, arrays):
    """A cache of a room, and what was computed: features [tokens, 8] of two levels, each of the
    prompt's number."""
    computed = []

    def features(prompts):
        computed.append([one.key for one in prompts])
        rows = [np.full((len(one.visual.index), 8), float(one.key), np.float32) for one in prompts]
        levels = [level * np.concatenate(rows) for level in (1, 2)] if rows else []
        arrays.extend(map(weakref.ref, levels))
        return levels

    def make(room):
        if backend_name == "mlx":
            import mlx.core as mx

            from opd_mlx.vision import FeatureCache

            known = FeatureCache(
                lambda prompts: [mx.array(level) for level in features(prompts)], room
            )
            return (
                known,
                lambda prompts: [np.array(level) for level in known.features(prompts)],
                computed,
            )
        import torch

        from opd_torch.vision import FeatureCache

        known = FeatureCache(room)
        compute = lambda prompts: [torch.from_numpy(level) for level in features(prompts)]
        return (
            known,
            lambda prompts: [level.numpy() for level in known.features(prompts, compute)],
            computed,
        )

    return make


@pytest.mark.parametrize("room", [0, 100, 640, 2000, 10**6])
def test_never_above_the_room(cache, room):
    """Whatever is asked for, in calls small and large; and what is given is right."""
    known, ask, computed = cache(room)
    rng = np.random.default_rng(room)
    for _ in range(40):
        asked = [
            prompt(str(number), 1 + number % 7)
            for number in rng.integers(0, 12, rng.integers(1, 9))
        ]
        first, second = ask(asked)
        wanted = np.concatenate([np.full(len(one.visual.index), float(one.key)) for one in asked])
        np.testing.assert_array_equal(first[:, 0], wanted)
        np.testing.assert_array_equal(second[:, 7], 2 * wanted)
        assert known.nbytes <= room
    calls = sum(map(len, computed))
    assert calls == 12 if room == 10**6 else calls > 12


def test_the_oldest_are_forgotten(cache):
    known, ask, computed = cache(3 * 64)
    for key in "1213141":
        ask([prompt(key, 1)])
    assert [one for call in computed for one in call] == ["1", "2", "3", "4"]
    assert known.nbytes == 3 * 64


def test_a_part_does_not_keep_the_whole(cache, arrays):
    """Bytes that are counted are bytes that are held."""
    known, ask, _ = cache(64)
    ask([prompt(str(number), 1) for number in range(100)])
    assert known.nbytes == 64
    assert arrays
    assert not any(array() is not None for array in arrays)


def test_the_bound_follows_the_memory(backend_name, monkeypatch, tmp_path):
    assert [feature_bytes(size * 2**30) for size in (8, 16, 24, 32, 141)] == [
        2**28,
        2**29,
        3 * 2**28,
        2**30,
        2**30,
    ]
    whole = host_memory()
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{2**31}\n")
    assert host_memory((tmp_path / "max", tmp_path / "nowhere")) >= whole
    assert host_memory((tmp_path / "max", tmp_path / "limit")) == 2**31
    if backend_name == "mlx":
        from opd_mlx.device import this_device

        assert this_device().feature_bytes == feature_bytes(whole)
    else:
        import torch

        from opd_torch.device import this_device

        assert this_device("cpu").feature_bytes == feature_bytes(whole)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(total_memory=24 * 2**30),
        )
        gpu = this_device("cuda")
        assert (gpu.feature_bytes, gpu.free_bytes) == (3 * 2**28, None)
