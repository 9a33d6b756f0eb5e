"""Weights and logits that are no numbers: one clear error, on both backends, and nothing that looks
trained."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from opd import registry
from opd.errors import ModelError, RunError
from opd.tiny import MODEL
from opd.types import ModelOptions, Sampling
from opd_cli import main
from tests.support.random_models import FAMILIES, qwen3_vl

FEW = (
    "--set data.path=tiny --set measure.count=2 --set rollout.prompts=2 --set rollout.completions=2"
).split()


def broken(folder, part, value=np.nan, make=qwen3_vl):
    """A model with one value of the first tensor whose name has `part` replaced; and that name."""
    make(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


PLACES = [
    ("embed_tokens", np.nan),
    ("layers.1.mlp.down_proj", np.inf),
    ("visual", -np.inf),
    ("norm.weight", np.nan),
]


@pytest.mark.parametrize(
    ("part", "value", "tune"),
    [(*place, tune) for place, tune in zip(PLACES, ["full", "lora"] * 2, strict=True)],
)
def test_weights_that_are_no_numbers(backend_name, part, value, tune, tmp_path):
    """The tensor is named before the run folder is made, wherever it stands, trained or frozen."""
    name = broken(tmp_path / "model", part, value)
    given = [
        "--model",
        tmp_path / "model",
        "--backend",
        backend_name,
        "--set",
        f"model.tune={tune}",
        *FEW,
    ]
    result = CliRunner().invoke(
        main, [str(one) for one in ("train", "tiny", "--out", tmp_path / "run", *given)]
    )
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == ""
    assert f"model: weights hold NaN or infinity, in tensor {name}; " in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_other_families(backend_name, kind, tmp_path):
    name = broken(tmp_path / "model", "layers.0.mlp", make=FAMILIES[kind])
    with pytest.raises(ModelError, match="weights hold NaN") as caught:
        registry.load(backend_name, ModelOptions(tmp_path / "model"))
    assert name.split("model.")[-1] in str(caught.value)


def test_large_weights_are_numbers(backend_name, tmp_path):
    """A sum that is infinite says nothing of its parts."""
    broken(tmp_path / "model", "layers.0.mlp.down_proj", 3e38)
    tensors = load_file(tmp_path / "model/model.safetensors")
    name = next(name for name in tensors if "layers.0.mlp.down_proj" in name)
    tensors[name] = np.full_like(tensors[name], 3e38)
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    assert registry.load(backend_name, ModelOptions(tmp_path / "model"))


@pytest.fixture
def loaded(backend_name):
    from opd.prompts.encoder import PromptEncoder
    from opd.tiny import Scenes
    from opd.views.images import student_images

    scene = Scenes("train", 1)[0]
    prompt = PromptEncoder(MODEL).encode(student_images(scene), scene.question)
    return registry.load(backend_name, ModelOptions(MODEL)), prompt


def change(backend, folder, value, policy="student", step=None):
    """Sets the last layer's norm of a policy, and the count of steps, by way of a checkpoint."""
    backend.save(folder)
    weights = load_file(folder / f"{policy}.safetensors")
    weights["model.language_model.norm.weight"][:] = value
    save_file(weights, folder / f"{policy}.safetensors", {"format": "pt"})
    if step is not None:
        moments = load_file(folder / "optimizer.safetensors")
        save_file(moments, folder / "optimizer.safetensors", {"format": "pt", "step": str(step)})
    backend.load(folder)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "in tensor model.language_model.norm.weight"), (3e38, "although the weights are")],
)
def test_training_that_makes_them_so(loaded, tmp_path, temperature, value, said):
    """The step is named, and the tensor where it is one."""
    backend, prompt = loaded
    change(backend, tmp_path, value, step=7)
    with pytest.raises(RunError, match="after step 7 ") as caught:
        backend.sample([prompt, prompt], np.full((2, 2, 5), 0.5, np.float32), Sampling(temperature))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_before_training(loaded, tmp_path):
    backend, prompt = loaded
    change(backend, tmp_path, np.nan)
    with pytest.raises(ModelError, match=r"in tensor model\.language_model\.norm\.weight"):
        backend.sample([prompt], np.full((1, 1, 5), 0.5, np.float32), Sampling(1.0), "student")
    # The teacher is as it was.
    assert backend.sample([prompt], np.full((1, 1, 2), 0.5, np.float32), Sampling(1.0), "teacher")


def test_a_teacher_is_blamed_for_weights_of_its_own(loaded, tmp_path):
    """A teacher may go wrong alone, and the student's weights say nothing about it."""
    backend, prompt = loaded
    change(backend, tmp_path, np.nan, "teacher")
    with pytest.raises(ModelError, match=r"in tensor model\.language_model\.norm\.weight"):
        backend.sample([prompt], np.full((1, 1, 5), 0.5, np.float32), Sampling(1.0), "teacher")
    assert backend.sample([prompt], np.full((1, 1, 2), 0.5, np.float32), Sampling(1.0), "student")


def test_logits_are_looked_at_where_a_gpu_checks_seldom(loaded, twin, tmp_path):
    """A rollout that ends between two checks is checked at its end."""
    backend, prompt = twin.load(ModelOptions(MODEL), **twin.SELDOM), loaded[1]
    change(backend, tmp_path, np.nan)
    with pytest.raises(ModelError, match=r"in tensor model\.language_model\.norm\.weight"):
        backend.sample([prompt], np.full((1, 1, 5), 0.5, np.float32), Sampling(1.0))


class Breaking:
    """A backend whose student has a NaN when its teacher has moved."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def move_teacher(self, rate):
        self.backend.move_teacher(rate)
        with tempfile.TemporaryDirectory() as folder:
            change(self.backend, Path(folder), np.nan)


def breaking_cpu(options):
    return Breaking(registry.load("cpu", options))


def breaking_mlx(options):
    return Breaking(registry.load("mlx", options))


def test_a_run_that_breaks(backend_name, tmp_path, installed):
    """Exit code 1 and one line; there is no model."""
    installed(breaking={"cpu": breaking_cpu, "mlx": breaking_mlx}[backend_name])
    arguments = [
        *"train tiny --backend breaking --steps 3 --out".split(),
        str(tmp_path / "run"),
        "--json",
        *FEW,
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert result.stdout == ""
    assert "after step 1 weights hold NaN or infinity" in result.stderr
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/summary.json").exists()
    assert all(
        "NaN" not in json.dumps(json.loads(line))
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    )
