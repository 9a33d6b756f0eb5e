"""Runs on data without boxes, whose students see degraded images: trained, resumed, and measured on
the full image alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from opd.progress import Quiet
from opd.run import preflight, records
from opd.run import recipe as recipes
from opd.run.batches import Batches
from opd.run.folder import RunFolder
from opd.testing.toy import ToyBackend, ToyEncoder
from opd.views import usable
from opd.views.usable import Skipped
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


def test_rows_without_boxes_and_answers_leave_nothing_to_compare(tmp_path, capsys):
    examples = [replace(one, answer=None) for one in bare()]
    summary = trainer(tmp_path, DEGRADE, examples=examples).train()
    assert summary["verdict"] is None
    assert summary["after"] == {"rows": 4, "rows_with_answer": 0, "crop_rows": 0}
    before_after(summary, Path("run"))
    said = capsys.readouterr().out
    assert "the full image alone was measured, and there are no answers to compare with" in said
    assert "%" not in said


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


def test_the_runs_seed_decides_what_a_student_sees(tmp_path):
    seen = []
    for seed in (0, 1):
        run = trainer(tmp_path / f"{seed}", DEGRADE, f"run.seed={seed}", "rollout.prompts=12",
                      examples=bare())  # fmt: skip
        batches = Batches(run.recipe, run.backend, run.encoder, run.examples, Skipped(Quiet()))
        seen.append({pair.id: pair.student.key for pair in batches.encode(1).pairs})
    assert seen[0].keys() == seen[1].keys()
    assert sum(seen[0][id] != seen[1][id] for id in seen[0]) > 6


@pytest.mark.parametrize("seed", [0, 1])
def test_the_check_before_a_run_sees_what_training_sees(seed):
    """A mixture shows half of the rows in a view with a token more than the limit allows."""
    examples = [replace(one, question="what") for one in coloured()]
    settings = ["view.mixture={several = 0.5, full = 0.5}", f"run.seed={seed}"]
    recipe = recipes.load("paper", [*settings, "data.max_prompt_tokens=5"])
    skipped = Skipped(Quiet())
    batches = Batches(recipe, ToyBackend(), ToyEncoder(), examples, skipped)
    batches.encode(1)
    found = preflight.inspect_rows(recipe, ToyEncoder(), examples)
    assert {usable.name(example) for example, _ in found.long} == skipped.reasons.keys()
    assert 2 < len(found.long) < 10


def test_rows_that_a_mixture_shows_by_boxes_are_counted(tmp_path):
    mixture = "view.mixture={degrade = 0.5, crop = 0.5}"
    summary = trainer(tmp_path, mixture, examples=bare()).train()
    skipped = RunFolder(tmp_path).rows(records.SKIPPED)
    assert 0 < len(skipped) < 12
    assert summary["prompts_skipped"] == 2 * len(skipped)  # two epochs
    assert all("needs boxes" in row["reason"] for row in skipped)
