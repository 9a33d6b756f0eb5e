"""Copies a model folder without anything that could run code.

A folder may come from anybody. Libraries run Python that a folder brings (`auto_map` in
transformers, `model_file` in mlx-vlm and mlx-lm), download kernels that a configuration names, or
load other files that it names. So libraries and exports get an inert copy: data files only, without
the keys that name code.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from opd.models import files as model_files

DATA = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.md",
    "merges.txt",
    "vocab.txt",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
)
"""Patterns of the files that are copied beside the weights; no other files are."""

LEFT_OUT = (
    "*.safetensors.index.json",
    "*.bin.index.json",
    "adapter_config.json",
    "offload_index.json",
)
"""Exceptions from DATA: indexes of weights, which the writer of weights writes anew, and files that
make a library load other weights."""

RESULT = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Patterns of the files that a run's result has beside DATA: weights and adapter_config.json."""

LARGE = ("tokenizer.json", "vocab.json")
"""Large files that are copied unread: the code that loads them reads tables only."""

CODE = (
    "auto_map",
    "model_file",
    "custom_pipelines",
    "custom_generate",
    "trust_remote_code",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "kernel_config",
    "use_kernels",
    "transformers_weights",
    "auto_mapping",
    "megatron_core",
)
"""Keys, at any depth of a configuration, whose values name Python to run, kernels to download, or
other files to load."""


def is_data(name: str) -> bool:
    """Whether a file of this name is copied beside the weights."""
    return any(fnmatch(name, pattern) for pattern in DATA) and not any(
        fnmatch(name, pattern) for pattern in LEFT_OUT
    )


def without_code(value: Any) -> Any:
    """`value`, parsed JSON, without the keys in CODE at any depth."""
    if isinstance(value, dict):
        return {key: without_code(inner) for key, inner in value.items() if key not in CODE}
    return [without_code(inner) for inner in value] if isinstance(value, list) else value


def copy_files(source: Path, folder: Path, names: Collection[str] | None = None) -> None:
    """Copies the data files of the model folder `source`, without weights, into `folder`; with
    `names`, those files only. Raises ModelError if a file cannot be read.

    The copies have the permissions of new files.
    """
    for file in sorted(source.iterdir()):
        if (
            not file.is_file()
            or not is_data(file.name)
            or (names is not None and file.name not in names)
        ):
            continue
        target = folder / file.name
        if file.suffix == ".json" and file.name not in LARGE:
            content = model_files.read_json(file)
            plain = without_code(content)
            if plain != content:
                target.write_text(
                    json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
                continue
        shutil.copyfile(file, target)


def copy_result(source: Path, folder: Path) -> None:
    """Copies the model or adapter that a run has exported, including weights. Raises ModelError if
    a file cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(source, folder)
    for file in sorted(source.iterdir()):
        if not file.is_file() or not any(fnmatch(file.name, pattern) for pattern in RESULT):
            continue
        if file.name == "adapter_config.json":
            content = without_code(model_files.read_json(file))
            (folder / file.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(file, folder / file.name)


@contextmanager
def inert(source: Path) -> Iterator[Path]:
    """A temporary folder with copies of the data files of `source` and links to the weights;
    removed when the context ends.

    Raises ModelError if weights are missing or a file cannot be read.
    """
    weights = model_files.weight_files(source)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        copy_files(source, folder)
        for name in weights:
            (folder / name).symlink_to((source / name).resolve())
        index = source / model_files.INDEX
        if weights != [model_files.SINGLE] and index.is_file():
            shutil.copyfile(index, folder / index.name)
        yield folder
