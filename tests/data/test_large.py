"""A data set of more rows than are checked when it is opened."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from opd import randomness
from opd.data import dataset, read_dataset
from opd.data.dataset import FaultyRow, LargeDataset, spread
from opd.data.tables import table
from opd.errors import DataError
from opd.progress import Quiet
from opd.run import recipe as recipes
from opd.run.batches import Batches
from opd.views.usable import Skipped

ROW = {"image": "a.png", "question": "Which?", "boxes": [[10, 20, 30, 40]], "answer": "red"}


class Notes(Quiet):
    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sixteen rows are checked, and not 2,048."""
    for module in (table, dataset):
        monkeypatch.setattr(module, "CHECKED", 16)
    monkeypatch.setattr("opd.data.survey.CHECKED", 16)
    Image.new("RGB", (200, 100), "red").save(tmp_path / "a.png")
    return tmp_path


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows(count, **faults):
    """Rows with ids; `faults`: fields of the rows "r3", by their names."""
    return [{**ROW, "id": str(place), **faults.get(f"r{place}", {})} for place in range(count)]


def test_a_large_file_is_read_when_its_rows_are_needed(folder, monkeypatch):
    path = write(folder, rows(100, r13={"question": 3}, r25={"boxes": []}, r50={"image": "gone"}))
    data = read_dataset(path)
    assert isinstance(data, LargeDataset)
    # Rows 25 and 50 are among the sixteen, 13 is not.
    assert [source for source, _ in data.skipped] == ["rows.jsonl:26", "rows.jsonl:51"]
    assert (len(data), data.rows, len(data.checked)) == (98, 100, 14)
    assert (
        f"16 of 100 rows are checked, the others when they are reached; all are checked by:"
        f" opd data check {path}" in data.notes
    )
    usable = [place for place in range(100) if place not in (25, 50)]
    for index, place in enumerate(usable):
        if place == 13:
            with pytest.raises(FaultyRow, match="field 'question'") as caught:
                data[index]
            assert caught.value.source == "rows.jsonl:14"
        else:
            assert data[index].id == str(place)
    assert data[-1].id == "99"
    assert [example.id for example in data[3:5]] == ["3", "4"]
    assert [int(example.id) for example in data] == [p for p in usable if p != 13]
    with pytest.raises(IndexError):
        data[98]


def test_a_large_file_equals_the_same_rows_read_at_once(folder, monkeypatch):
    path = write(folder, rows(60))
    large = read_dataset(path)
    monkeypatch.setattr(dataset, "CHECKED", 100)
    whole = read_dataset(path)
    assert isinstance(large, LargeDataset)
    assert not isinstance(whole, LargeDataset)
    assert list(large) == list(whole)
    for count in (0, 1, 7, 33, 60, 99):
        assert spread(large, count) == spread(whole, count) == list(read_dataset(path, count=count))
    assert all(example.answer is None for example in large.without_answers())
    assert [replace(one, answer="red") for one in large.without_answers()] == list(whole)


def test_measured_rows_are_the_same_however_they_are_read(folder):
    faults = {f"r{place}": {"question": 3} for place in (0, 1, 2, 30, 31, 59)}
    path = write(folder, rows(60, **faults))
    data = read_dataset(path)
    for count in (1, 2, 20, 58):
        assert spread(data, count) == list(read_dataset(path, count=count))


def test_the_fingerprint_covers_the_file_and_the_checked_pictures(folder):
    path = write(folder, rows(60))
    before = read_dataset(path).fingerprint
    assert read_dataset(path).fingerprint == before
    changed = rows(60)
    changed[59]["question"] = "Why?"
    write(folder, changed)
    other = read_dataset(path).fingerprint
    assert other != before
    Image.new("RGB", (200, 100), "blue").save(folder / "a.png")
    assert read_dataset(path).fingerprint != other


def test_a_faulty_row_is_fatal_when_it_is_reached_in_strict_mode(folder):
    path = write(folder, rows(60, r13={"question": 3}))
    data = read_dataset(path, strict=True)
    with pytest.raises(DataError, match=r"rows.jsonl:14: .*fatal in strict mode"):
        data[13]
    path = write(folder, rows(60, r15={"question": 3}))  # one of the sixteen
    with pytest.raises(DataError, match=r"rows.jsonl:16: .*fatal in strict mode"):
        read_dataset(path, strict=True)


def test_a_step_counts_a_faulty_row_that_it_reaches(folder):
    path = write(folder, rows(60, r13={"question": 3}))
    notes = Notes()
    recipe, device = recipes.load("tiny"), SimpleNamespace(rank=0, size=1)
    batches = Batches(recipe, device, None, read_dataset(path), Skipped(notes))
    assert batches._encoded(13, place=0) is None
    reason = "field 'question': 3 is not a text that is not empty"
    assert batches.skipped.reasons == {"rows.jsonl:14": reason}
    assert notes.lines == [f"skipped rows.jsonl:14: {reason}"]


def test_no_usable_row_among_the_checked_ones(folder):
    path = write(folder, [{**ROW, "question": 3}] * 60)
    with pytest.raises(DataError, match="no usable row of 16 read of 60; the first fault"):
        read_dataset(path)


def test_a_unit_that_is_misspelt_in_a_later_row_is_a_fault_of_the_row(folder):
    path = write(folder, rows(60, r13={"box_fromat": "per-mille"}))
    data = read_dataset(path)
    with pytest.raises(FaultyRow, match="did you mean 'box_format'"):
        data[13]
    path = write(folder, rows(60, r15={"box_fromat": "per-mille"}))
    with pytest.raises(DataError, match=r"rows.jsonl:16: field 'box_fromat'"):
        read_dataset(path)


def test_rows_of_a_step_depend_on_the_seed_alone(folder):
    path = write(folder, rows(60, r15={"question": 3}))
    orders = []
    for _ in range(2):
        data = read_dataset(path)
        steps = [randomness.batch(3, step, 8, len(data)) for step in range(1, 20)]
        orders.append([[data[int(index)].id for index in step] for step in steps])
    assert orders[0] == orders[1]
    seen = np.array(orders[0]).ravel()[:59]
    assert sorted(map(int, seen)) == [place for place in range(60) if place != 15]


def test_a_changed_file_is_told(folder):
    path = write(folder, rows(60))
    data = read_dataset(path)
    with path.open("a") as file:
        file.write("\n{}")
    with pytest.raises(FaultyRow, match="the file has changed since it was opened"):
        data[13]
    write(folder, rows(60))
    data = read_dataset(path)
    other = folder / "other"
    other.write_text("{}")
    other.replace(path)  # as editors save: the data set goes on with the file that it opened
    assert data[13].id == "13"
