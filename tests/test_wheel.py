"""The distribution builds, and holds the four packages, the presets and the embedded model."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_everything(tmp_path):
    command = [
        sys.executable,
        *"-m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir".split(),
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vision_opd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    sources = {
        str(file.relative_to(parent))
        for parent, package in (
            (ROOT, "opd"),
            (ROOT / "backends", "opd_torch"),
            (ROOT / "backends", "opd_mlx"),
            (ROOT / "cli", "opd_cli"),
        )
        for file in (parent / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert sources <= sizes.keys()
    assert {name.partition("/")[0] for name in sizes if "dist-info" not in name} == {
        "opd",
        "opd_torch",
        "opd_mlx",
        "opd_cli",
    }
    assert {
        f"{package}/py.typed" for package in ("opd", "opd_torch", "opd_mlx", "opd_cli")
    } <= sizes.keys()
    assert (
        1e6
        < sum(size for name, size in sizes.items() if name.startswith("opd/tiny/model/"))
        <= 4 * 2**20
    )
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "opd = opd_cli:main" in archive.read(entry_points).decode()
