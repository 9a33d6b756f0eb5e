"""The MLX backend's optimizer, teacher, files and processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_vlm.utils import load_model
from safetensors.numpy import load_file, save_file

import opd_mlx
from opd.errors import FolderError, ModelError, RecipeError
from opd.objective import Objective
from opd.types import Group, ModelOptions, Update
from opd_mlx import gradient
from tests.support.mlx_cases import clone, distribution, make_case, relative_error
from tests.support.random_models import qwen3_vl

OBJECTIVE = Objective(top_k=20)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("state")
    return make_case(root, qwen3_vl(root / "model"))


@pytest.fixture(scope="module")
def loaded(case):
    return case.backend()


@pytest.fixture
def backend(loaded):
    return clone(loaded)


def fill(backend, scale, seed):
    """Puts a random gradient in place of an accumulated one; returns it in float64, by Hugging Face name."""
    rng = np.random.default_rng(seed)
    backend._gradient = {
        name: mx.array((scale * rng.normal(size=parameter.shape)).astype(np.float32)) for name, parameter in backend._student.items()
    }
    return {name: value.astype(np.float64) for name, value in backend.tensors("gradient").items()}


def moments(backend):
    """First and second moments, as numpy."""
    both = {"first": backend._optimizer.first, "second": backend._optimizer.second}
    return {f"{kind}.{name}": np.array(value) for kind, values in both.items() for name, value in values.items()}


def norm_of(tensors):
    return float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in tensors.values())))


@pytest.fixture(params=["one by one", "compiled"])
def kernels(request):
    """Traits of a device that runs a step as a CPU does, and as a GPU does; on a CPU MLX asks for a compiler."""
    if request.param == "compiled" and not shutil.which("g++"):
        pytest.skip("no compiler")
    # Pieces of one and of several arrays.
    return {"compiles": request.param == "compiled", "gradient_bytes": 2**12}


def test_adamw_is_the_formula(loaded, kernels):
    """Kingma and Ba's bias-corrected moments, Loshchilov and Hutter's decoupled decay, clipping by global norm; in numpy float64."""
    backend = clone(loaded, **kernels)
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
    before, kept, step = backend.tensors("student"), moments(backend), backend._optimizer.step
    fill(backend, 0.1, 1)
    backend._gradient["language_model.model.norm.weight"][0] = poison
    result = backend.apply(update)
    assert not result.taken
    assert not np.isfinite(result.gradient_norm)
    assert backend._optimizer.step == step
    assert all(np.array_equal(value, kept[name]) for name, value in moments(backend).items())
    assert all(np.array_equal(value, before[name]) for name, value in backend.tensors("student").items())
    assert norm_of(backend.tensors("gradient")) == 0
    fill(backend, 0.1, 2)
    assert backend.apply(update).taken


def test_the_teacher_is_the_closed_form_average(loaded, kernels):
    """After k moves towards a student that stands still, (1 - rate)^k of the distance is left."""
    backend = clone(loaded, **kernels)
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
    weights = {name: value.astype(mx.bfloat16) for name, value in mx.load(str(source / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


def test_small_steps_on_a_bfloat16_checkpoint_add_up(case, tmp_path):
    """At lr 2e-6 a bfloat16 weight would round every step away; ten float32 steps move it by 2e-5, and the teacher after it."""
    backend = opd_mlx.load(ModelOptions(half_precision(tmp_path / "half", case.folder), "bfloat16"))
    start = backend.tensors("student")
    for _ in range(10):
        backend._gradient = {name: mx.ones_like(value) for name, value in backend._student.items()}
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
    other = opd_mlx.load(ModelOptions(case.folder))
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


def test_a_file_that_cannot_be_written(backend, tmp_path):
    (tmp_path / "student.safetensors").mkdir()
    with pytest.raises(OSError, match=r"student\.safetensors"):
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
    assert all(np.array_equal(value, before[name]) for name, value in backend.tensors("teacher").items())


@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_in_transformers_and_mlx_vlm(tmp_path, tied):
    case = make_case(tmp_path, qwen3_vl(tmp_path / "model", tied=tied))
    backend = case.backend()
    backend.accumulate(case.groups, OBJECTIVE)
    backend.apply(Update(1e-2))
    backend.export(tmp_path / "out", "model")
    found, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", case.folder))
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in source.items()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    group = case.groups[1]
    tokens = group.completions[0].tokens
    scored = backend.score([group], OBJECTIVE)[0][0].student_logprobs
    stock = distribution(load_model(tmp_path / "out"), group.student, tokens, 1.0, ())
    np.testing.assert_allclose(scored, stock[range(1), tokens], atol=1e-5)
    assert np.abs(stock - distribution(case.stock(), group.student, tokens, 1.0, ())).max() > 1e-2
    with pytest.raises(RecipeError, match="adapter"):
        backend.export(tmp_path / "adapter", "adapter")
    torch = pytest.importorskip("torch")
    from tests.support.torch_cases import stock_logits, transformers

    model, problems = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert not any(problems[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        np.testing.assert_allclose(stock, stock_logits(model, group.student, tokens).log_softmax(-1).numpy(), atol=1e-5)


def test_export_keeps_the_checkpoints_precision(case, tmp_path):
    """And what does not train is copied to the bit, whatever it computes in."""
    folder = half_precision(tmp_path / "half", case.folder)
    opd_mlx.load(ModelOptions(folder)).export(tmp_path / "out", "model")
    opd_mlx.load(ModelOptions(case.folder, "bfloat16", tune_vision=False)).export(tmp_path / "frozen", "model")
    for source, exported in ((folder, tmp_path / "out"), (case.folder, tmp_path / "frozen")):
        before, after = (mx.load(str(one / "model.safetensors")) for one in (source, exported))
        assert after.keys() == before.keys()
        assert all(value.dtype == before[name].dtype and mx.array_equal(value, before[name]) for name, value in after.items())


def test_weights_in_several_files_and_a_copy_of_the_tied_head(case, tmp_path):
    shutil.copytree(case.folder, tmp_path / "shards")
    weights = load_file(case.folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    parts = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, tmp_path / "shards" / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "shards" / "model.safetensors").unlink()
    backend = opd_mlx.load(ModelOptions(tmp_path / "shards"))
    backend.export(tmp_path / "out", "model")
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors*")} == {"model.safetensors"}
    del weights["lm_head.weight"]
    for tensors in (load_file(tmp_path / "out" / "model.safetensors"), backend.tensors("student")):
        assert tensors.keys() == weights.keys()
        assert all(np.array_equal(value, weights[name]) for name, value in tensors.items())


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
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vi"}))


def other_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"] = np.ones(5, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such model folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3_vl"}'), "no vision_config"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half a file"), "safetensors"),
        (other_kind, "architecture 'qwen3_vi' is not supported by the mlx backend; did you mean 'qwen3_vl'"),
        (drop_tensor, "tensor model.language_model.layers.1.mlp.up_proj.weight is missing (1 missing, 0 unknown)"),
        (other_shape, "model.language_model.norm.weight is (5,), not (48,)"),
    ],
)
def test_a_model_folder_that_cannot_be_used(case, tmp_path, capfd, change, message):
    with pytest.raises(ModelError) as error:
        opd_mlx.load(ModelOptions(broken(case.folder, tmp_path / "broken", change)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_groups_without_tokens(case, backend):
    empty = Group(case.groups[0].student, case.groups[0].teacher, (), ())
    assert backend.accumulate([empty], OBJECTIVE) == [[]]
    assert backend.score([], OBJECTIVE) == []
    assert norm_of(backend.tensors("gradient")) == 0


def test_groups_without_tokens_are_not_computed(case, backend, monkeypatch):
    prompts = []
    real = gradient.lay_out
    monkeypatch.setattr(gradient, "lay_out", lambda given, completions: prompts.append(len(given)) or real(given, completions))
    empty = Group(case.groups[1].student, case.groups[1].teacher, (), ())
    assert [len(row) for row in backend.accumulate([empty, case.groups[0], empty], OBJECTIVE)] == [0, 3, 0]
    assert prompts == [1, 1]


# So large an epsilon makes the step proportional to the clipped gradient.
STEP = Update(1.0, epsilon=1.0, gradient_clip=0.1)

PROCESS = """
import pickle, sys
import numpy as np
import opd_mlx
from opd.objective import Objective
from opd.types import ModelOptions, Update

STEP = Update(1.0, epsilon=1.0, gradient_clip=0.1)
folder, pickled, out = sys.argv[1:]
groups = pickle.load(open(pickled, "rb"))
backend = opd_mlx.load(ModelOptions(folder))
mine = groups[backend.rank :: backend.size]
backend.accumulate(mine, Objective(top_k=20))
result = backend.apply(STEP)
total = backend.total(np.array([1.0, len(mine)]))
np.savez(f"{out}/{backend.rank}.npz", norm=result.gradient_norm, total=total, **backend.tensors("student"))
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_two_processes_are_one(case, tmp_path):
    """Each takes half of the groups; gradient norm, step and sums are those of one process with all."""
    (tmp_path / "groups").write_bytes(pickle.dumps(case.groups))
    root = Path(__file__).parents[3]
    paths = ":".join(str(root / part) for part in (".", "backends"))
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    environment = {**os.environ, "PYTHONPATH": paths, "MLX_HOSTFILE": str(hosts)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(case.folder), str(tmp_path / "groups"), str(tmp_path)],
            env=environment | {"MLX_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    alone = opd_mlx.load(ModelOptions(case.folder))
    alone.accumulate(case.groups, OBJECTIVE)
    start = alone.tensors("student")
    result = alone.apply(STEP)
    assert result.gradient_norm > 0.1
    for rank in range(2):
        found = dict(np.load(tmp_path / f"{rank}.npz"))
        assert float(found.pop("norm")) == pytest.approx(result.gradient_norm, rel=1e-5)
        assert found.pop("total").tolist() == [2.0, float(len(case.groups))]
        steps = {name: value - start[name] for name, value in found.items()}
        assert relative_error(steps, {name: value - start[name] for name, value in alone.tensors("student").items()}) < 1e-3
