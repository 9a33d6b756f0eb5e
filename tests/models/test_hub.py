"""Models by Hugging Face id, from a hub that runs here, and from the cache."""

from __future__ import annotations

import json
import shutil
import socket
import tomllib
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from opd.errors import ModelError
from opd.models import hub
from opd.models.choice import ModelChoice
from opd.tiny import MODEL
from opd_cli import main
from tests.support import fake_hub
from tests.support.fake_hub import COMMIT, serve

SMALL = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def online(tmp_path, monkeypatch):
    """Lets huggingface_hub speak to an endpoint, with a cache of its own; returns how."""
    from huggingface_hub import close_session

    yield partial(fake_hub.use, monkeypatch, tmp_path / "cache")
    close_session()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    return partial(fake_hub.use, monkeypatch, tmp_path / "cache")


@pytest.fixture
def repository(tmp_path):
    """The embedded model as people publish models, with what must stay on the hub."""
    folder = tmp_path / "repository"
    shutil.copytree(MODEL, folder)
    for name in (
        "README.md",
        "modeling_tiny.py",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/config.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("never fetched")
    return folder


def test_only_what_a_model_needs_is_fetched_and_only_once(repository, online, offline):
    with serve({"org/tiny": repository}) as (endpoint, downloaded):
        online(endpoint)
        small = hub.fetch("org/tiny", weights=False)
        assert set(downloaded) == SMALL
        whole = hub.fetch("org/tiny")
        assert sorted(downloaded) == sorted({*SMALL, "model.safetensors"})
        assert (small, hub.commit(whole)) == (whole, COMMIT)
        assert hub.fetch("org/tiny", "v1") == whole == hub.fetch("org/tiny", COMMIT)
        assert len(downloaded) == len(SMALL) + 1
    assert hub.fetch("org/tiny") == whole  # the network is gone
    offline()
    assert (
        hub.fetch("org/tiny")
        == hub.fetch("org/tiny", COMMIT)
        == ModelChoice(path="org/tiny", revision="v1").folder()
        == whole
    )
    assert (whole / "model.safetensors").read_bytes() == (MODEL / "model.safetensors").read_bytes()


def test_a_gated_model_comes_with_a_token(repository, online, monkeypatch):
    with serve({"org/tiny": repository}, gated=("org/tiny",)) as (endpoint, _):
        online(endpoint)
        with pytest.raises(
            ModelError,
            match=(
                f"model 'org/tiny': it is gated: accept its terms at {endpoint}/org/tiny, then log"
                " in with"
            ),
        ):
            hub.fetch("org/tiny")
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert (hub.fetch("org/tiny") / "model.safetensors").is_file()


def test_a_prepared_cache_serves_offline(tmp_path, offline):
    """What a person copies to a machine without network."""
    folder = tmp_path / "cache/models--org--tiny"
    shutil.copytree(MODEL, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    offline()
    assert hub.fetch("org/tiny") == folder / "snapshots" / COMMIT
    (folder / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert hub.fetch("org/tiny", weights=False) == folder / "snapshots" / COMMIT
    with pytest.raises(
        ModelError,
        match=r"model 'org/tiny': its weights are not in the cache .*/cache; unset HF_HUB_OFFLINE",
    ):
        hub.fetch("org/tiny")


def said(*arguments):
    result = CliRunner().invoke(main, ["train", *arguments])
    assert (result.exit_code, result.stdout) == (2, ""), result.output + repr(result.exception)
    (line,) = result.stderr.splitlines()
    return line


def test_every_failure_of_the_hub_is_one_line(tmp_path, repository, online, offline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(repository, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with serve(
        {"org/tiny": repository, "org/gated": repository, "org/bare": bare},
        gated=("org/gated",),
        broken=("org/broken",),
    ) as (
        endpoint,
        downloaded,
    ):
        online(endpoint)
        assert (
            f"model 'org/tinny': neither a folder here nor a model on {endpoint}; check the name"
            in said("--model", "org/tinny")
        )
        assert "model 'org/gated': it is gated: accept its terms at" in said("--model", "org/gated")
        revision = said("--model", "org/tiny", "--set", "model.revision=v9")
        assert (
            f"model 'org/tiny': {endpoint} has no revision 'v9' of it; check model.revision"
            in revision
        )
        assert f"model 'org/broken': {endpoint} answered 500, and it is not in the cache" in said(
            "--model", "org/broken"
        )
        assert "model 'org/bare': it has no weights as safetensors" in said(
            "tiny", "--model", "org/bare"
        )
        assert downloaded
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        online(f"http://127.0.0.1:{free.getsockname()[1]}")
        unreachable = said("--model", "org/other")
    assert (
        "model 'org/other': neither a folder here nor in the cache, and http://127.0.0.1:"
        in unreachable
    )
    assert "cannot be reached" in unreachable
    offline()
    assert "neither a folder here nor in the cache" in said("--model", "org/other")
    assert "HF_HUB_OFFLINE is set: unset it to download" in said(
        "--model", "org/other", "--set", "model.revision=v9"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "cache", "repository"]


def test_a_model_that_needs_remote_code_is_refused_before_its_weights(
    tmp_path, repository, online, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": {"AutoModel": "modeling_own.Own"}})
    )
    message = (
        "model_type 'own' needs Python code of its own repository, which is never run; name a model"
        " whose class transformers has"
    )
    with serve({"org/own": repository}) as (endpoint, downloaded):
        online(endpoint)
        assert message in said("--model", "org/own")
        assert "model.safetensors" not in downloaded
    assert message in said("--model", "repository")
    native = {**config, "auto_map": {"AutoModel": "modeling_own.Own"}}
    (repository / "config.json").write_text(json.dumps(native))
    assert ModelChoice(path="repository").folder() == Path("repository")


def test_a_run_from_the_hub_goes_on_offline_from_its_commit(
    tmp_path, repository, online, offline, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    few = (
        "--backend cpu --steps 1 --out run --set rollout.prompts=2 --set measure.count=0"
    ).split()
    with serve({"org/tiny": repository}) as (endpoint, downloaded):
        online(endpoint)
        done = CliRunner().invoke(main, ["train", "tiny", "--model", "org/tiny", *few])
    assert done.exit_code == 0, done.output
    assert sorted(downloaded) == sorted({*SMALL, "model.safetensors"})
    model = tomllib.loads(Path("run/config.toml").read_text())["model"]
    assert (model["path"], model["revision"]) == ("org/tiny", COMMIT)
    before = Path("run/model/model.safetensors").read_bytes()
    shutil.rmtree("run/model")
    offline()
    done = CliRunner().invoke(main, ["train", "--resume", "run"])
    assert done.exit_code == 0, done.output
    assert Path("run/model/model.safetensors").read_bytes() == before
