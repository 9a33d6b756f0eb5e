"""Everything that a run and an export write has the permissions of new files: whom the umask lets
read, reads."""

from __future__ import annotations

import os
import stat

import pytest
from click.testing import CliRunner

from opd.models.permissions import as_new
from opd_cli import main
from tests.support.random_models import llava, qwen3_vl

FEW = (
    "--set measure.count=0 --set rollout.prompts=2 --set rollout.completions=2 "
    "--set run.checkpoint_every=1"
).split()


@pytest.fixture(params=[0o027, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def opd(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)


def check(root, umask):
    for path in (root, *root.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_run_and_its_exports(backend_name, umask, tmp_path):
    adapted = ["--set", "model.tune=lora", "--set", "model.rank=2"]
    if umask == 0o027:
        opd(
            *f"train tiny --backend {backend_name} --steps 1 --out".split(),
            tmp_path / "full",
            *FEW,
        )
        opd("export", tmp_path / "full", "--out", tmp_path / "model")
        check(tmp_path / "full", umask)
        check(tmp_path / "model", umask)
    else:
        opd(
            *f"train tiny --backend {backend_name} --steps 1 --out".split(),
            tmp_path / "lora",
            *FEW,
            *adapted,
        )
        opd("export", tmp_path / "lora", "--out", tmp_path / "adapter", "--as", "adapter")
        opd("export", tmp_path / "lora", "--out", tmp_path / "merged")
        for name in ("lora", "adapter", "merged"):
            check(tmp_path / name, umask)


def test_quantised(umask, tmp_path):
    pytest.importorskip("mlx_vlm")
    from opd_mlx import quantize

    source = qwen3_vl(tmp_path / "source", hidden=64, mlp=128, head_dim=16)
    for file in source.iterdir():
        file.chmod(0o700)
    (tmp_path / "out").mkdir()
    quantize(source, tmp_path / "out", 4)
    check(tmp_path / "out", umask)


def test_a_model_without_a_family_file(umask, tmp_path):
    """transformers writes these."""
    pytest.importorskip("torch")
    from opd.types import ModelOptions
    from opd_torch import load_cpu

    source = llava(tmp_path / "source")
    (source / "config.json").chmod(0o600)
    load_cpu(ModelOptions(source)).export(tmp_path / "out", "model")
    check(tmp_path / "out", umask)


def test_as_new(umask, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0o600)
    as_new(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
