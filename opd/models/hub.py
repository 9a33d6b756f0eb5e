"""Downloads models by Hugging Face id. huggingface_hub does the work, so its cache, token (`hf auth
login`), HF_ENDPOINT and HF_HUB_OFFLINE apply.

Only configuration, tokenizer, templates and safetensors are downloaded: none of them can hold code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from opd.errors import ModelError, one_line
from opd.models.files import read_json

SMALL = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model")
"""Patterns of the small files: configuration, tokenizer, chat template and image processor."""

WEIGHTS = "*.safetensors"

NOT_FETCHED = ("*/*", "consolidated*")
"""Patterns of files that are not downloaded: other formats in subfolders, and a second copy of the
weights under the names of their makers."""

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def is_id(name: str) -> bool:
    """Whether `name` has the form of a Hugging Face id: org/name."""
    return ID.fullmatch(name) is not None


def fetch(name: str, revision: str = "", weights: bool = True) -> Path:
    """The folder of a model in the cache, whose name is the commit; downloads what is missing.

    `revision`: a branch, tag or commit; empty: the default branch. Without `weights` only the small
    files are downloaded, which can be checked before the weights are. Raises ModelError, of one
    line, if the model is not found, gated, out of reach, or offline and not in the cache.
    """
    from huggingface_hub import constants, is_offline_mode, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bars(tqdm):
        """The progress bars of huggingface_hub, shown only in a terminal."""

        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **{"disable": None, **options})  # type: ignore[no-untyped-call]

    patterns = [*SMALL, WEIGHTS] if weights else [*SMALL]
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=[*NOT_FETCHED],
                tqdm_class=Bars,
            )
        )
    except Exception as error:  # errors of huggingface_hub, of its HTTP library and of the disk
        raise ModelError(f"model '{name}': {_reason(error, name, revision)}") from error
    if weights and not any(folder.glob(WEIGHTS)):
        if is_offline_mode():
            raise ModelError(
                f"model '{name}': its weights are not in the cache {constants.HF_HUB_CACHE}; unset"
                " HF_HUB_OFFLINE"
            )
        raise ModelError(
            f"model '{name}': it has no weights as safetensors, and other formats are not loaded;"
            " name another model"
        )
    return folder


def name(folder: Path) -> str:
    """The Hugging Face id of a folder that `fetch` returned; empty for any other folder."""
    kind, *parts = folder.parent.parent.name.split("--")
    return "/".join(parts) if commit(folder) and kind == "models" else ""


def commit(folder: Path) -> str:
    """The commit of a folder that `fetch` returned; empty for any other folder."""
    return (
        folder.name
        if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
        else ""
    )


def refuse_remote_code(folder: Path, name: str) -> None:
    """Raises ModelError if transformers lacks the model's class and the repository brings it as
    Python files, which are never run."""
    try:
        config = read_json(folder / "config.json")
    except ModelError:
        return  # the code that needs the file raises the error
    if not config.get("auto_map"):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"model '{name}': model_type '{config.get('model_type')}' needs Python code of its own"
            " repository, which is never run; name a model whose class transformers has"
        )


def _reason(error: Exception, name: str, revision: str) -> str:
    """The end of a message: why the download failed, and what to do."""
    from huggingface_hub import constants, errors, is_offline_mode

    place = constants.ENDPOINT
    cause = (
        error.__cause__
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__
        else error
    )
    if isinstance(cause, errors.GatedRepoError):
        return (
            f"it is gated: accept its terms at {place}/{name}, then log in with 'hf auth login' or"
            " set HF_TOKEN"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"neither a folder here nor a model on {place}; check the name, or, where it is"
            " private, 'hf auth login' or set HF_TOKEN"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{place} has no revision '{revision}' of it; check model.revision"
    if isinstance(cause, errors.HfHubHTTPError):
        return (
            f"{place} answered {cause.response.status_code}, and it is not in the cache"
            f" ({one_line(cause)}); try again later"
        )
    if is_offline_mode():
        at = f", at revision '{revision}'" if revision else ""
        return (
            f"neither a folder here nor in the cache {constants.HF_HUB_CACHE}{at}, and"
            " HF_HUB_OFFLINE is set: unset it to download"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"neither a folder here nor in the cache, and {place} cannot be reached"
            f" ({one_line(cause)}); check the network"
        )
    return (
        f"the download from {place} failed ({one_line(cause)}); try again: it goes on where it"
        " stopped"
    )
