"""The benchmarks that need no peer: what they compare is equal, what they count is what is needed,
and a wrong side is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import (
    against_rows,
    arithmetic,
    decode,
    growth,
    head,
    locators,
    measuring,
    plan_against_step,
    real_shapes,
    token_step,
    workload,
)
from benchmarks.workload import Shape
from opd.types import Box, ModelOptions
from tests.support.torch_cases import opened

OPTIONS = argparse.Namespace(quick=True, no_wall=True, repeats=1, crop=1, json=True)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return against_rows.case(OPTIONS, tmp_path_factory.mktemp("rows") / "model")


def test_group_against_rows_on_torch(case):
    path, config, group = case
    sides, _ = against_rows.of_torch(path, group)
    least = arithmetic.group(config, against_rows.shape_of(OPTIONS))
    rows = {row["side"]: row for row in against_rows.compared(sides, OPTIONS, "cpu", least)}
    stock = rows["stock rows"]
    assert max(row["gradient_error"] for row in rows.values()) < 1e-4
    assert 0.98 < stock["reached"] < 1.0001
    assert stock["flop_ratio"] > 0.98 * stock["bound"] > 5
    assert rows["own rows"]["memory_ratio"] > 1.5


def test_group_against_rows_on_mlx(case):
    pytest.importorskip("mlx_vlm")
    path, _, group = case
    sides, _ = against_rows.of_mlx(path, group)
    rows = {row["side"]: row for row in against_rows.compared(sides, OPTIONS, "mlx", None)}
    assert max(row["gradient_error"] for row in rows.values()) < 1e-4
    assert rows["own rows"]["memory_ratio"] > 1.5


def test_sides_that_differ_are_refused():
    gradient = {"a": np.ones(3)}
    right, wrong = (1.0, gradient), (1.0, {"a": np.array([1.0, 1.0, 1.01])})
    with pytest.raises(AssertionError, match="differ"):
        against_rows.compared(
            {"ours": lambda: right, "theirs": lambda: wrong}, OPTIONS, "cpu", None
        )


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_real_widths(recompute):
    config = workload.qwen3_vl_4b(num_hidden_layers=4)
    config.vision_config.depth = 4
    config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    backend = workload.backend(workload.model(config, "meta"))
    row = real_shapes.measured(config, backend, Shape(512, 128, 4, crop=256), recompute)
    assert 0.98 < row["reached"] < 1.0001
    assert row["flop_ratio"] > 0.98 * row["bound"]


def test_arithmetic_is_what_is_counted():
    """Exactly, in the trunk: a term that was missing on one side could hide in the 2 % that are
    allowed elsewhere."""
    from opd_torch.batch import lay_out
    from opd_torch.forward import hidden_states

    config = workload.small_qwen3_vl()
    shape = Shape(80, 8, 3)
    group = workload.group(config, shape)
    model = workload.policy(workload.model(config, "meta"))
    batch = lay_out(
        [group.student], [[one.tokens for one in group.completions]], torch.device("meta")
    )

    def run():
        hidden_states(model, batch, True).sum().backward(torch.ones((), device="meta"))

    assert measuring.flops(run, completion=8) == arithmetic.trunk(
        config, 80, 8, 3, backward=True, recompute=True
    )


def test_head():
    rng = torch.Generator().manual_seed(0)
    arrays = [torch.randn(size, generator=rng) for size in ((64, 32), (2048, 32)) * 2]
    rows = {
        row["side"]: row
        for row in against_rows.compared(head.torch_sides(*arrays), OPTIONS, "cpu", None)
    }
    units = {side: row["flops"] / (2 * 64 * 32 * 2048) for side, row in rows.items()}
    assert 4 <= units["ours"] < 4.2
    assert max(row["gradient_error"] for row in rows.values()) < 1e-4


def test_a_token_step_reads_weights_and_prompts_once(case):
    """Whatever the number of completions and groups; transformers' own batch reads a prompt's keys
    twice a row."""
    transformers = pytest.importorskip("transformers")
    path, config, group = case
    loaded = opened(ModelOptions(path))
    backend = loaded.backend(loaded.model)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    text, long = config.text_config, len(group.student) - 1
    for prompts, n in ((1, 1), (1, 4), (3, 4)):
        given = [workload.prompt(config, len(group.student), seed) for seed in range(prompts)]
        weights, keys = decode.of_a_step(
            decode.ours(backend, given, n, (config.image_token_id,)),
            loaded.model.module,
            long,
            text.head_dim,
        )
        assert weights == decode.step_weights(stock)
        assert keys == decode.keys_values(config, prompts, long)
        theirs, copied = decode.of_a_step(
            decode.transformers_rows(stock, given, n), stock, long, text.head_dim
        )
        assert theirs == weights
        # by attention and where the cache grows; with the row's own few tokens
        assert copied == pytest.approx(2 * n * keys, rel=0.05)


def test_a_compiled_token_step_has_fewer_operations(tmp_path):
    pytest.importorskip("mlx_vlm")
    if not shutil.which("g++"):
        pytest.skip("MLX has a compiler build a CPU's kernels")
    options = argparse.Namespace(layers=2, n=4, tokens=6, no_wall=True)
    (one, compiled), _ = token_step.compared(tmp_path, options)
    assert compiled["logprob_error"] < 2e-5
    assert one["operations"] > 1.4 * compiled["operations"]
    options.layers = 3
    assert (
        token_step.compared(tmp_path / "deeper", options)[0][0]["operations"] - one["operations"]
        > 50
    )


def test_growth_is_relative_to_what_is_predicted():
    before = {"size": 2, "predicted": 0.9, "bytes": 10, "seconds": 1.0}
    assert growth.growth(
        before, {"size": 4, "predicted": 2.7, "bytes": 15, "seconds": 3.3}
    ) == pytest.approx({"byte_growth": 0.75, "time_growth": 1.1})


def synthetic(seconds):
    """Rows of the growth benchmark at all its points, which take `seconds(needed, functions, axis,
    size)`."""
    config = workload.small_qwen3_vl()
    rows = []
    for axis, size in ((axis, size) for axis, sizes in growth.AXES.items() for size in sizes):
        config.text_config.vocab_size = size if axis == "V" else growth.VOCABULARY
        shape = growth.shape_of(axis, size)
        work = {
            "needed": arithmetic.group(config, shape),
            "functions": arithmetic.functions(config, shape),
        }
        rows.append(
            {
                "axis": axis,
                "size": size,
                "bytes": 1,
                **work,
                "seconds": seconds(*work.values(), axis, size),
            }
        )
    return rows


def worked(needed, functions, *_):
    return needed * 2e-11 + functions * 5e-9


def most_growth(rows):
    found = {axis: [] for axis in growth.AXES}
    for before, after in pairwise(rows):
        if before["axis"] == after["axis"]:
            found[after["axis"]].append(growth.growth(before, after)["time_growth"])
    return {axis: max(values) for axis, values in found.items()}


@pytest.mark.parametrize(("flop", "function"), [(2e-11, 5e-9), (2e-11, 0.0), (0.0, 5e-9)])
def test_growth_finds_what_a_flop_and_a_function_cost(flop, function):
    rows = synthetic(lambda needed, functions, *_: needed * flop + functions * function)
    assert growth.costs(rows) == pytest.approx([flop, function], rel=1e-6, abs=1e-15)
    fit = growth.predict(rows)
    assert fit["deviation"] < 1e-6
    assert fit["function_ns"] == pytest.approx(1e9 * function, abs=1e-6)
    assert most_growth(rows) == pytest.approx(dict.fromkeys(growth.AXES, 1.0), abs=1e-6)


def test_growth_has_no_negative_cost():
    """Two points that a negative cost would fit exactly: the other cost is then the best that there
    is alone."""
    rows = [
        {"needed": 2, "functions": 1, "seconds": 1.0},
        {"needed": 4, "functions": 1, "seconds": 3.0},
    ]
    assert growth.costs(rows) == pytest.approx([(2 + 4 / 3) / (2**2 + (4 / 3) ** 2), 0.0])
    swapped = [
        {"needed": row["functions"], "functions": row["needed"], "seconds": row["seconds"]}
        for row in rows
    ]
    assert growth.predict(swapped)["gflops"] is None
    assert growth.costs(swapped) == pytest.approx(growth.costs(rows)[::-1])


def test_growth_sees_a_term_that_no_work_explains():
    """Cubic in P, of half the time at P 2048: 4/3 of what its last doubling should take, and the
    fit cannot take it in."""
    (largest,) = (
        row["seconds"] for row in synthetic(worked) if (row["axis"], row["size"]) == ("P", 2048)
    )
    rows = synthetic(
        lambda *point: worked(*point) + largest * (growth.shape_of(*point[2:]).prompt / 2048) ** 3
    )
    growth.predict(rows)
    worst = most_growth(rows)
    assert worst["P"] > 1.25
    assert max(worst[axis] for axis in "nRV") < 1.06


@pytest.mark.parametrize("times", [True, False])
def test_growth_reports_one_fit_of_all_points(monkeypatch, capsys, times):
    rows = {(row["axis"], row["size"]): row for row in synthetic(worked)}
    monkeypatch.setattr(
        growth,
        "measured",
        lambda *point: (
            {key: rows[point[:2]][key] for key in rows[point[:2]].keys() - {"seconds"}},
            None,
        ),
    )
    # A slow turn is no news of the size.
    turns = {point: [3 * row["seconds"], row["seconds"]] for point, row in rows.items()}
    monkeypatch.setattr(
        measuring, "interleaved", lambda runs, *_, **__: {point: turns[point] for point in runs}
    )
    monkeypatch.setattr("sys.argv", ["growth", "--json", *([] if times else ["--no-wall"])])
    growth.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == len(rows)
    assert sum("byte_growth" in row for row in found["rows"]) == len(rows) - len(growth.AXES)
    if times:
        assert found["fit"] == pytest.approx(
            {"gflops": 50, "function_ns": 5, "deviation": 0}, abs=1e-6
        )
        assert {axis: one["time_growth"] for axis, one in found["worst"].items()} == pytest.approx(
            dict.fromkeys(growth.AXES, 1.0)
        )
    else:
        assert "fit" not in found
        assert not any({"predicted", "time_growth"} & row.keys() for row in found["rows"])


class Functions(TorchDispatchMode):
    """Elementary functions by operator, as torch runs them: elements, and of attention the pairs
    that are not masked."""

    COUNTED = (
        "silu",
        "silu_backward",
        "gelu",
        "gelu_backward",
        "logsumexp",
        "exp",
        "expm1",
        "log1p_",
        "sigmoid_",
        "_softmax",
    )
    LEFT_OUT = ("log", "cos", "sin", "rsqrt_", "logaddexp", "sigmoid")
    ATTENTION: ClassVar = {
        "_scaled_dot_product_flash_attention_for_cpu": 0,
        "_scaled_dot_product_flash_attention_for_cpu_backward": 1,
    }

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, given=(), options=None):
        name = operator.overloadpacket.__name__
        if name in self.ATTENTION:
            query, key = given[self.ATTENTION[name] :][:2]
            seen = torch.ones(query.shape[2], key.shape[2])
            causal = any(value is True for value in given)
            self.found[name] += (
                query.shape[0] * query.shape[1] * int((seen.tril() if causal else seen).sum())
            )
        elif name in self.COUNTED + self.LEFT_OUT:
            self.found[name] += given[0].numel()
        return operator(*given, **(options or {}))


def test_functions_are_those_that_torch_runs(case):
    """In one whole call: student and teacher, whose prompts have 96 and 32 tokens, and 8
    completions."""
    path, config, group = case
    sides, _ = against_rows.of_torch(path, group)
    with Functions() as count:
        sides["group"]()
    left_out = sum(count.found.pop(name) for name in Functions.LEFT_OUT)
    assert count.found.total() == arithmetic.functions(config, against_rows.shape_of(OPTIONS))
    assert 0 < left_out < 0.02 * count.found.total()


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_parity(tmp_path, name):
    """A family on both backends, and a model by rows; the figures are errors that a wrong term
    could not reach."""
    pytest.importorskip("mlx.core")
    pytest.importorskip("peft")
    from benchmarks import parity

    rows = parity.rows_of(name, tmp_path)
    assert [row["backend"] for row in rows] == (
        ["torch", "mlx"] if name == "qwen3_vl" else ["torch"]
    )
    for row in rows:
        assert row["prompts"] == 0
        most = {
            "logprobs": 1e-6,
            "loss": 1e-4,
            "gradient": 1e-4,
            "steps": 1e-4,
            "adapter": 1e-5,
            "export": 1e-5,
        }
        assert {column: row[column] for column in most if not 0 < row[column] < most[column]} == {}


def test_parity_sees_a_difference():
    from benchmarks import parity

    rng = np.random.default_rng(0)
    true = [rng.standard_normal((3, 7))]
    assert parity.relative_difference([true[0] * (1 + 1e-3)], true) == pytest.approx(1e-3)


def left_over(name, count):
    """`count` float32 numbers that stay alive, and as many that only the garbage collector
    frees."""
    if name.startswith("mlx"):
        import mlx.core as mx

        alive, garbage = mx.zeros(count) + 1, mx.zeros(count) + 1
        mx.eval(alive, garbage)
    else:
        alive, garbage = torch.ones(count), torch.ones(count)
    cycle = [garbage]
    cycle.append(cycle)
    return alive


@pytest.mark.parametrize("name", ["cpu-full", "mlx-qlora"])
def test_plan_against_step(name, tmp_path):
    """Whatever else the process holds, here more than a rollout does."""
    pytest.importorskip("mlx" if name.startswith("mlx") else "torch")
    alive = left_over(name, 5 * 10**7)
    folder = workload.folder(
        tmp_path / "model", plan_against_step.QUICK_VOCABULARY, **plan_against_step.QUICK
    )
    rows = {row["verb"]: row for row in plan_against_step.side(name, folder, quick=True)}
    for verb in ("rollout", "accumulate", "step"):
        assert 0.8 < rows[verb]["bytes_ratio"] < 1.2, verb
    assert rows["step"]["seconds"] == pytest.approx(
        sum(rows[verb]["seconds"] for verb in plan_against_step.STAGES)
    )
    assert all(row["planned_seconds"] > 0 for row in rows.values())
    assert alive.nbytes > rows["rollout"]["bytes"]


def test_a_box_holds_evidence_by_hand():
    evidence = Box(10, 10, 28, 28)
    assert locators.holds(Box(10, 10, 28, 28), evidence)
    assert not locators.holds(Box(11, 10, 40, 40), evidence)
    assert locators.shared(Box(20, 0, 40, 20), evidence) == 8 * 10
    assert locators.shared(Box(28, 28, 40, 40), evidence) == 0


def test_the_control_is_of_the_same_size_anywhere():
    boxes = [locators.moved((Box(5, 5, 41, 37),))[0] for _ in range(200)]
    assert {(round(box.x1 - box.x0), round(box.y1 - box.y0)) for box in boxes} == {(36, 32)}
    assert min(box.x0 for box in boxes) < 5
    assert max(box.x1 for box in boxes) > locators.SIDE - 5
    assert all(box.x0 >= 0 and box.x1 <= locators.SIDE for box in boxes)
