"""The benchmarks' own code, in short, and the claims that their committed results have to bear."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import tiny_controls, views
from benchmarks.tiny_runs import RESULTS, run, table_row


@pytest.fixture(scope="module")
def controls():
    return json.loads((RESULTS / "tiny_controls.json").read_text())["runs"]


def test_the_committed_controls_bear_the_claim(controls):
    """Three seeds of each; the evidence closes the gap, the same image does not, another part of it
    makes it worse."""
    assert controls.keys() == tiny_controls.CONTROLS.keys()
    assert all(sorted(runs) == ["0", "1", "2"] for runs in controls.values())
    rows = {name: table_row(runs) for name, runs in controls.items()}
    assert min(rows["crop teacher"]["gap_closed_each"]) > 0.7
    assert rows["teacher sees the full image"]["upper_end_of_interval"] < 0.10
    assert rows["teacher sees a wrong crop"]["upper_end_of_interval"] <= 0
    assert rows["supervised on the labels"]["gap_closed"] > rows["crop teacher"]["gap_closed"] - 0.1


def test_the_readme_shows_the_committed_controls(controls):
    readme = (RESULTS.parent / "README.md").read_text()
    for name, runs in controls.items():
        row = table_row(runs)
        ends = [
            f"{100 * row[f'{view}_before']:.1f} → {100 * row[f'{view}_after']:.1f}"
            for view in ("full", "crop")
        ]
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {name}")]
        assert [cell.strip() for cell in line.split("|")[2:5]] == [
            *ends,
            f"{100 * row['gap_closed']:.0f} %",
        ]


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (tiny_controls.CONTROLS, "supervised on the labels"),
        (views.VIEWS, "several: full, context, crop"),
        (views.VIEWS, "mixture: crop 0.5, degrade 0.5"),
    ],
)
def test_a_run_of_each_table(table, name):
    pytest.importorskip("torch")
    settings = [*table[name], "measure.count=4", "rollout.prompts=4"]
    summary = run(name, settings, 0, steps=2, prepare=tiny_controls.on_labels)
    assert summary["steps_not_finite"] == 0
    assert [row[0] for row in summary["curve"]] == [0, 2]
    if name.startswith("supervised"):
        assert summary["completions_truncated"] == 0


def test_supervised_training_is_the_cross_entropy_of_the_labels(tmp_path):
    """Its gradient against finite differences of the labels' log-probabilities."""
    pytest.importorskip("torch")
    from opd.method import rollout
    from opd.progress import Quiet
    from opd.run import recipe as recipes
    from opd.run.batches import Batches
    from opd.run.folder import RunFolder
    from opd.run.session import open_session
    from opd.run.trainer import Trainer
    from opd.views.usable import Skipped

    session = open_session(
        recipes.load("tiny", ["rollout.prompts=2", "measure.count=0", "run.steps=1"]),
        "cpu",
        Quiet(),
    )
    trainer = Trainer(
        session.recipe,
        session.backend,
        session.encoder,
        session.examples,
        (),
        RunFolder(Path("unused")),
    )
    backend = tiny_controls.supervised(trainer)
    batch = Batches(
        session.recipe, backend, session.encoder, session.examples, Skipped(Quiet())
    ).encode(1)
    from opd.types import Sampling

    uniforms = np.zeros((2, 1, 16), np.float32)
    sampled = backend.sample(
        [pair.student for pair in batch.pairs],
        uniforms,
        Sampling(1.0, trainer.encoder.stop, trainer.encoder.banned),
    )
    kept = rollout.drop_unusable(batch.pairs, sampled, trainer.encoder.banned)
    tokens = sum(len(one) for group in kept.completions for one in group)
    groups = rollout.groups(kept, tokens)
    objective = trainer.recipe.objective.objective(1.0)

    def loss():
        rows = backend.score(groups, objective)
        return -sum(
            float((weight * row.student_logprobs).sum())
            for group, found in zip(groups, rows, strict=True)
            for weight, row in zip(group.weights, found, strict=True)
        )

    backend.accumulate(groups, objective)
    gradient = backend.tensors("gradient")
    name = max(gradient, key=lambda key: np.abs(gradient[key]).max())
    place = np.unravel_index(np.abs(gradient[name]).argmax(), gradient[name].shape)
    backend.save(tmp_path)
    weights = load_file(tmp_path / "student.safetensors")
    start, slope = weights[name][place], 0.0
    for sign in (1, -1):
        weights[name][place] = start + sign * 1e-3
        save_file(weights, tmp_path / "student.safetensors", {"format": "pt"})
        backend.load(tmp_path)
        slope += sign * loss() / 2e-3
    assert slope == pytest.approx(gradient[name][place], rel=0.02)
