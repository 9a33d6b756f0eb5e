"""The arrows between packages, seen by a fresh interpreter."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import opd_cli

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "opd": ROOT / "opd",
    "opd_torch": ROOT / "backends/opd_torch",
    "opd_mlx": ROOT / "backends/opd_mlx",
    "opd_cli": ROOT / "cli/opd_cli",
}
ALLOWED = {"opd": set(), "opd_torch": {"opd"}, "opd_mlx": {"opd"}, "opd_cli": {"opd"}}
HEAVY = {"torch", "mlx", "mlx_lm", "mlx_vlm", "transformers"}


def loaded_by(code: str) -> set[str]:
    path = [str(ROOT), str(ROOT / "backends"), str(ROOT / "cli")]
    script = f"import sys; sys.path[:0] = {path!r}\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package):
    for file in PACKAGES[package].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            ours = {name.partition(".")[0] for name in names} & PACKAGES.keys()
            assert ours <= ALLOWED[package] | {package}, f"{file}:{node.lineno}"


def test_the_command_line_loads_no_framework():
    help = "from opd_cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not loaded_by(help) & (HEAVY | {"numpy"})


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP elsewhere")
@pytest.mark.parametrize(("given", "found"), [({}, opd_cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_threads_of_torch_do_not_spin_for_long(given, found):
    """As libgomp itself says, which is loaded after the command line; what the user has set stays."""
    pytest.importorskip("torch")
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-m", "opd_cli", "backends", "cpu"]
    done = subprocess.run(command, env={**kept, "OMP_DISPLAY_ENV": "verbose", **given}, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{found}'" in done.stderr


def test_the_core_loads_no_framework():
    assert not loaded_by("import opd, opd.loop, opd.run, opd.testing, opd.toy, opd.tiny, opd.prompts, opd.data") & HEAVY


def test_the_mlx_backend_needs_no_torch():
    pytest.importorskip("mlx")
    code = "import builtins, sys\nsys.modules['torch'] = None\nimport opd_mlx, opd_mlx.backend"
    assert {"mlx", "opd_mlx"} <= loaded_by(code)


def test_the_torch_backend_needs_no_mlx():
    pytest.importorskip("torch")
    assert not loaded_by("import opd_torch, opd_torch.backend") & {"mlx", "mlx_lm", "mlx_vlm"}


MOVING = {
    *("adapters.py", "attention.py", "device.py", "footprint.py", "gradient.py", "model.py"),
    *("parts.py", "quantised.py", "ragged.py", "rows.py"),
}
"""Files that one backend has by now and the other not yet, or that are torch's alone (`ragged`, `rows`)."""


def test_the_backends_are_twins():
    """Same files in both, so that they can be read side by side."""
    torch, mlx = ({file.name for file in PACKAGES[name].glob("*.py")} for name in ("opd_torch", "opd_mlx"))
    assert torch ^ mlx <= MOVING
