"""Fingerprints of a model's files: equal if the content is equal, wherever the files are."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path

from opd.errors import ModelError
from opd.models import hub
from opd.types import ModelOptions

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole."""

BLOCK_BYTES, BLOCKS = 4096, 2048
"""Of a larger file, this many blocks are hashed, spread evenly, in addition to HEAD_BYTES."""

HEAD_BYTES = 2**20
"""Bytes at the beginning of a larger file that are hashed; safetensors files have their header
there."""

PATTERNS = (*hub.SMALL, hub.WEIGHTS)
"""Patterns of the files that belong to a model: those that `hub.fetch` downloads."""


def of_model(options: ModelOptions) -> dict[str, str]:
    """Fingerprints of the files of a model, by name, and of the files of its adapter, by
    "adapter/" and name. Raises ModelError if a file cannot be read."""
    fingerprints = _of_folder(options.path)
    if options.adapter is not None:
        for name, value in _of_folder(options.adapter).items():
            fingerprints[f"adapter/{name}"] = value
    return fingerprints


def of_file(path: Path) -> str:
    """The fingerprint of a file: SHA-256, in hexadecimal, of size and content, or of size and
    sampled content for a file above WHOLE_BYTES."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(HEAD_BYTES))
            for number in range(BLOCKS):
                file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _of_folder(folder: Path) -> dict[str, str]:
    try:
        places = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]
        files = [
            path
            for path in places
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in PATTERNS)
        ]
        return {path.relative_to(folder).as_posix(): of_file(path) for path in sorted(files)}
    except OSError as error:
        raise ModelError(
            f"{error.filename or folder} cannot be read: {error.strerror or error}"
        ) from error
