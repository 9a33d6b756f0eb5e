"""The torch backend's optimizer, teacher, files and processes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import opd_torch
from opd.errors import FolderError, ModelError, OutOfMemory, RecipeError
from opd.objective import Objective
from opd.types import Group, ModelOptions, Update
from opd_torch.objective import HeadResult
from opd_torch.sampling import draw
from tests.support.random_models import qwen3_vl
from tests.support.torch_cases import clone, make_case, relative_error, stock_logits

OBJECTIVE = Objective(top_k=20)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("state")
    return make_case(root, qwen3_vl(root / "model"))


@pytest.fixture(scope="module")
def loaded(case):
    return case.backend("float32")


@pytest.fixture
def backend(loaded):
    return clone(loaded)


def fill(backend, scale, seed):
    """Puts a random gradient in place of an accumulated one; returns it in float64."""
    rng = np.random.default_rng(seed)
    backend._gradient = {
        name: torch.from_numpy((scale * rng.normal(size=tuple(parameter.shape))).astype(np.float32))
        for name, parameter in backend._student.parameters.items()
    }
    return {name: value.astype(np.float64) for name, value in backend.tensors("gradient").items()}


def norm_of(tensors):
    return float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in tensors.values())))


def test_adamw_is_the_formula(backend):
    """Kingma and Ba's bias-corrected moments, Loshchilov and Hutter's decoupled decay, clipping by global norm; in numpy float64."""
    theta = {name: value.astype(np.float64) for name, value in backend.tensors("student").items()}
    first, second = ({name: np.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    updates = [
        Update(learning_rate=1e-2, betas=(0.9, 0.99), epsilon=1e-6, weight_decay=0.1, gradient_clip=1.0),
        Update(learning_rate=3e-3, betas=(0.9, 0.99), epsilon=1e-6, weight_decay=0.0, gradient_clip=None),
        Update(learning_rate=3e-3, betas=(0.8, 0.95), epsilon=1e-8, weight_decay=0.2, gradient_clip=1e6),
        Update(learning_rate=1e-2, betas=(0.9, 0.99), epsilon=1e-6, weight_decay=0.1, gradient_clip=0.5),
    ]
    for step, update in enumerate(updates, 1):
        before = {name: value.copy() for name, value in theta.items()}
        gradient = fill(backend, 0.01 * step, step)
        norm = norm_of(gradient)
        factor = 1.0 if update.gradient_clip is None else min(1.0, update.gradient_clip / norm)
        for name in theta:
            g = factor * gradient[name]
            first[name] = update.betas[0] * first[name] + (1 - update.betas[0]) * g
            second[name] = update.betas[1] * second[name] + (1 - update.betas[1]) * g**2
            theta[name] *= 1 - update.learning_rate * update.weight_decay
            theta[name] -= (
                update.learning_rate
                * (first[name] / (1 - update.betas[0] ** step))
                / (np.sqrt(second[name] / (1 - update.betas[1] ** step)) + update.epsilon)
            )
        result = backend.apply(update)
        assert result.taken
        assert result.gradient_norm == pytest.approx(norm, rel=1e-6)
        assert norm > 0.5
        found = backend.tensors("student")
        # The change of each step, not the parameters: those would hide an error of a small step.
        changed = {name: found[name].astype(np.float64) - before[name] for name in theta}
        assert relative_error(changed, {name: theta[name] - before[name] for name in theta}) < 2e-4
        assert norm_of(backend.tensors("gradient")) == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(backend, poison):
    update = Update(1e-3, gradient_clip=1.0)
    fill(backend, 0.1, 0)
    backend.apply(update)
    before, moments, step = (
        backend.tensors("student"),
        {n: v.clone() for n, v in backend._optimizer.moments.items()},
        backend._optimizer.step,
    )
    fill(backend, 0.1, 1)
    backend._gradient["model.language_model.norm.weight"][0] = poison
    result = backend.apply(update)
    assert not result.taken
    assert not np.isfinite(result.gradient_norm)
    assert backend._optimizer.step == step
    assert all(torch.equal(value, moments[name]) for name, value in backend._optimizer.moments.items())
    assert all(np.array_equal(value, before[name]) for name, value in backend.tensors("student").items())
    assert norm_of(backend.tensors("gradient")) == 0
    fill(backend, 0.1, 2)
    assert backend.apply(update).taken


def test_the_teacher_is_the_closed_form_average(backend):
    """After k moves towards a student that stands still, (1 - rate)^k of the distance is left."""
    student, start = backend.tensors("student"), backend.tensors("teacher")
    for _ in range(5):
        backend.move_teacher(0.05)
    for name, value in backend.tensors("teacher").items():
        expected = student[name] + 0.95**5 * (start[name].astype(np.float64) - student[name])
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-7)
    before = backend.tensors("teacher")
    backend.move_teacher(0.0)
    assert all(np.array_equal(value, before[name]) for name, value in backend.tensors("teacher").items())
    backend.move_teacher(1.0)
    assert all(np.array_equal(value, student[name]) for name, value in backend.tensors("teacher").items())


def half_precision(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder)
    weights = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_full_disk_is_an_error_of_the_disk(loaded, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""

    def full(*arguments, **more):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("opd_torch.model.files.save_file", full)
    with pytest.raises(OSError, match=r"student.safetensors: I/O error: No space left on device"):
        clone(loaded).save(tmp_path)


def test_small_steps_on_a_bfloat16_checkpoint_add_up(case, tmp_path):
    """At lr 2e-6 a bfloat16 weight would round every step away; ten float32 steps move it by 2e-5, and the teacher after it."""
    backend = opd_torch.load_cpu(ModelOptions(half_precision(tmp_path / "half", case.folder), "bfloat16"))
    start = backend.tensors("student")
    for _ in range(10):
        backend._gradient = {name: torch.ones_like(value) for name, value in backend._student.parameters.items()}
        assert backend.apply(Update(2e-6)).taken
        backend.move_teacher(0.5)
    for name, value in backend.tensors("student").items():
        np.testing.assert_allclose(start[name] - value, 2e-5, rtol=0.15)
        assert np.abs(backend.tensors("teacher")[name] - start[name]).min() > 1e-5


def test_save_and_load_are_exact(case, backend, tmp_path):
    backend.accumulate(case.groups, OBJECTIVE)
    backend.apply(Update(1e-3))
    backend.move_teacher(0.3)
    backend.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"student.safetensors", "teacher.safetensors", "optimizer.safetensors"}
    other = opd_torch.load_cpu(ModelOptions(case.folder))
    other.accumulate(case.groups[:1], OBJECTIVE)
    other.load(tmp_path)
    for one in (backend, other):
        one.accumulate(case.groups[:2], OBJECTIVE)
        one.apply(Update(1e-3))
        one.move_teacher(0.3)
    for kind in ("student", "teacher"):
        expected = backend.tensors(kind)
        assert all(np.array_equal(value, expected[name]) for name, value in other.tensors(kind).items())
    assert other._optimizer.step == 2


def test_a_state_folder_that_does_not_fit(backend, tmp_path):
    with pytest.raises(FolderError, match=r"student\.safetensors"):
        backend.load(tmp_path)
    backend.save(tmp_path)
    before = backend.tensors("teacher")
    save_file({"other": torch.zeros(3)}, tmp_path / "teacher.safetensors")
    with pytest.raises(FolderError, match="not the tensors of this model"):
        backend.load(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"no")
    with pytest.raises(FolderError, match="cannot be read"):
        backend.load(tmp_path)
    assert all(np.array_equal(value, before[name]) for name, value in backend.tensors("teacher").items())


@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_in_transformers(tmp_path, tied):
    case = make_case(tmp_path, qwen3_vl(tmp_path / "model", tied=tied))
    backend = case.backend("float64")
    backend.accumulate(case.groups, OBJECTIVE)
    backend.apply(Update(1e-2))
    backend.export(tmp_path / "out", "model")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names == set(load_file(case.folder / "model.safetensors"))
    assert (tmp_path / "out" / "config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    model, found = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    group = case.groups[1]
    with torch.no_grad():
        wanted = stock_logits(model, group.student, group.completions[0].tokens).log_softmax(-1)
        before = stock_logits(case.stock(), group.student, group.completions[0].tokens).log_softmax(-1)
    scored = backend.score([group], OBJECTIVE)[0][0].student_logprobs
    # The file is float32, the backend here float64.
    np.testing.assert_allclose(scored, wanted[range(1), group.completions[0].tokens], rtol=1e-5)
    assert float((wanted - before).abs().max()) > 1e-2
    with pytest.raises(RecipeError, match="adapter"):
        backend.export(tmp_path / "adapter", "adapter")


def test_export_keeps_the_checkpoints_precision(case, tmp_path):
    folder = half_precision(tmp_path / "half", case.folder)
    opd_torch.load_cpu(ModelOptions(folder)).export(tmp_path / "out", "model")
    source = load_file(folder / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == source.keys()
    assert all(torch.equal(value, source[name]) and value.dtype == torch.bfloat16 for name, value in exported.items())


def broken(source, folder, change):
    shutil.copytree(source, folder)
    change(folder)
    return folder


def drop_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.language_model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_v"}))


def other_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"] = torch.ones(5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such model folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half a file"), "safetensors"),
        (other_kind, "architecture 'qwen3_v' is not supported by the torch backend; did you mean 'qwen3_vl'"),
        (drop_tensor, "tensor model.language_model.layers.1.mlp.up_proj.weight is missing (1 missing, 0 unknown)"),
        (other_shape, "model.language_model.norm.weight is (5,), not (48,)"),
    ],
)
def test_a_model_folder_that_cannot_be_used(case, tmp_path, capfd, change, message):
    with pytest.raises(ModelError) as error:
        opd_torch.load_cpu(ModelOptions(broken(case.folder, tmp_path / "broken", change)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_call_that_fails(case, backend, monkeypatch):
    """It leaves no gradient, of other calls neither, so that nothing half done is applied."""
    backend.accumulate(case.groups[:1], OBJECTIVE)
    before = backend.tensors("gradient")

    def fails(*arguments: object) -> HeadResult:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(HeadResult, "records", fails)
    with pytest.raises(OutOfMemory, match="out of memory: no "):
        backend.accumulate(case.groups, OBJECTIVE)
    assert norm_of(before) > 0
    assert norm_of(backend.tensors("gradient")) == 0


def test_groups_without_tokens(case, backend):
    empty = Group(case.groups[0].student, case.groups[0].teacher, (), ())
    assert backend.accumulate([empty], OBJECTIVE) == [[]]
    assert backend.score([], OBJECTIVE) == []
    assert norm_of(backend.tensors("gradient")) == 0


def test_draw_takes_no_token_of_probability_zero():
    """Uniforms at both ends of the unit interval, with impossible tokens there: the first and last possible ones are drawn."""
    size = 5_000
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = -1e9
    logits[:, -3:] = -1e9
    uniforms = torch.tensor([0.0, 1.0 - 2.0**-24])
    tokens, logprobs = draw(logits, torch.eye(size), uniforms, 1.0, torch.tensor([3, size - 4]))
    assert tokens.tolist() == [4, size - 5]
    possible = logits.double()
    possible[:, [3, size - 4]] = -torch.inf
    np.testing.assert_allclose(logprobs, possible.log_softmax(-1)[range(2), tokens], rtol=1e-5)


# So large an epsilon makes the step proportional to the clipped gradient.
STEP = Update(1.0, epsilon=1.0, gradient_clip=0.1)

PROCESS = """
import os, pickle, sys
import numpy as np
import torch
import opd_torch
from opd.objective import Objective
from opd.types import ModelOptions, Update

torch.set_num_threads(1)
STEP = Update(1.0, epsilon=1.0, gradient_clip=0.1)
folder, pickled, out = sys.argv[1:]
groups = pickle.load(open(pickled, "rb"))
backend = opd_torch.load_cpu(ModelOptions(folder))
mine = (groups[:2], groups[2:])[backend.rank]
backend.accumulate(mine, Objective(top_k=20))
result = backend.apply(STEP)
total = backend.total(np.array([1.0, len(mine)]))
np.savez(f"{out}/{backend.rank}.npz", norm=result.gradient_norm, total=total, **backend.tensors("student"))
"""


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_two_processes_are_one(case, tmp_path):
    """Each takes some of the groups; gradient norm, step and sums are those of one process with all."""
    import pickle

    (tmp_path / "groups").write_bytes(pickle.dumps(case.groups))
    root = Path(__file__).parents[3]
    paths = ":".join(str(root / part) for part in (".", "backends"))
    environment = {
        "PYTHONPATH": paths,
        "PATH": "",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "HOME": str(tmp_path),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(case.folder), str(tmp_path / "groups"), str(tmp_path)],
            env=environment | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    alone = opd_torch.load_cpu(ModelOptions(case.folder))
    alone.accumulate(case.groups, OBJECTIVE)
    start = alone.tensors("student")
    result = alone.apply(STEP)
    assert result.gradient_norm > 0.1
    for part in (case.groups[:2], case.groups[2:]):
        alone.accumulate(part, OBJECTIVE)
        assert 0.1 < norm_of(alone.tensors("gradient")) != pytest.approx(result.gradient_norm, rel=1e-3)
        alone._gradient = {}
    for rank in range(2):
        found = dict(np.load(tmp_path / f"{rank}.npz"))
        assert float(found.pop("norm")) == pytest.approx(result.gradient_norm, rel=1e-5)
        assert found.pop("total").tolist() == [2.0, float(len(case.groups))]
        steps = {name: value - start[name] for name, value in found.items()}
        assert relative_error(steps, {name: value - start[name] for name, value in alone.tensors("student").items()}) < 1e-3
