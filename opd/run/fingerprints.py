"""Fingerprints of a model's files: equal where the content is, wherever the files are."""

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
"""Of a larger file, so many blocks are hashed, spread evenly; and the beginning, where weights have
their index."""

HEAD_BYTES = 2**20

PATTERNS = (*hub.SMALL, hub.WEIGHTS)
"""The files that a model is: what is fetched of one."""


def of_model(options: ModelOptions) -> dict[str, str]:
    """The fingerprint of every file of a model, by name, and of those of an adapter on the model.
    Raises ModelError."""
    found = _of_folder(options.path)
    if options.adapter is not None:
        found |= {f"adapter/{name}": value for name, value in _of_folder(options.adapter).items()}
    return found


def of_file(path: Path) -> str:
    """The fingerprint of a file: of its size, and of its content, of which large files give evenly
    spread parts."""
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
