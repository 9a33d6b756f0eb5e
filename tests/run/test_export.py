"""`opd export`: what it writes is loaded by transformers and by mlx-vlm, and gives the same logits
there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from opd import registry
from opd.objective import Objective
from opd.prompts.encoder import PromptEncoder
from opd.tiny import Scenes
from opd.types import Completion, Group, ModelOptions
from opd.views.images import student_images
from opd_cli import main
from tests.support.random_models import qwen3_vl

FEW = (
    "--set measure.count=0 --set rollout.prompts=2 --set rollout.completions=2 "
    "--set run.checkpoint_every=1"
).split()


def opd(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def base(request, tmp_path_factory):
    """A random model whose language model can be quantised, with a tied head (also stored, as some
    writers do) and with its own."""
    folder = qwen3_vl(
        tmp_path_factory.mktemp("base"), hidden=64, mlp=128, head_dim=16, tied=request.param
    )
    if request.param:
        from safetensors.numpy import save_file

        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].copy()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["cpu", "mlx"])
def run(request, base, tmp_path_factory):
    """Two steps, at a rate that every tensor shows."""
    pytest.importorskip({"cpu": "torch", "mlx": "mlx"}[request.param])
    folder = tmp_path_factory.mktemp("runs") / "run"
    rate = ["--set", "optimizer.learning_rate=0.01", "--set", "optimizer.warmup_steps=0"]
    opd(
        "train",
        "tiny",
        "--model",
        base,
        *f"--backend {request.param} --steps 2 --out".split(),
        folder,
        *FEW,
        *rate,
    )
    return folder


def transformers_logits(folder, prompt):
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompt.tokens[None].astype(np.int64))
    images = {name: torch.tensor(value) for name, value in prompt.images.items()}
    types = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        return model(input_ids=ids, mm_token_type_ids=types, **images).logits[0].numpy()


def mlx_vlm_logits(folder, prompt):
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    model = load_model(Path(folder))
    ids = mx.array(prompt.tokens[None])
    pixels, grid = (mx.array(prompt.images[name]) for name in ("pixel_values", "image_grid_thw"))
    return np.array(
        model(ids, pixel_values=pixels, image_grid_thw=grid).logits[0].astype(mx.float32)
    )


def prompt_of(folder):
    scene = Scenes("train", 1)[0]
    return PromptEncoder(folder).encode(student_images(scene), scene.question)


def error(found, true):
    return np.linalg.norm(found - true) / np.linalg.norm(true)


def test_transformers_and_mlx_vlm_load_the_export_with_the_same_logits(run, base, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("mlx_vlm")
    out = tmp_path / "out"
    result = opd("export", run, "--out", out)
    assert result.stdout == f"model: {out}\n"
    needs = (
        "to load its processor, Qwen3VLProcessor, transformers needs torchvision beside it: pip"
        " install torchvision"
    )
    assert result.stderr.replace("\n", "").replace(
        " ", ""
    ) == f"exporting {run / 'model'}{needs}".replace(" ", "")
    prompt = prompt_of(out)
    logits = transformers_logits(out, prompt)
    assert error(mlx_vlm_logits(out, prompt), logits) < 1e-5
    assert error(transformers_logits(base, prompt), logits) > 0.01  # it was trained
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    before.pop(
        (
            "lm_head.weight"
            if json.loads((base / "config.json").read_text())["tie_word_embeddings"]
            else ""
        ),
        None,
    )
    assert {name: value.shape for name, value in after.items()} == {
        name: value.shape for name, value in before.items()
    }
    assert all(not np.array_equal(before[name], value) for name, value in after.items())
    # The student's own log-probabilities, as the backend that trained it has them.
    name = json.loads((run / "summary.json").read_text())["backend"]
    student = registry.load(name, ModelOptions(base))
    student.load(run / "checkpoints/step-000002")
    tokens = np.array([prompt.tokens[-1], 5, 9], np.int32)
    zeros = np.zeros(3, np.float32)
    group = Group(prompt, prompt, (Completion(tokens, zeros, False),), (zeros,))
    (((statistics,),),) = ([student.score([group], Objective())],)
    exact = logits[-1].astype(np.float64) - np.log(np.exp(logits[-1].astype(np.float64)).sum())
    assert statistics[0].student_logprobs[0] == pytest.approx(exact[tokens[0]], abs=2e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_vlm_loads_what_is_quantised(run, bits, tmp_path):
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("torch")
    out = tmp_path / "out"
    told = json.loads(opd("export", run, "--out", out, "--quantize", bits, "--json").stdout)
    assert told == {"run": str(run), "out": str(out), "as": "model", "step": 2, "quantize": bits}
    config = json.loads((out / "config.json").read_text())
    assert {key: config["quantization"][key] for key in ("group_size", "bits")} == {
        "group_size": 64,
        "bits": bits,
    }
    whole, packed = (
        load_file(run / "model/model.safetensors"),
        mx.load(str(out / "model.safetensors")),
    )
    # Every matrix of the language model is rounded as mx.quantize rounds; the vision tower stays
    # whole.
    restored = tmp_path / "restored"
    shutil.copytree(run / "model", restored)
    from safetensors.numpy import save_file

    matrices = [name for name, value in whole.items() if value.ndim == 2 and "visual" not in name]
    rounded = {}
    for name, value in whole.items():
        if name in matrices:
            value = np.array(mx.dequantize(*mx.quantize(mx.array(value), 64, bits), 64, bits))
        rounded[name] = value
    save_file(rounded, restored / "model.safetensors", metadata={"format": "pt"})
    assert sum(name.endswith(".scales") for name in packed) == sum(
        value.ndim == 2 and "visual" not in name for name, value in whole.items()
    )
    prompt = prompt_of(out)
    assert error(mlx_vlm_logits(out, prompt), transformers_logits(restored, prompt)) < 1e-4
    assert (
        error(transformers_logits(restored, prompt), transformers_logits(run / "model", prompt))
        > 1e-3
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "restored"]


def test_an_unfinished_run_gives_its_newest_checkpoint(backend_name, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    opd("train", "--backend", "cpu", "--steps", 3, "--out", run, *FEW)
    finished = load_file(run / "model/model.safetensors")
    shutil.rmtree(run / "model")
    result = opd("export", run, "--out", out, "--backend", backend_name)
    assert "is not finished: exporting its checkpoint of step 3, of 3" in result.stderr.replace(
        "\n", ""
    )
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == finished.keys()
    assert all(np.array_equal(exported[name], value) for name, value in finished.items())
    shutil.rmtree(run / "checkpoints/step-000003")
    assert (
        json.loads(opd("export", run, "--out", tmp_path / "earlier", "--json").stdout)["step"] == 2
    )
    earlier = load_file(tmp_path / "earlier/model.safetensors")
    assert all(not np.array_equal(earlier[name], value) for name, value in finished.items())
    again = json.loads(
        opd("gap", "--model", out, "--count", 2, "--backend", "cpu", "--json").stdout
    )
    assert again["rows"] == 2


def test_an_adapter_is_given_as_the_run_left_it(tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "config.toml").write_text('[model]\ntune = "lora"\n')
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / "adapter" / name).write_text("{}")
    opd("export", run, "--as", "adapter", "--out", tmp_path / "out")
    exported = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert exported == ["adapter_config.json", "adapter_model.safetensors", "recipe.toml"]
