"""The arrows between packages, seen by a fresh interpreter."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
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

GROUND = {
    "backend",
    "errors",
    "groups",
    "ids",
    "memory",
    "objective",
    "options",
    "paths",
    "planner",
    "prefetch",
    "progress",
    "randomness",
    "types",
    "version",
}
"""The modules that every room may import: `opd/*.py`."""

ROOMS: dict[str, set[str]] = {
    "tiny": set(),
    "models": {"tiny"},
    "data": {"tiny"},
    "prompts": {"models"},
    "registry": set(),
    "method": set(),
    "views": {"data"},
    "sheet": {"views", "data"},
    "measure": {"views", "method", "data"},
    "locate": {"views", "method", "data"},
    "testing": {"views", "prompts", "registry", "tiny"},
    "run": {
        "locate",
        "measure",
        "method",
        "views",
        "registry",
        "prompts",
        "data",
        "models",
        "tiny",
    },
    "plan": {"run", "method", "views", "registry", "prompts", "data", "models", "tiny"},
    "api": {"run", "measure", "data", "models"},
}
"""The rooms of `opd`, from the lowest floor up, and the rooms that each may import beside the
ground and itself."""

FOR_BACKENDS = {
    "models": {
        "adapters",
        "files",
        "inert",
        "names",
        "peft_files",
        "permissions",
        "settings",
        "shape",
        "weight_formats",
    },
    "method": {"rollout"},
}
"""What backends import beside the ground: the files of a model folder, and the bookkeeping of
completions."""


def modules(package: str) -> dict[str, Path]:
    """All modules of a package by name."""
    found = {}
    for file in sorted(PACKAGES[package].rglob("*.py")):
        parts = file.relative_to(PACKAGES[package].parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: Collection[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every module among the `known` that a file imports: at its top, in a
    function or for its types."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield node.lineno, inner if inner in known else node.module


def every_import(file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def room(module: str) -> str:
    """The room of a module of `opd`; "" for the ground, the package itself included."""
    name = module.split(".")[1] if "." in module else ""
    return "" if name in GROUND else name


def test_the_core_imports_no_framework():
    """Not even in a function: what a framework can tell, a backend says itself. Tokenizers and
    processors are transformers'."""
    for file in modules("opd").values():
        found = {name.partition(".")[0] for _, name in every_import(file)}
        assert not found & (HEAVY - {"transformers"}), file


def test_rooms_import_the_floors_below():
    known = modules("opd")
    assert {room(name) for name in known} == {"", *ROOMS}
    below: set[str] = set()
    for name, allowed in ROOMS.items():
        assert allowed <= below, f"{name} stands below a room that it may import"
        below.add(name)
    for name, file in known.items():
        for line, target in imports(file, known):
            # the package's own names are of any room
            if name == "opd" or room(target) in ("", room(name)):
                continue
            assert room(name), f"{file}:{line}: the ground imports {target}"
            assert room(target) in ROOMS[room(name)], (
                f"{file}:{line}: {room(name)} imports {target}"
            )


@pytest.mark.parametrize("package", ["opd_torch", "opd_mlx"])
def test_backends_import_the_ground_and_named_helpers(package):
    known = modules("opd")
    for file in modules(package).values():
        for line, target in imports(file, known):
            helper = target.split(".")[2] if target.count(".") > 1 else ""
            assert not room(target) or helper in FOR_BACKENDS.get(room(target), ()), (
                f"{file}:{line} imports {target}"
            )


@pytest.mark.parametrize("package", ["opd", "opd_cli"])
def test_no_imports_go_in_a_circle(package):
    known = modules(package)
    arrows = {
        name: {target for _, target in imports(file, known) if target != name}
        for name, file in known.items()
    }
    sorter = TopologicalSorter(arrows)
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def loaded_by(code: str) -> set[str]:
    path = [str(ROOT), str(ROOT / "backends"), str(ROOT / "cli")]
    script = (
        f"import sys; sys.path[:0] = {path!r}\n{code}\nprint(*{{name.partition('.')[0] for name in"
        " sys.modules})"
    )
    return set(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
    )


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
@pytest.mark.parametrize(
    ("given", "found"),
    [({}, opd_cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_of_torch_do_not_spin_for_long(given, found):
    """As libgomp itself says, which is loaded after the command line; what the user has set
    stays."""
    pytest.importorskip("torch")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    script = "from opd_cli import main; main(['--version']); import torch"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command,
        env={**kept, "OMP_DISPLAY_ENV": "verbose", **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{found}'" in done.stderr


def test_the_package_alone_loads_nothing():
    """Its public names are imported when they are used."""
    assert not loaded_by("import opd") & {*HEAVY, "numpy", "PIL", "pydantic"}


def test_the_core_loads_no_framework():
    rooms = ", ".join(name for name in modules("opd") if not name.endswith("render_child"))
    assert not loaded_by(f"import {rooms}") & HEAVY


def test_the_mlx_backend_needs_no_torch():
    pytest.importorskip("mlx")
    code = "import builtins, sys\nsys.modules['torch'] = None\nimport opd_mlx, opd_mlx.backend"
    assert {"mlx", "opd_mlx"} <= loaded_by(code)


def test_the_torch_backend_needs_no_mlx():
    pytest.importorskip("torch")
    assert not loaded_by("import opd_torch, opd_torch.backend") & {"mlx", "mlx_lm", "mlx_vlm"}


ONE_TWIN_ONLY = {
    "opd_torch": {
        "ragged.py": "rows are packed without padding; MLX pads them",
        "rows.py": "models without a family file run on torch alone",
        "families/decoder.py": "transformers' text modules are alike, so that one class reads them",
    },
    "opd_mlx": {
        "families/siglip.py": "the tower of two families; torch calls transformers' own",
    },
}
"""Files of one backend alone, and why. `kernels` differ, and say why in their `__init__.py`."""

ONE_NAME_ONLY = {
    "opd_torch": {
        "__init__.py": (
            "load_cpu load_cuda state_of_cpu state_of_cuda",
            "two backends in one package",
        ),
        "backend.py": ("TorchBackend", "each is named after its framework"),
        "batch.py": ("lay_out_completions", "slices share prompts that are laid out once"),
        "device.py": (
            "RecordStep RecordedStep record_graph",
            "token steps are recorded as CUDA graphs; MLX compiles them",
        ),
        "families/idefics3.py": (
            "SmolVLM tiles",
            "transformers has the same modules under two names",
        ),
        "families/qwen3_vl.py": ("QwenVision block embed", "Qwen2.5-VL shares parts of the tower"),
        "footprint.py": ("CPU CUDA", "torch plans for two kinds of devices"),
        "forward.py": (
            "begin prefill_to_decode reorder",
            "models without a family file decode with transformers' caches",
        ),
        "layers/gated_delta.py": ("gated_delta_rule", "MLX calls mlx-vlm's"),
        "layers/layer.py": (
            "Angles stack_prompts",
            "rotary factors are complex numbers, and caches of prompts are stacked",
        ),
        "model/files.py": (
            "STORED export_model read_tensors write_tensors",
            "MLX writes and reads by names of its own",
        ),
        "model/load.py": (
            "copy_model master_dtype read_model",
            "a module holds its parameters, so a teacher is a copy of it",
        ),
        "model/names.py": (
            "check_stored head_name stored_names trained_parameters",
            "modules have transformers' names",
        ),
        "model/quantised.py": ("NEEDED check_four_bits", "4 bits are bitsandbytes' there"),
        "objective.py": (
            "LARGEST_DIFFERENCE head_logits operand",
            "products take half precision on CUDA",
        ),
        "vision.py": ("Shape Size", "images of one size are stacked by shape"),
    },
    "opd_mlx": {
        "__init__.py": ("GROUP load quantize state", "one backend, which also quantises"),
        "backend.py": ("MlxBackend", "each is named after its framework"),
        "batch.py": ("Masks", "masks are given to layers; torch's layers ask for them"),
        "families/gemma3.py": (
            "KINDS",
            "transformers has the types of layers in its configuration",
        ),
        "families/qwen3_vl.py": (
            "QwenVL image_attention merged vision_angles",
            "mlx-vlm's towers are rewritten",
        ),
        "footprint.py": ("MLX", "MLX has one device"),
        "forward.py": ("warm", "features are evaluated before a forward is traced"),
        "gradient.py": (
            "LOOKED_UP PendingBackward RolloutPrefill Slice run_prompts",
            "a backward is an object; on torch a graph hangs on its tensors",
        ),
        "layers/attention.py": (
            "attend feed_forward rotary_factors rotate",
            "torch has them in kernels",
        ),
        "model/adapters.py": (
            "LinearLayers SIDES merge_adapter transposed",
            "peft's layers are torch's",
        ),
        "model/files.py": ("Checkpoint", "parameters are arrays by name"),
        "model/load.py": ("read_config stored_tensors", "transformers loads weights on torch"),
        "model/names.py": ("Parameters channels_last channels_second", "MLX keeps channels last"),
        "model/quantised.py": (
            "BITS GROUPS Quantisation TABLES dequantised quantisation quantise_alike",
            "4 bits are MLX's own format",
        ),
        "optimizer.py": ("zeros", "a gradient that nothing was added to, as arrays"),
        "sampling.py": ("UNIT", "a GPU of Apple's has no float64, so draws are whole numbers"),
    },
}
"""Public names of one backend alone, by file, and why."""


def public_names(package: str) -> dict[str, set[str]]:
    """Names without an underscore that each file defines, by its path in the package; without
    `kernels`."""
    found = {}
    for file in PACKAGES[package].rglob("*.py"):
        place = file.relative_to(PACKAGES[package])
        if place.parts[0] == "kernels":
            continue
        found[place.as_posix()] = names = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        names -= {name for name in names if name.startswith("_")}
    return found


@pytest.mark.parametrize(("ours", "theirs"), [("opd_torch", "opd_mlx"), ("opd_mlx", "opd_torch")])
def test_the_backends_are_twins(ours, theirs):
    """The same files with the same public names in both, apart from those listed with a reason."""
    mine, other = public_names(ours), public_names(theirs)
    assert mine.keys() - other.keys() == ONE_TWIN_ONLY[ours].keys()
    listed = {file: set(names.split()) for file, (names, _) in ONE_NAME_ONLY[ours].items()}
    more = {file: mine[file] - other[file] for file in mine.keys() & other.keys()}
    assert {file: names for file, names in more.items() if names} == listed


@pytest.mark.parametrize("package", ["opd_torch", "opd_mlx"])
def test_the_verbs_of_a_backend_are_short(package):
    """They hold no mathematics, and are read in one go."""
    assert len((PACKAGES[package] / "backend.py").read_text().splitlines()) <= 200
