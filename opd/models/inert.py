"""What of a model folder is handed on: data files alone, and nothing in them that names code.

A folder may come from anybody. Libraries run Python that a folder brings (`auto_map` in
transformers, `model_file` in mlx-vlm and mlx-lm), fetch kernels that a configuration names, or
follow it to other files. So they are given an inert copy, and an export holds no other files.
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
"""Files of a model folder that are handed on beside its weights; no other files are."""

LEFT_OUT = (
    "*.safetensors.index.json",
    "*.bin.index.json",
    "adapter_config.json",
    "offload_index.json",
)
"""Files among these that say where weights stand, which is written anew; and those by which a
library would load other weights."""

RESULT = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Files of a run's result beside these: its weights, and what an adapter is."""

LARGE = ("tokenizer.json", "vocab.json")
"""Files whose readers take tables alone."""

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
"""Keys, at any depth of a configuration, whose values name Python to run, kernels to fetch, or
other files to load."""


def is_data(name: str) -> bool:
    """Whether a file of this name is handed on."""
    return any(fnmatch(name, pattern) for pattern in DATA) and not any(
        fnmatch(name, pattern) for pattern in LEFT_OUT
    )


def without_code(value: Any) -> Any:
    """A configuration without the keys in CODE."""
    if isinstance(value, dict):
        return {key: without_code(inner) for key, inner in value.items() if key not in CODE}
    return [without_code(inner) for inner in value] if isinstance(value, list) else value


def copy_files(source: Path, folder: Path, names: Collection[str] | None = None) -> None:
    """Copies the data files of a model folder, without its weights, or those of `names`, into
    `folder`. Raises ModelError where one cannot be read.

    Copies have the permissions of new files.
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
    """Copies a model or an adapter that a run left behind, weights included."""
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
    """A folder with the data files of a model folder, and its weights as links; it is gone when the
    context ends.

    Raises ModelError where weights are missing, or a file cannot be read.
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
