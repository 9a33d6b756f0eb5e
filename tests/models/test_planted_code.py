"""Nothing from a model folder, a run, an adapter or a template is ever run, by any library that it
is handed to, nor copied.

Planted files leave a mark if they are run: Python that configurations name, pickles, and templates
that reach out.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from opd.data.images import open_image
from opd.errors import DataError, UserError
from opd.models import inert
from opd_cli import main
from tests.conftest import INSTALLED
from tests.support.random_models import qwen3_vl

FEW = [
    *("--set", "data.path=tiny", "--set", "measure.count=2", "--set", "measure.max_tokens=2"),
    *(
        "--set",
        "rollout.prompts=2",
        "--set",
        "rollout.completions=2",
        "--set",
        "run.checkpoint_every=1",
    ),
]
PLANTED = {
    "evil.py",
    "__init__.py",
    "evil.pyc",
    "evil.so",
    "run.sh",
    "setup.cfg",
    "pytorch_model.bin",
    "adapter_model.bin",
    "weights.npy",
}


class Pickled:
    """Runs when it is read."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def plant(folder, mark):
    """Puts files that leave `mark` into a folder, and names them wherever a library looks for
    names."""
    code = f"with open({str(mark)!r}, 'a') as mark:\n    mark.write('ran ')\n"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)
    for name in PLANTED:
        (folder / name).write_bytes(
            pickle.dumps(Pickled(code)) if name.endswith((".bin", ".npy")) else code.encode()
        )
    (folder / "run.sh").chmod(0o755)
    named = {
        "auto_map": dict.fromkeys(
            (
                "AutoConfig",
                "AutoModel",
                "AutoModelForImageTextToText",
                "AutoProcessor",
                "AutoImageProcessor",
            ),
            "evil.Evil",
        )
        | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "model_file": "evil.py",
        "custom_pipelines": {"image-text-to-text": {"impl": "evil.Evil"}},
        "trust_remote_code": True,
        "_attn_implementation": "evil/kernel:evil",
    }
    for name in (
        "config.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
    ):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            content |= named
            for part in ("text_config", "vision_config"):
                if part in content:
                    content[part] |= named
            (folder / name).write_text(json.dumps(content))
    return folder


def planted_in(folder):
    """Files of a folder that are no data, by name; and configurations that name code."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = [
        path
        for path in files
        if path.suffix == ".json" and any(f'"{key}"' in path.read_text() for key in inert.CODE)
    ]
    return [path.name for path in files if path.name in PLANTED | {"generate.py"}] + named


def opd(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module", params=INSTALLED)
def here(request, tmp_path_factory):
    """A planted model, a run that trained it, an adapter's run; then both runs are planted as
    well."""
    root = tmp_path_factory.mktemp(request.param)
    mark = root / "mark"
    model = plant(qwen3_vl(root / "model", hidden=64, mlp=128, head_dim=16), mark)
    for name, more in (
        ("full", []),
        ("lora", ["--set", "model.tune=lora", "--set", "model.rank=2"]),
    ):
        opd(
            "train",
            "tiny",
            "--model",
            model,
            *f"--backend {request.param} --steps 1 --out".split(),
            root / name,
            *FEW,
            *more,
        )
    assert not mark.exists()
    assert not planted_in(root / "full")
    assert not planted_in(root / "lora")
    plant(root / "full/model", mark)
    plant(root / "lora/adapter", mark)
    for folder in (root / "full", root / "full/checkpoints/step-000001"):
        (folder / "evil.py").write_text((model / "evil.py").read_text())
    return root, request.param


def test_commands_that_read_them(here):
    root, backend = here
    for folder in ("model", "full", "lora"):
        for command in ("gap", "sample"):
            opd(
                command,
                "tiny",
                "--model",
                root / folder,
                *f"--backend {backend} --count 1 --set data.path=tiny".split(),
            )
    opd("plan", "tiny", "--model", root / "model")
    assert not (root / "mark").exists()


@pytest.mark.parametrize(
    ("run", "more"),
    [
        ("full", []),
        ("full", ["--quantize", 4]),
        ("lora", ["--as", "adapter"]),
        ("lora", []),
        ("lora", ["--quantize", 8]),
    ],
    ids=["model", "quantised", "adapter", "merged", "merged and quantised"],
)
def test_exports(here, run, more, tmp_path):
    root, _ = here
    if "--quantize" in more:
        pytest.importorskip("mlx_vlm")
    opd("export", root / run, "--out", tmp_path / "out", *more)
    assert not (root / "mark").exists()
    assert not planted_in(tmp_path / "out")
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_an_unfinished_run(here, tmp_path):
    """The checkpoint is exported through the planted base."""
    root, backend = here
    shutil.copytree(root / "full", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    opd("export", tmp_path / "run", "--out", tmp_path / "out", "--backend", backend)
    assert not (root / "mark").exists()
    assert not planted_in(tmp_path / "out")


@pytest.mark.parametrize("kind", ["../evil", "os.path", "evil", "qwen3_vl.language", "QWEN3_VL"])
def test_names_of_modules(here, kind, tmp_path):
    """A model_type is looked up, and no module is imported by it."""
    root, backend = here
    folder = shutil.copytree(root / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    opd("gap", "tiny", "--model", folder, "--backend", backend, "--set", "data.path=tiny", code=2)
    if backend == "mlx":
        from opd_mlx import quantize

        with pytest.raises(UserError):
            quantize(folder, tmp_path / "out", 4)
    assert not (root / "mark").exists()


def test_a_folder_with_a_model_and_an_adapter(here, tmp_path):
    """transformers would load the adapter's base in place of the folder's own weights, where peft
    is installed."""
    _, backend = here
    other = qwen3_vl(tmp_path / "other", seed=5, hidden=64, mlp=128, head_dim=16)
    folder = qwen3_vl(tmp_path / "both", seed=6, hidden=64, mlp=128, head_dim=16)
    import numpy as np

    from opd import registry
    from opd.types import ModelOptions

    alone = registry.load(backend, ModelOptions(folder)).tensors("student")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(other)})
    )
    both = registry.load(backend, ModelOptions(folder)).tensors("student")
    assert all(np.array_equal(value, both[name]) for name, value in alone.items())


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ self.__init__.__globals__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% import 'evil.py' as evil %}",
        "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    ],
)
def test_templates_reach_nothing(here, template, tmp_path):
    root, backend = here
    mark = tmp_path / "mark"
    folder = shutil.copytree(root / "model", tmp_path / "model")
    for file in ("chat_template.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template.replace("MARK", str(mark)))
    opd("gap", "tiny", "--model", folder, "--backend", backend, "--set", "data.path=tiny", code=2)
    assert not mark.exists()
    assert not (root / "mark").exists()


def test_pickled_weights_alone_are_refused(here, tmp_path):
    root, backend = here
    folder = shutil.copytree(root / "model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    said = opd(
        "gap", "tiny", "--model", folder, "--backend", backend, "--set", "data.path=tiny", code=2
    ).stderr
    assert "pickled" in said
    assert not (root / "mark").exists()


@pytest.mark.parametrize("name", ["drawing.eps", "photo.png"])
def test_a_picture_that_is_a_program(name, tmp_path, monkeypatch):
    """PostScript, under any name: Pillow would have Ghostscript run it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\necho ran >> {tmp_path}/mark\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    (tmp_path / name).write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n(a) (w) file closefile\nshowpage\n"
    )
    with pytest.raises(DataError, match="an EPS drawing is a program"):
        open_image(tmp_path / name)
    row = {"image": name, "question": "What?", "boxes": [[1, 1, 9, 9]], "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    said = opd(
        "gap", "tiny", "--data", tmp_path / "rows.jsonl", "--set", "data.strict=true", code=2
    ).stderr
    assert "an EPS drawing is a program" in said
    assert not (tmp_path / "mark").exists()


def test_what_is_copied(tmp_path):
    """An allow list: a name that nobody has thought of is not copied."""
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    copied = [
        "config.json",
        "chat_template.jinja",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "README.md",
        "LICENSE",
    ]
    for name in (
        *copied,
        *PLANTED,
        "a.JSON.py",
        "LICENSE.py",
        "conftest",
        "requirements.txt",
        ".env",
        "model.safetensors",
        "x.gguf",
    ):
        (source / name).write_text("{}")
    (source / "sub").mkdir()
    (source / "sub/config.json").write_text("{}")
    inert.copy_files(source, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(copied)


def test_keys_at_any_depth():
    deep = {
        "a": [{"auto_map": 1, "b": {"model_file": "x", "c": 2}}],
        "auto_map": {},
        "d": "auto_map",
    }
    assert inert.without_code(deep) == {"a": [{"b": {"c": 2}}], "d": "auto_map"}


def test_the_plant_works(tmp_path):
    """What is planted would leave its mark: as Python, and unpickled."""
    (tmp_path / "model").mkdir()
    plant(tmp_path / "model", tmp_path / "mark")
    exec(compile((tmp_path / "model/evil.py").read_text(), "evil.py", "exec"))
    pickle.loads((tmp_path / "model/pytorch_model.bin").read_bytes())
    assert (tmp_path / "mark").read_text() == "ran ran "
    assert Path(tmp_path / "mark").is_file()
