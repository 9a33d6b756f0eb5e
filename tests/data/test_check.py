"""What is found in every row of a data set, against a dirty one whose faults are known."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opd.data import duplicates
from opd.data.duplicates import BITS, SHADES, neighbours
from opd.data.tally import KINDS, TOLD, Tally
from opd_cli import main
from tests.support.dirty import ROWS, dirty, picture


def run(*arguments, columns="80"):
    return CliRunner(env={"COLUMNS": columns}).invoke(main, ["data", "check", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return dirty(tmp_path_factory.mktemp("dirty"))


@pytest.fixture(scope="module")
def found(made):
    done = run(made.path, "--against", made.other, "--model", "tiny", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["defects", "warnings"])
def test_every_fault_is_counted(made, found, name):
    kinds = {}
    for kind, known in found[name].items():
        (meant,) = [known for known in getattr(made, name) if kind.startswith(known)]
        kinds[meant] = known["count"]
        assert len(known["first"]) == min(TOLD, known["count"])
        assert all(line.startswith("dirty.jsonl:") for line in known["first"])
    assert kinds == dict(getattr(made, name))


def test_rows_and_duplicates(made, found):
    assert (found["format"], found["rows"], found["usable"]) == (
        "opd's own rows",
        ROWS,
        made.usable,
    )
    assert found["duplicates"]["exact"] == made.exact
    assert found["near_duplicates"] == found["duplicates"]["near"] == made.near
    assert found["overlap"] == made.overlap
    assert f"{BITS} of 64 bits" in found["duplicates"]["rule"]
    rows = [json.loads(line) for line in made.path.read_text().splitlines() if line[-1] == "}"]
    images = {f"dirty.jsonl:{number}": row["image"] for number, row in enumerate(rows, 1)}
    for earlier, later in found["duplicates"]["first"]:
        assert images[earlier] != images[later]
        assert int(earlier.partition(":")[2]) < int(later.partition(":")[2])


def test_sizes(found):
    area = found["box_area"]
    assert area["min"] == pytest.approx(3 * 20 / (120 * 90))
    assert area["max"] == pytest.approx(100 * 80 / (120 * 90))
    assert area["median"] == pytest.approx(30 * 30 / (120 * 90))
    for tokens in found["tokens"].values():
        assert 0 < tokens["median"] <= tokens["p95"] <= tokens["p99"] <= tokens["max"]
        assert tokens["above_limit"] == 0


def test_the_lengths_are_those_of_training(tmp_path):
    """And a row above the limit cannot be used."""
    from opd.data import read_dataset
    from opd.prompts.processor import open_encoder
    from opd.run.recipe import load
    from opd.tiny import MODEL
    from opd.views.usable import encode

    picture(0).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "What? " * times, "boxes": [[10, 10, 40, 40]]}
        for times in (1, 5, 30)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = load("tiny")
    encoder = open_encoder(MODEL, **recipe.model.pixels())
    lengths = [list(map(len, encode(encoder, row, recipe.view))) for row in read_dataset(path)]
    limit = lengths[2][0] - 1
    done = run(path, "--model", "tiny", "--json", "--set", f"data.max_prompt_tokens={limit}")
    found = json.loads(done.stdout)
    for place, tokens in enumerate(found["tokens"].values()):
        assert tokens["max"] == lengths[2][place]
        assert tokens["median"] == lengths[1][place]
        assert tokens["above_limit"] == sum(each[place] > limit for each in lengths)
    assert found["usable"] == 2
    (kind,) = found["defects"]
    assert kind == f"above data.max_prompt_tokens = {limit}"


def test_the_table_fits_a_terminal(made):
    done = run(made.path, "--against", made.other)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert f"{made.usable} of {ROWS} rows can be used" in lines[0]
    assert max(map(len, lines[1:])) <= 80
    said = " ".join(done.stdout.split())
    for line in ("dirty.jsonl:2: field 'image': image not found", "the id stands twice", "3 exact"):
        assert line in said
    assert "200/200" in done.stderr
    assert "rows/s" in done.stderr


def test_nothing_usable(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "nowhere.png", "question": "What?", "boxes": [[1, 1, 9, 9]]}\n{}')
    done = run(path, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["usable"] == 0
    assert done.stderr.splitlines()[-1] == f"opd: {path}: no usable row of 2"


def test_rows_that_hold_the_same_picture_show_one_picture(tmp_path):
    """Of several questions about a picture, each row may hold it; the same question is told."""
    value = io.BytesIO()
    picture(0).save(value, "PNG")
    image = base64.b64encode(value.getvalue()).decode()
    picture(0).save(tmp_path / "same.png")
    row = {"boxes": [[10, 10, 40, 40]]}
    rows = [
        {"image": image, "question": "What?", **row},
        {"image": image, "question": "Where?", **row},
        {"image": image, "question": "What?", **row},
        {"image": "same.png", "question": "Who?", **row},
        {"image": "./same.png", "question": "Why?", **row},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(run(path, "--json").stdout)
    assert found["duplicates"]["exact"] == 1  # the file, which is another name
    assert found["duplicates"]["first"] == [["rows.jsonl:1", "rows.jsonl:4"]]
    assert found["warnings"] == {
        "picture and question stand twice": {
            "count": 1,
            "first": ["rows.jsonl:3: as in rows.jsonl:1"],
        }
    }


def test_the_other_data_are_read_by_themselves(tmp_path):
    """What is said of the data says nothing of the other ones."""
    other = tmp_path / "other.jsonl"
    picture(7).save(tmp_path / "seven.png")
    row = {"image": "seven.png", "question": "What?", "boxes": [[0.1, 0.1, 0.4, 0.4]]}
    other.write_text(json.dumps(row | {"box_format": "fraction"}))
    row["boxes"] = [[100, 100, 400, 400]]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    done = run(path, "--against", other, "--set", "data.box_format=per-mille", "--json")
    found = json.loads(done.stdout)
    assert (found["usable"], found["overlap"]) == (1, 1)
    assert found["box_area"]["max"] == pytest.approx(0.09)


def test_a_view_without_evidence_needs_no_boxes(tmp_path):
    picture(0).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a.png", "question": "What?"}))
    assert run(path).exit_code == 2
    done = run(path, "--set", "view.kind=degrade", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["box_area"] is None
    given = json.loads(run(path, "--set", "view.kind=given", "--json").stdout)
    assert given["usable"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl"], "opd: data file not found: nowhere.jsonl"),
        (["tiny", "--set", "data.fromat=x"], "unknown key data.fromat"),
        (["tiny", "--modle", "x"], "Did you mean '--model'"),
        (["tiny", "--model", "nowhere"], "model 'nowhere': no such folder"),
        (["tiny", "--against", "nowhere.jsonl"], "data file not found: nowhere.jsonl"),
        ([], "Missing argument 'DATA'"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert said in done.stderr


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    done = run("tiny")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "pip install" in done.stderr


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2**64 - 1)), max_size=12),
    st.lists(st.sampled_from([0, 3, SHADES, SHADES + 1, 200]), min_size=12, max_size=12),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_neighbours_are_all_near_pairs(flips, shades, seed):
    """Against every pair, compared one by one."""
    rng = np.random.default_rng(seed)
    looks = [int(rng.integers(0, 2**64, dtype=np.uint64))]
    for bits, _ in flips:  # hashes that differ from an earlier one by some bits
        changed = sum(1 << int(bit) for bit in rng.choice(64, bits, replace=False))
        looks.append(looks[int(rng.integers(len(looks)))] ^ changed)
    colours = np.array([[each, 0, 0] for each in [0, *shades]][: len(looks)], np.int16)
    wanted = {
        (first, second)
        for second in range(len(looks))
        for first in range(second)
        if (looks[first] ^ looks[second]).bit_count() <= BITS
        and abs(int(colours[first, 0]) - int(colours[second, 0])) <= SHADES
    }
    found = set()
    for earlier, later in neighbours(np.array(looks, np.uint64), colours):
        found |= set(zip(earlier.tolist(), later.tolist(), strict=True))
    assert found == wanted


def test_many_like_pictures_take_no_quadratic_time():
    """2,000 equal hashes: each is compared with COMPARED others in each sort."""
    looks = np.full(2_000, 12345, np.uint64)
    colours = np.zeros((len(looks), 3), np.int16)
    compared = sum(len(earlier) for earlier, _ in neighbours(looks, colours))
    assert compared <= 15 * duplicates.COMPARED * len(looks)


def test_the_hash_sees_copies_and_not_others():
    hashes = [duplicates.look(picture(seed)) for seed in range(30)]
    for seed, (look, colour) in enumerate(hashes):
        for other, (other_look, _) in enumerate(hashes):
            assert seed == other or (look ^ other_look).bit_count() > 3 * BITS
        smaller = picture(seed).resize((60, 45))
        again, tint = duplicates.look(smaller)
        assert (look ^ again).bit_count() <= BITS
        assert max(abs(a - b) for a, b in zip(colour, tint, strict=True)) <= SHADES
    black, white = (
        duplicates.look(Image.new("RGB", (40, 30), name)) for name in ("black", "white")
    )
    assert black[1] != white[1]


def test_kinds_are_bounded():
    tally = Tally()
    for number in range(KINDS + 50):
        tally.add(f"kind {number}", "x:1", "why")
    assert len(tally.result()) == KINDS + 1
    assert tally.result()["other reasons"]["count"] == 50
