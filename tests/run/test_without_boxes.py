"""Runs on data without boxes, whose students see degraded images: trained, resumed, and measured on
the full image alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from opd.run import records
from opd.run.folder import RunFolder
from opd_cli.tables import before_after
from tests.conftest import coloured
from tests.run.test_loop import metrics, same, trainer

DEGRADE = "view.kind='degrade'"


def bare(*boxed):
    """Examples without boxes, but for those at the places `boxed`."""
    return [
        one if place in boxed else replace(one, boxes=()) for place, one in enumerate(coloured())
    ]


def test_full_images_alone_are_measured_and_said(tmp_path, capsys):
    summary = trainer(tmp_path, DEGRADE, "measure.every=3", examples=bare()).train()
    assert summary["prompts_skipped"] == summary["rows_not_measured"] == 0
    for when in ("before", "after"):
        assert summary[when]["crop_rows"] == 0
        assert summary[when]["rows_with_answer"] == 4
        assert not {"gap", "crop_accuracy", "agreement"} & summary[when].keys()
    assert not {"gap_closed", "crop_change"} & summary.keys()
    assert summary["verdict"] == "unchanged"
    assert len(summary["full_change_interval"]) == 2
    rows = RunFolder(tmp_path).rows(records.ANSWERS)
    assert [(row["crop"], row["crop_right"]) for row in rows] == [(None, None)] * 8
    assert [row["step"] for row in RunFolder(tmp_path).rows(records.ACCURACY)] == [0, 3, 6]
    before_after(summary, Path("run"))
    said = capsys.readouterr().out
    assert "4 examples without evidence: the full image alone was measured" in said
    assert "crop" not in said
    assert "gap closed" not in said


def test_crops_are_measured_where_there_are_boxes(tmp_path, capsys):
    summary = trainer(tmp_path, DEGRADE, examples=bare(1, 2)).train()
    assert (summary["before"]["rows"], summary["before"]["crop_rows"]) == (4, 2)
    assert {"gap", "crop_accuracy", "agreement"} <= summary["before"].keys()
    before_after(summary, Path("run"))
    line = "2 examples without evidence: the full image alone was measured"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("view", [DEGRADE, "view.mixture={degrade = 0.5, full = 0.5}"])
def test_a_resumed_run_sees_the_same_images(tmp_path, view):
    """Also from a step in the middle of an epoch of three steps."""
    whole = trainer(tmp_path / "whole", view, examples=bare())
    whole.train()
    trainer(tmp_path / "cut", view, "run.steps=4", examples=bare()).train()
    resumed = trainer(tmp_path / "cut", view, examples=bare())
    resumed.train()
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    same(resumed.backend, whole.backend)
    other = trainer(tmp_path / "other", view, "run.seed=1", examples=bare())
    other.train()
    assert metrics(tmp_path / "other")[0] != metrics(tmp_path / "whole")[0]


def test_rows_that_a_mixture_shows_by_boxes_are_counted(tmp_path):
    mixture = "view.mixture={degrade = 0.5, crop = 0.5}"
    summary = trainer(tmp_path, mixture, examples=bare()).train()
    skipped = RunFolder(tmp_path).rows(records.SKIPPED)
    assert 0 < len(skipped) < 12
    assert summary["prompts_skipped"] == 2 * len(skipped)  # two epochs
    assert all("needs boxes" in row["reason"] for row in skipped)
