"""Every backend's optimizer, teacher, files and processes."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd.errors import FolderError, ModelError, RecipeError
from opd.objective import Objective
from opd.types import Group, ModelOptions, Update
from tests.conftest import INSTALLED, twin_of
from tests.support.cases import (
    distribution_of,
    half_precision,
    norm_of,
    relative_error,
    state_of,
    stored,
)
from tests.support.disk import no_file_above
from tests.support.processes import STEP, run_side_by_side
from tests.support.random_models import qwen3_vl

OBJECTIVE = Objective(top_k=20)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("state")
    return twin_of(INSTALLED[0]).make_case(root, qwen3_vl(root / "model"))


@pytest.fixture(scope="module")
def opened(case):
    """Each backend's model, loaded once; a test takes a backend of it."""
    return cache(lambda name: twin_of(name).loaded(case, "float32"))


@pytest.fixture
def backend(opened, twin):
    return opened(twin.NAME).backend()


RUNS = {
    "cpu": ("cpu", {}),
    # An optimizer step in pieces of one and of several arrays.
    "mlx": ("mlx", {"gradient_bytes": 2**12}),
    # As on a GPU; for a CPU MLX asks for a compiler.
    "mlx, compiled": ("mlx", {"gradient_bytes": 2**12, "compiles": True}),
}


@pytest.fixture(params=[name for name, (backend, _) in RUNS.items() if backend in INSTALLED])
def stepping(request):
    """A backend's name and settings, in each of the ways in which one takes a step."""
    name, settings = RUNS[request.param]
    if settings.get("compiles") and not shutil.which("g++"):
        pytest.skip("no compiler")
    return name, settings


def drawn(optimizer, scale, seed):
    """A random gradient for all parameters, in float64."""
    rng, shapes = np.random.default_rng(seed), optimizer.parameters.items()
    made = {k: rng.normal(0, scale, tuple(value.shape)).astype(np.float32) for k, value in shapes}
    return {name: value.astype(np.float64) for name, value in made.items()}


def kept(twin, optimizer):
    """Copies of all that an optimizer keeps."""
    held = {"": optimizer.parameters, "first.": optimizer.first, "second.": optimizer.second}
    found = {
        f"{kind}{name}": value
        for kind, arrays in held.items()
        for name, value in twin.numbers(arrays).items()
    }
    return found | {"step": np.array(optimizer.step)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(value, expected[name]) for name, value in found.items())


def test_adamw_is_the_formula(opened, stepping):
    """Against numpy in float64.

    Kingma and Ba's bias-corrected moments, Loshchilov and Hutter's decoupled decay, and clipping by
    the global norm.
    """
    name, settings = stepping
    twin = twin_of(name)
    optimizer = twin.optimizer(opened(name), **settings)
    student = twin.numbers(optimizer.parameters)
    theta = {name: value.astype(np.float64) for name, value in student.items()}
    first, second = ({name: np.zeros_like(value) for name, value in theta.items()} for _ in "12")
    near, far = {"betas": (0.9, 0.99), "epsilon": 1e-6}, {"betas": (0.8, 0.95), "epsilon": 1e-8}
    updates = [
        Update(1e-2, **near, weight_decay=0.1, gradient_clip=1.0),
        Update(3e-3, **near, weight_decay=0.0, gradient_clip=None),
        Update(3e-3, **far, weight_decay=0.2, gradient_clip=1e6),
        Update(1e-2, **near, weight_decay=0.1, gradient_clip=0.5),
    ]
    for step, update in enumerate(updates, 1):
        before = {name: value.copy() for name, value in theta.items()}
        gradient = drawn(optimizer, 0.01 * step, step)
        norm = norm_of(gradient)
        clip, (b1, b2) = update.gradient_clip, update.betas
        factor = 1.0 if clip is None else min(1.0, clip / norm)
        for name in theta:
            g = factor * gradient[name]
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            theta[name] *= 1 - update.learning_rate * update.weight_decay
            root = np.sqrt(second[name] / (1 - b2**step))
            moved = first[name] / (1 - b1**step) / (root + update.epsilon)
            theta[name] -= update.learning_rate * moved
        result = optimizer.apply(twin.arrays(gradient), update)
        assert result.taken
        assert result.gradient_norm == pytest.approx(norm, rel=1e-6)
        assert norm > 0.5
        found = twin.numbers(optimizer.parameters)
        # The change of each step, not the parameters: those would hide an error of a small step.
        changed = {name: found[name].astype(np.float64) - before[name] for name in theta}
        expected = {name: theta[name] - before[name] for name in theta}
        assert relative_error(changed, expected) < 2e-4


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(opened, twin, poison):
    """Where one number of a gradient is not."""
    update = Update(1e-3, gradient_clip=1.0)
    optimizer = twin.optimizer(opened(twin.NAME))
    optimizer.apply(twin.arrays(drawn(optimizer, 0.1, 0)), update)
    before = kept(twin, optimizer)
    assert before["step"] == 1
    gradient = drawn(optimizer, 0.1, 1)
    next(value for name, value in gradient.items() if name.endswith(".norm.weight"))[0] = poison
    result = optimizer.apply(twin.arrays(gradient), update)
    assert not result.taken
    assert not np.isfinite(result.gradient_norm)
    assert_same(kept(twin, optimizer), before)
    assert optimizer.apply(twin.arrays(drawn(optimizer, 0.1, 2)), update).taken


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_backend_takes_no_step_that_is_not_finite(case, backend, tmp_path, poison):
    update = Update(1e-3, gradient_clip=1.0)
    backend.accumulate(case.groups, OBJECTIVE)
    assert backend.apply(update).taken
    before = state_of(backend, tmp_path)
    assert before["step"] == 1
    first, *others = case.groups[2].weights
    spoilt = replace(case.groups[2], weights=(np.full_like(first, poison), *others))
    backend.accumulate([spoilt, case.groups[0]], OBJECTIVE)
    result = backend.apply(update)
    assert not result.taken
    assert not np.isfinite(result.gradient_norm)
    assert_same(state_of(backend, tmp_path), before)
    assert norm_of(backend.tensors("gradient")) == 0
    backend.accumulate(case.groups, OBJECTIVE)
    assert backend.apply(update).taken


def test_the_teacher_is_the_closed_form_average(opened, stepping):
    """After k moves towards a student that stands still, (1 - rate)^k of the distance is left."""
    name, settings = stepping
    stepping = opened(name).backend(**settings)
    student, start = stepping.tensors("student"), stepping.tensors("teacher")
    for _ in range(5):
        stepping.move_teacher(0.05)
    before = stepping.tensors("teacher")
    for name, value in before.items():
        distance = start[name].astype(np.float64) - student[name]
        np.testing.assert_allclose(value, student[name] + 0.95**5 * distance, rtol=2e-6, atol=1e-7)
    stepping.move_teacher(0.0)
    assert_same(stepping.tensors("teacher"), before)
    stepping.move_teacher(1.0)
    assert_same(stepping.tensors("teacher"), student)


def test_small_steps_on_a_bfloat16_checkpoint_add_up(case, twin, tmp_path):
    """At a rate of 2e-6 a bfloat16 weight rounds every step away.

    Ten float32 steps move it by 2e-5, and the teacher after it.
    """
    folder = half_precision(tmp_path / "half", case.folder)
    optimizer = twin.optimizer(twin.opened(ModelOptions(folder, "bfloat16")))
    start = twin.numbers(optimizer.parameters)
    teacher = twin.arrays(start)
    for _ in range(10):
        ones = {name: np.ones_like(value) for name, value in start.items()}
        assert optimizer.apply(twin.arrays(ones), Update(2e-6)).taken
        twin.move(teacher, optimizer, 0.5)
    moved = twin.numbers(teacher)
    for name, value in twin.numbers(optimizer.parameters).items():
        np.testing.assert_allclose(start[name] - value, 2e-5, rtol=0.15)
        assert np.abs(moved[name] - start[name]).min() > 1e-5


def test_save_and_load_are_exact(case, twin, backend, tmp_path):
    backend.accumulate(case.groups, OBJECTIVE)
    backend.apply(Update(1e-3))
    backend.move_teacher(0.3)
    backend.save(tmp_path / "state")
    names = {"student.safetensors", "teacher.safetensors", "optimizer.safetensors"}
    assert {file.name for file in (tmp_path / "state").iterdir()} == names
    other = twin.load(ModelOptions(case.folder))
    other.accumulate(case.groups[:1], OBJECTIVE)
    other.load(tmp_path / "state")
    states = []
    for one in (backend, other):
        one.accumulate(case.groups[:2], OBJECTIVE)
        one.apply(Update(1e-3))
        one.move_teacher(0.3)
        states.append(state_of(one, tmp_path / "next"))
    assert_same(*states)
    assert states[0]["step"] == 2


def test_a_file_that_cannot_be_written(backend, tmp_path):
    (tmp_path / "student.safetensors").mkdir()
    with pytest.raises(OSError, match=r"student\.safetensors"):
        backend.save(tmp_path)


def test_a_full_disk_is_an_error_of_the_disk(backend, tmp_path):
    """safetensors has an error of its own for it."""
    with no_file_above(4096), pytest.raises(OSError, match=r"student\.safetensors"):
        backend.save(tmp_path)


def test_a_state_folder_that_does_not_fit(backend, tmp_path):
    with pytest.raises(FolderError, match=r"student\.safetensors"):
        backend.load(tmp_path)
    backend.save(tmp_path)
    before = backend.tensors("teacher")
    save_file({"other": np.zeros(3, np.float32)}, tmp_path / "teacher.safetensors")
    with pytest.raises(FolderError, match="not the tensors of this model"):
        backend.load(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"no")
    with pytest.raises(FolderError, match="cannot be read"):
        backend.load(tmp_path)
    assert_same(backend.tensors("teacher"), before)


@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_in_stock_libraries(twin, tmp_path, tied):
    """In transformers, and what MLX writes in mlx-vlm too: with the trained weights' numbers."""
    case = twin.make_case(tmp_path, qwen3_vl(tmp_path / "model", tied=tied))
    backend = case.backend()
    backend.accumulate(case.groups, OBJECTIVE)
    backend.apply(Update(1e-2))
    out = tmp_path / "out"
    backend.export(out, "model")
    found, source = (load_file(one / "model.safetensors") for one in (out, case.folder))
    shapes = ({name: value.shape for name, value in one.items()} for one in (found, source))
    assert next(shapes) == next(shapes)
    assert (out / "config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    assert (out / "tokenizer.json").is_file()
    group = case.groups[1]
    tokens = group.completions[0].tokens
    scored = backend.score([group], OBJECTIVE)[0][0].student_logprobs
    stock = [twin_of(name) for name in INSTALLED if name in ("cpu", twin.NAME)]
    for one in stock:
        logits = one.logits_of(one.exported(out), group.student, tokens)
        # The file is float32, whatever the backend computes in here.
        np.testing.assert_allclose(scored, distribution_of(logits)[range(1), tokens], atol=1e-5)
    before = twin.logits_of(case.stock(), group.student, tokens)
    assert np.abs(distribution_of(logits) - distribution_of(before)).max() > 1e-2
    with pytest.raises(RecipeError, match="adapter"):
        backend.export(tmp_path / "adapter", "adapter")


def test_export_keeps_the_checkpoints_precision(case, twin, tmp_path):
    """And what does not train is copied to the bit, whatever it computes in."""
    folder = half_precision(tmp_path / "half", case.folder)
    twin.load(ModelOptions(folder)).export(tmp_path / "out", "model")
    frozen = twin.load(ModelOptions(case.folder, "bfloat16", tune_vision=False))
    frozen.export(tmp_path / "frozen", "model")
    for source, exported in ((folder, "out"), (case.folder, "frozen")):
        before = stored(source / "model.safetensors")
        assert stored(tmp_path / exported / "model.safetensors") == before


def test_weights_in_several_files_and_a_copy_of_the_tied_head(case, twin, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(case.folder, folder)
    weights = load_file(case.folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    parts = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    if twin.NAME == "cpu":
        index["metadata"] = {}  # transformers asks for it
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    backend = twin.load(ModelOptions(folder))
    backend.export(tmp_path / "out", "model")
    files = {file.name for file in (tmp_path / "out").glob("*.safetensors*")}
    assert files == {"model.safetensors"}
    del weights["lm_head.weight"]
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), weights)
    assert_same(backend.tensors("student"), weights)


def drop_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.language_model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vi"}))


def other_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"] = np.ones(5, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def bare_config(folder):
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')


UP = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such model folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (bare_config, {"mlx": "no vision_config"}),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "safetensors"),
        (
            other_kind,
            {
                name: (
                    f"architecture 'qwen3_vi' is not supported by the {backend} backend; did you"
                    " mean 'qwen3_vl'"
                )
                for name, backend in (("cpu", "torch"), ("mlx", "mlx"))
            },
        ),
        (drop_tensor, f"tensor {UP} is missing (1 missing, 0 unknown)"),
        (other_shape, "model.language_model.norm.weight is (5,), not (48,)"),
    ],
)
def test_a_model_folder_that_cannot_be_used(case, twin, tmp_path, capfd, change, message):
    wanted = message if isinstance(message, str) else message.get(twin.NAME, "config.json")
    folder = tmp_path / "broken"
    shutil.copytree(case.folder, folder)
    change(folder)
    with pytest.raises(ModelError) as error:
        twin.load(ModelOptions(folder))
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_groups_without_tokens(case, backend):
    empty = Group(case.groups[0].student, case.groups[0].teacher, (), ())
    assert backend.accumulate([empty], OBJECTIVE) == [[]]
    assert backend.score([], OBJECTIVE) == []
    assert norm_of(backend.tensors("gradient")) == 0
    rows = backend.accumulate([empty, case.groups[0], empty], OBJECTIVE)
    assert [len(row) for row in rows] == [0, 3, 0]


@pytest.mark.slow
def test_two_processes_are_one(case, twin, tmp_path):
    """Each takes some of the groups; norm, step and sums are those of one process with all. The
    first writes what all hold."""
    groups = pickle.dumps(case.groups)
    environments = twin.processes(tmp_path)
    codes = run_side_by_side(twin.NAME, case.folder, groups, tmp_path, environments)
    assert codes == [0, 0]
    files = [
        {file.parent.name for file in (tmp_path / f"written-{rank}").rglob("*") if file.is_file()}
        for rank in range(2)
    ]
    assert files == [{"state", "model"}, set()]
    loaded = twin.opened(ModelOptions(case.folder))
    alone = loaded.backend()
    start = alone.tensors("student")
    for part in (case.groups[:2], case.groups[2:]):
        one = loaded.backend()
        one.accumulate(part, OBJECTIVE)
        assert norm_of(one.tensors("gradient")) > 0.1
    alone.accumulate(case.groups, OBJECTIVE)
    assert norm_of(one.tensors("gradient")) != pytest.approx(
        norm_of(alone.tensors("gradient")), rel=1e-3
    )
    result = alone.apply(STEP)
    assert result.gradient_norm > 0.1
    expected = {name: value - start[name] for name, value in alone.tensors("student").items()}
    for rank in range(2):
        found = dict(np.load(tmp_path / f"{rank}.npz"))
        assert float(found.pop("norm")) == pytest.approx(result.gradient_norm, rel=1e-5)
        assert found.pop("total").tolist() == [2.0, float(len(case.groups))]
        steps = {name: value - start[name] for name, value in found.items()}
        assert relative_error(steps, expected) < 1e-3
