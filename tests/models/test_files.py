"""A model folder's files, with whatever somebody may have put there."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from opd.errors import DataError, ModelError
from opd.models.files import StoredTensor, check_links, read_json, tensor_headers, weight_files
from opd.tiny import MODEL


def message(call, *arguments, error=ModelError):
    with pytest.raises(error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested deeper than 32 levels"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "is nested deeper than 32 levels"),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "is nested deeper than 32 levels"),
        (b'{"a": [{"b": ' * 400 + b"1" + b"}]}" * 400 + b"", "nested deeper"),
    ],
)
def test_json_of_any_kind_is_one_line(tmp_path, content, expected):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    said = message(read_json, path)
    assert expected in said
    assert said.startswith(str(path))
    assert expected in message(read_json, path, DataError, error=DataError)


def test_json_within_the_bounds_is_read(tmp_path):
    path = tmp_path / "config.json"
    deep = b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}"
    path.write_bytes(deep)
    assert read_json(path) == json.loads(deep)


def test_files_that_are_none_are_one_line(tmp_path):
    assert message(read_json, tmp_path / "config.json").endswith("config.json is missing")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert message(read_json, tmp_path / "pipe").endswith("pipe is not a file")
    assert message(read_json, tmp_path).endswith("is not a file")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**26 + 1)  # without content, so it takes no room
    said = message(read_json, tmp_path / "large")
    assert "has 67,108,865 bytes, more than any such file needs (67,108,864)" in said


def test_headers_are_what_safetensors_wrote(tmp_path):
    save_file(
        {"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.int64)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    save_file({"c": np.zeros((0, 4), np.float16)}, tmp_path / "other.safetensors")
    assert weight_files(tmp_path) == ["model.safetensors"]
    assert tensor_headers(tmp_path) == {
        "a": StoredTensor("F32", (2, 3), "model.safetensors"),
        "b": StoredTensor("I64", (), "model.safetensors"),
    }
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    index(tmp_path, a="one.safetensors", c="other.safetensors")
    assert weight_files(tmp_path) == ["one.safetensors", "other.safetensors"]
    assert tensor_headers(tmp_path) == {
        "a": StoredTensor("F32", (2, 3), "one.safetensors"),
        "b": StoredTensor("I64", (), "one.safetensors"),
        "c": StoredTensor("F16", (0, 4), "other.safetensors"),
    }
    # Of one file alone and an index, transformers takes the file.
    save_file({"d": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert list(tensor_headers(tmp_path)) == ["d"]


def test_headers_of_a_published_folder():
    from safetensors import safe_open

    with safe_open(MODEL / "model.safetensors", framework="np") as file:
        assert set(tensor_headers(MODEL)) == set(file.keys())


def index(folder, **owners):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))


@pytest.mark.parametrize(
    ("owner", "expected"),
    [
        ("../outside.safetensors", "outside of the model folder"),
        ("/etc/outside.safetensors", "outside of the model folder"),
        ("sub/../../outside.safetensors", "outside of the model folder"),
        ("..\\outside.safetensors", "outside of the model folder"),
        ("no\0name.safetensors", "outside of the model folder"),
        ("config.json", "it names files in the folder, *.safetensors"),
        ("pytorch_model.bin", "it names files in the folder, *.safetensors"),
        (5, "weight_map gives 5 for a"),
        (None, "weight_map gives None for a"),
        (["one.safetensors"], "weight_map gives ['one.safetensors'] for a"),
        ("missing.safetensors", "no missing.safetensors; a model folder holds"),
    ],
)
def test_an_index_names_files_of_the_folder_alone(tmp_path, owner, expected):
    (tmp_path / "model").mkdir()
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "outside.safetensors")
    index(tmp_path / "model", a=owner)
    for call in (weight_files, tensor_headers):
        assert expected in message(call, tmp_path / "model")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}']
)
def test_an_index_without_a_map_is_one_line(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "has no weight_map" in message(tensor_headers, tmp_path)


def test_an_index_that_its_file_contradicts_is_one_line(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "one.safetensors")
    index(tmp_path, a="one.safetensors", b="one.safetensors")
    assert "one.safetensors does not hold the tensor b" in message(tensor_headers, tmp_path)


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read as safetensors: it has 0 bytes"),
        (b"half", "cannot be read as safetensors: it has 4 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "cannot be read as safetensors: it has 43 bytes, and a header of",
        ),
        ((2**63).to_bytes(8, "little") + b"{}", "and a header of 9,223,372,036,854,775,808"),
        (
            (3).to_bytes(8, "little") + b"{x}",
            "cannot be read as safetensors: the header is not JSON",
        ),
        (
            (2).to_bytes(8, "little") + b"[]",
            "cannot be read as safetensors: the header does not hold a JSON object",
        ),
        ((200_000).to_bytes(8, "little") + b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
        (header(a=entry()), "is cut off: a ends at byte 4 of 0; download it again"),
        (
            header(a=entry(shape=(10**12,), offsets=(0, 4 * 10**12))),
            "is cut off: a ends at byte 4,000,000,000,000 of 0",
        ),
        (
            header(a=entry(shape=(10**12,), offsets=(0, 4))) + bytes(4),
            "a has 4 bytes for F32 (1000000000000,)",
        ),
        (header(a=entry(shape=(-1,))) + bytes(4), "says nothing usable of a"),
        (header(a=entry(shape=(True,))) + bytes(4), "says nothing usable of a"),
        (header(a=entry(shape="1")) + bytes(4), "says nothing usable of a"),
        (header(a=entry(dtype=3)) + bytes(4), "says nothing usable of a"),
        (header(a=entry(offsets=(4, 0))) + bytes(4), "is cut off"),
        (header(a=entry(offsets=(0, 2, 4))) + bytes(4), "says nothing usable of a"),
        (header(a=[1]) + bytes(4), "says nothing usable of a"),
    ],
)
def test_weights_of_any_kind_are_one_line(tmp_path, content, expected):
    (tmp_path / "model.safetensors").write_bytes(content)
    said = message(tensor_headers, tmp_path)
    assert expected in said
    assert str(tmp_path / "model.safetensors") in said


def test_a_folder_without_weights_names_what_is_missing(tmp_path):
    assert "no model.safetensors" in message(tensor_headers, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is pickled" in message(weight_files, tmp_path)


def test_links_stay_in_the_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "config.json").write_text("{}")
    (folder / "again.json").symlink_to("config.json")
    (tmp_path / "elsewhere").symlink_to(folder)  # the folder itself may be a link
    check_links(folder)
    check_links(tmp_path / "elsewhere")
    for name in ("notes.txt", "additional_chat_templates/other.jinja"):
        for target in ("/etc/passwd", tmp_path / "secret", "../secret", tmp_path):
            (folder / name).symlink_to(
                os.path.relpath(tmp_path / "secret", (folder / name).parent)
                if target == "../secret"
                else target
            )
            said = message(check_links, folder)
            assert f"{folder / name} is a link to " in said
            assert "outside of the model folder; put the file itself there" in said
            (folder / name).unlink()
    (folder / "circle").symlink_to("circle")
    assert "leads nowhere" in message(check_links, folder)


def test_links_of_a_hugging_face_cache_stay_within_their_model(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    other = tmp_path / "models--a--c/blobs"
    for folder in (blobs, snapshot, other):
        folder.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (other / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    check_links(snapshot)
    (snapshot / "tokenizer.json").symlink_to("../../../models--a--c/blobs/123")
    assert "tokenizer.json is a link to " in message(check_links, snapshot)
