"""On torch: a prompt runs once, forward and backward; and memory falls with the split."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from opd.objective import Objective
from opd.types import Completion, Group
from tests.backends.torch.test_memory import peak_bytes
from tests.support import random_models
from tests.support.torch_cases import make_case, rows_of

JSD = Objective(alpha=0.5, top_k=20)


@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_a_prompt_runs_once(family, tmp_path):
    """Forward and backward, whatever the split."""
    case = make_case(tmp_path, random_models.FAMILIES[family](tmp_path / "model"))
    loaded = case.loaded()
    backend, rows = loaded.backend(loaded.model), rows_of(loaded.model, backward=True)
    groups = case.groups[2:3]
    backend.accumulate(groups, JSD, 1)
    prompt = len(groups[0].student) - 1
    assert rows == [prompt, 4, -4, 6, -6, -prompt]
    # Gradients are in the backend's sums, not twice.
    assert all(one.grad is None for one in loaded.model.parameters.values())


SIZES = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 512}


def test_memory(tmp_path):
    """It falls with the split; one at a time, more completions cost their hidden states alone."""
    case = make_case(tmp_path, random_models.qwen3_vl(tmp_path / "model", **SIZES))
    backend, length = case.backend("float32"), 96
    rng = np.random.default_rng(0)

    def peak(n: int, split: int) -> int:
        tokens = [rng.integers(0, 200, length).astype(np.int32) for _ in range(n)]
        logprobs = np.full(length, -5, np.float32)
        completions = tuple(Completion(one, logprobs, False) for one in tokens)
        weights = tuple(np.full(length, 0.01, np.float32) for _ in tokens)
        group = Group(case.groups[0].student, case.groups[0].teacher, completions, weights)
        return peak_bytes(lambda: backend.accumulate([group], JSD, split))

    whole, two, one = (peak(8, split) for split in (0, 2, 1))
    assert two < 0.6 * whole
    assert one < 0.8 * two
    hidden = 4 * SIZES["hidden"] * length
    assert peak(16, 1) - one < 1.5 * 8 * hidden
