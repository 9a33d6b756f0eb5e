"""The loop on the numpy toy backend: milliseconds a step, exact."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from opd.errors import DataError, FolderError, OutOfMemory, RunError, Stopped
from opd.progress import Quiet
from opd.run import recipe as recipes
from opd.run.batches import Batches
from opd.run.folder import RunFolder
from opd.run.trainer import Trainer
from opd.testing.toy import Together, ToyBackend, ToyEncoder
from opd.views import usable
from opd.views.usable import Skipped
from tests.conftest import coloured

OPTIONS = [
    "rollout.prompts=4",
    "rollout.completions=3",
    "rollout.max_tokens=6",
    "optimizer.learning_rate=0.05",
    "optimizer.warmup_steps=2",
    "run.steps=6",
    "run.checkpoint_every=2",
    "run.rollouts_every=3",
    "measure.count=4",
    "measure.max_tokens=4",
    "teacher.rate=0.1",
    "view.margin=0",
]
TIMES = ("seconds_rollout", "seconds_accumulate", "seconds_apply", "tokens_per_second")


def trainer(path, *options, backend=None, examples=None, progress=None):
    recipe = recipes.load("paper", [*OPTIONS, *options])
    if not (path / "config.toml").exists():
        RunFolder.create(path, recipes.write(recipe, {}))
    examples = coloured() if examples is None else examples
    count = recipe.measure.count
    return Trainer(
        recipe,
        backend or ToyBackend(),
        ToyEncoder(),
        examples,
        examples[:count],
        RunFolder(path),
        "toy",
        progress or Quiet(),
    )


def metrics(path):
    """The run's numbers, without its times."""
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in RunFolder(path).rows("metrics.jsonl")
    ]


def same(ours, theirs):
    for name, value in theirs.tensors("student").items():
        np.testing.assert_array_equal(ours.tensors("student")[name], value)
    for name, value in theirs.tensors("teacher").items():
        np.testing.assert_array_equal(ours.tensors("teacher")[name], value)


class Sampled(ToyBackend):
    """Writes down every prompt of a rollout with its completions: (tokens, [tokens of each
    completion])."""

    def __init__(self):
        super().__init__()
        self.rollouts = []

    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        found = super().sample(prompts, uniforms, sampling, policy, prefill)
        self.rollouts += [
            (prompt.key, tuple(tuple(one.tokens.tolist()) for one in group))
            for prompt, group in zip(prompts, found, strict=True)
        ]
        return found


@pytest.mark.parametrize(
    ("rows", "prompts", "steps", "times"),
    [(1, 4, 1, [4]), (3, 4, 1, [1, 1, 2]), (5, 4, 2, [1, 1, 2, 2, 2]), (5, 3, 3, [1, 2, 2, 2, 2])],
    ids=["one row", "three rows", "the seam of two epochs", "the seam at another place"],
)
def test_a_row_that_stands_twice_in_a_step_gives_different_completions(
    tmp_path, rows, prompts, steps, times
):
    backend, notes = Sampled(), []
    options = [
        f"rollout.prompts={prompts}",
        f"run.steps={steps}",
        "measure.count=0",
        "rollout.max_tokens=24",
        "rollout.temperature=9",
    ]
    one = trainer(
        tmp_path / "run",
        *options,
        "optimizer.learning_rate=1e-12",
        backend=backend,
        examples=coloured(rows),
    )
    one.progress.note = notes.append
    one.train()
    drawn = {}
    for key, completions in backend.rollouts:
        drawn.setdefault(key, []).extend(completions)
    assert sorted(len(completions) // 3 for completions in drawn.values()) == times
    for completions in drawn.values():
        assert len(set(completions)) == len(completions)
    said = [note for note in notes if "stand in a step more than once" in note]
    assert said == (
        [
            f"{rows} row{'s' * (rows > 1)} for rollout.prompts = 4: rows stand in a step more than"
            " once"
        ]
        if rows < prompts
        else []
    )


def test_the_divergence_falls(tmp_path):
    trainer(tmp_path / "run", "run.steps=60", "measure.count=0", "teacher.rule=frozen").train()
    rows = metrics(tmp_path / "run")
    early, late = (
        np.mean([row["divergence"] for row in rows[part]]) for part in (slice(0, 10), slice(50, 60))
    )
    assert late < 0.5 * early


def test_what_a_run_leaves(tmp_path):
    summary = trainer(tmp_path / "run").train()
    folder = RunFolder(tmp_path / "run")
    assert [row["step"] for row in folder.rows("metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert {row["step"] for row in folder.rows("rollouts.jsonl")} == {1, 4}
    assert [step for step, _ in folder.checkpoints()] == [4, 6]
    assert (folder.model / "model.npz").is_file()
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert summary["examples"] == 4
    assert [row["when"] for row in folder.rows("answers.jsonl")] == ["before"] * 4 + ["after"] * 4
    assert not list((tmp_path / "run").rglob("*.partial"))


class Spy(ToyBackend):
    """Writes down the temperatures that it is asked for."""

    def __init__(self):
        super().__init__()
        self.temperatures = []

    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        self.temperatures.append(sampling.temperature)
        return super().sample(prompts, uniforms, sampling, policy, prefill)

    def accumulate(self, groups, objective, split=0, prefill=None):
        self.temperatures.append(objective.temperature)
        return super().accumulate(groups, objective, split, prefill)


def test_metrics_add_up(tmp_path):
    backend = Spy()
    trainer(
        tmp_path / "run",
        "rollout.temperature=0.9",
        "objective.ratio_clip=0",
        "measure.count=0",
        backend=backend,
    ).train()
    assert set(backend.temperatures) == {0.9}
    for row in metrics(tmp_path / "run"):
        assert row["completions"] == 12
        assert row["ratio"] == 1
        assert row["loss"] == pytest.approx(row["divergence"], rel=1e-5)
        assert row["taken"] is True
        assert row["teacher_rate"] == 0.1
    sample = RunFolder(tmp_path / "run").rows("rollouts.jsonl")[0]
    assert len(sample["tokens"]) == len(sample["divergence"]) == len(sample["sampler_logprobs"])


@pytest.mark.parametrize(
    ("rule", "rates"), [("ema", [0.1] * 6), ("frozen", [0] * 6), ("live", [1] * 6)]
)
def test_the_teacher_follows_its_rule(tmp_path, rule, rates):
    """In closed form, from the student after every step."""

    class Followed(ToyBackend):
        def apply(self, update):
            result = super().apply(update)
            rate = rates[len(moves)]
            moves.append(rate)
            for name, value in expected.items():
                value += rate * (self.student[name] - value)
            return result

    moves, backend = [], Followed()
    expected = {name: value.copy() for name, value in backend.teacher.items()}
    trainer(tmp_path / "run", f"teacher.rule={rule}", "measure.count=0", backend=backend).train()
    assert len(moves) == 6
    for name, value in expected.items():
        np.testing.assert_allclose(backend.teacher[name], value, rtol=1e-12)
    assert not np.array_equal(backend.student["tokens"], ToyBackend().student["tokens"])


def test_what_is_encoded_for_training_has_no_answer(tmp_path, monkeypatch):
    seen = []
    for name in ("encode_student", "encode_teacher"):
        encode = getattr(usable, name)
        monkeypatch.setattr(
            usable,
            name,
            lambda encoder, example, *view, encode=encode: (
                seen.append(example),
                encode(encoder, example, *view),
            )[1],
        )
    trainer(
        tmp_path / "run",
        "measure.count=0",
        examples=[replace(one, choices=("abc", "d")) for one in coloured()],
    ).train()
    assert len(seen) == 2 * 6 * 4
    # options are part of the question
    assert {(one.answer, one.choices) for one in seen} == {(None, ("abc", "d"))}


def test_labels_are_never_read(tmp_path):
    class Unreadable(str):
        def __eq__(self, other):
            raise AssertionError("a label was read")

        __hash__ = str.__hash__

    labelled = trainer(tmp_path / "a", "measure.count=0")
    unlabelled = trainer(
        tmp_path / "b",
        "measure.count=0",
        examples=[replace(one, answer=None, choices=()) for one in coloured()],
    )
    misled = trainer(
        tmp_path / "c",
        "measure.count=0",
        examples=[replace(one, answer=Unreadable("no")) for one in coloured()],
    )
    for one in (labelled, unlabelled, misled):
        one.train()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") == metrics(tmp_path / "c")
    same(labelled.backend, unlabelled.backend)
    rows = [RunFolder(tmp_path / name).rows("rollouts.jsonl") for name in "abc"]
    assert rows[0] == rows[1] == rows[2]


def test_micro_batches_change_nothing(tmp_path):
    whole, cut = (
        trainer(tmp_path / "whole"),
        trainer(tmp_path / "cut", "rollout.microbatch_tokens=1", "rollout.sample_tokens=1"),
    )
    whole.train()
    cut.train()
    for ours, theirs in zip(metrics(tmp_path / "cut"), metrics(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_change_nothing(tmp_path, processes):
    """Three processes share four prompts unevenly, in micro-batches of one, so that calls are
    padded."""
    alone = trainer(tmp_path / "alone")
    summary = alone.train()
    together = {}

    def run(backend):
        one = trainer(
            tmp_path / "together",
            "rollout.microbatch_tokens=1",
            "rollout.sample_tokens=1",
            backend=backend,
        )
        together[backend.rank] = (one.train(), backend)

    recipe = recipes.load("paper", OPTIONS)
    RunFolder.create(tmp_path / "together", recipes.write(recipe, {}))
    Together.start(processes, run)
    for ours, theirs in zip(
        metrics(tmp_path / "together"), metrics(tmp_path / "alone"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for found, backend in together.values():
        assert found["after"] == summary["after"]
        for name, value in alone.backend.tensors("student").items():
            np.testing.assert_allclose(backend.tensors("student")[name], value, rtol=1e-6)


class StopAfter(Quiet):
    def __init__(self, step):
        self.last = step
        self.stopping = False

    def step(self, metrics):
        self.stopping = metrics["step"] == self.last


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, step):
    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(Stopped, match=f"stopped after step {step}; go on with: opd train --resume"):
        trainer(tmp_path / "stopped", progress=StopAfter(step)).train()
    resumed = trainer(tmp_path / "stopped")
    resumed.train()
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    for name in ("rollouts.jsonl", "answers.jsonl"):
        assert RunFolder(tmp_path / "stopped").rows(name) == RunFolder(tmp_path / "whole").rows(
            name
        )
    same(resumed.backend, whole.backend)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """Steps after the checkpoint are done again, and a half-written line or checkpoint does no
    harm."""
    whole = trainer(tmp_path / "whole")
    whole.train()

    class Killed(ToyBackend):
        def apply(self, update):
            if self.steps == 5:
                raise MemoryError
            return super().apply(update)

    with pytest.raises(MemoryError):
        trainer(tmp_path / "killed", backend=Killed()).train()
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss"')
    (tmp_path / "killed/checkpoints/step-000006.partial").mkdir()
    resumed = trainer(tmp_path / "killed")
    resumed.train()
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    same(resumed.backend, whole.backend)


def test_where_a_resumed_run_goes_on_is_said(tmp_path):
    """And of a damaged checkpoint, what to do."""
    first = trainer(tmp_path / "run")
    first.train()
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")
    notes = []
    again = trainer(tmp_path / "run")
    again.progress.note = notes.append
    again.train()
    assert "going on after step 4 of 6" in notes
    for name, way in (("step-000006", "go on from step 4"), ("step-000004", "start again")):
        (tmp_path / f"run/checkpoints/{name}/state.json").write_text("{")
        with pytest.raises(FolderError, match=rf"{name}' is damaged: .*; remove it to {way}"):
            trainer(tmp_path / "run").train()
        shutil.rmtree(tmp_path / f"run/checkpoints/{name}")


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    class Broken(ToyBackend):
        def apply(self, update):
            if self.steps == 2 and not getattr(self, "broken", False):
                self.broken = True
                self.gradient["tokens"][0, 0] = np.nan
            return super().apply(update)

    one = trainer(tmp_path / "run", backend=Broken())
    summary = one.train()
    taken = [(row["taken"], row["teacher_rate"]) for row in metrics(tmp_path / "run")]
    assert taken == [(True, 0.1), (True, 0.1), (False, 0.0), (True, 0.1), (True, 0.1), (True, 0.1)]
    assert one.backend.steps == 5
    assert (summary["steps_not_finite"], summary["steps_not_taken"]) == (1, 1)
    assert [row.get("not_taken") for row in metrics(tmp_path / "run")] == [
        None,
        None,
        "the gradient was not finite",
        None,
        None,
        None,
    ]


def test_rows_that_cannot_be_used_are_skipped_and_counted(tmp_path):
    class Narrow(ToyEncoder):
        def encode(self, images, question, policy="student"):
            if question == "what":
                raise DataError("too narrow")
            return super().encode(images, question, policy)

    one = trainer(
        tmp_path / "run",
        "measure.count=0",
        "data.max_prompt_tokens=10",
        "rollout.prompts=12",
        "run.steps=2",
    )
    one.encoder = Narrow()
    notes = []
    one.progress.note = notes.append
    summary = one.train()
    rows = {f"{one.source} ({one.id})": one.question for one in coloured()}
    narrow = {row for row, question in rows.items() if question == "what"}
    long = {row for row, question in rows.items() if len(question) + 1 > 10}
    assert (len(narrow), len(long)) == (2, 1)
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [3, 3]
    assert (summary["prompts_skipped"], summary["rows_unusable"]) == (6, 3)
    # Each row is told once, and all of them together at the end.
    assert sorted(notes[:-1]) == sorted(
        [*(f"skipped {row}: too narrow" for row in narrow)]
        + [f"skipped {row}: prompt of 11 tokens, above data.max_prompt_tokens = 10" for row in long]
    )
    assert (
        notes[-1] == "6 of 24 prompts (25.0%) could not be used: 2 rows: too narrow, 1 row: above"
        f" data.max_prompt_tokens = 10; named in {tmp_path / 'run/skipped.jsonl'}"
    )
    assert {
        row["row"] for row in RunFolder(tmp_path / "run").rows("skipped.jsonl")
    } == narrow | long


def test_the_teacher_sees_the_crop(tmp_path):
    one = trainer(tmp_path / "run")
    pair = (
        Batches(one.recipe, one.backend, one.encoder, one.examples, Skipped(Quiet()))
        .encode(1)
        .pairs[0]
    )
    (example,) = (one for one in coloured() if one.id == pair.id)
    colour = np.asarray(example.images[0])
    np.testing.assert_allclose(
        pair.student.images["pixel_values"][0], colour.reshape(-1, 3).mean(0) / 255, rtol=1e-5
    )
    assert (
        np.abs(pair.teacher.images["pixel_values"] - pair.student.images["pixel_values"]).max()
        > 1e-3
    )
    np.testing.assert_array_equal(pair.teacher.tokens, pair.student.tokens)


class Small(ToyBackend):
    """A device whose memory suffices for few padded tokens at a time, in sampling and for a
    gradient; or not at a third gradient."""

    def __init__(self, sampled, differentiated):
        super().__init__()
        self.limits = sampled, differentiated
        self.failures = self.calls = 0

    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        longest = max(map(len, prompts)) + uniforms.shape[1] * uniforms.shape[2]
        self.check_budget(len(prompts) * longest, self.limits[0])
        return super().sample(prompts, uniforms, sampling, policy, prefill)

    def accumulate(self, groups, objective, split=0, prefill=None):
        longest = max(max(len(group.student), len(group.teacher)) for group in groups)
        members = min(split or 99, max(len(group.completions) for group in groups))
        tokens = max(len(one) for group in groups for one in group.completions)
        try:
            self.check_budget(len(groups) * (longest + members * tokens), self.limits[1])
        except OutOfMemory:
            # with what earlier calls added, as the protocol says
            self.gradient = {name: np.zeros_like(value) for name, value in self.student.items()}
            raise
        return super().accumulate(groups, objective, split, prefill)

    def check_budget(self, padded, limit):
        self.calls += limit == "third call"
        if self.calls == 3 if limit == "third call" else padded > limit:
            self.failures += 1
            raise OutOfMemory("out of memory")


class Noted(Quiet):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.mark.parametrize(
    ("limits", "budget"),
    [((60, 10**6), 100), ((10**6, 60), 100), ((60, 60), 100), ((10**6, "third call"), 24)],
)
def test_a_step_that_was_out_of_memory_is_taken_again_with_smaller_budgets(
    tmp_path, limits, budget
):
    """To the same result, and the run goes on with them."""
    whole, told = ToyBackend(), Noted()
    trainer(tmp_path / "whole", "measure.count=0", backend=whole).train()
    small = Small(*limits)
    trainer(
        tmp_path / "small",
        "measure.count=0",
        f"rollout.microbatch_tokens={budget}",
        backend=small,
        progress=told,
    ).train()
    assert small.failures
    assert len(told.notes) == small.failures
    assert all(
        line.startswith(
            "step 1: out of memory; it is taken again, and the run goes on, with rollout."
        )
        for line in told.notes
    )
    for name, value in whole.tensors("student").items():
        np.testing.assert_allclose(small.tensors("student")[name], value, rtol=0, atol=1e-6)
    assert [row["tokens"] for row in metrics(tmp_path / "small")] == [
        row["tokens"] for row in metrics(tmp_path / "whole")
    ]


def test_a_device_too_small_for_one_completion_ends_the_run(tmp_path):
    with pytest.raises(RunError, match="out of memory"):
        trainer(tmp_path / "run", "measure.count=0", backend=Small(3, 3)).train()
    assert not (tmp_path / "run/checkpoints").exists()


class Heard:
    def __init__(self):
        self.said = []

    def step(self, result):
        self.said.append(("step", result.metrics["step"], len(result.statistics)))

    def measured(self, step, accuracies):
        self.said.append(("measured", step, accuracies["rows"]))

    def interrupted(self):
        self.said.append(("interrupted",))

    def ended(self, summary):
        self.said.append(("ended", summary["steps"]))


def test_monitors_hear_what_happens_in_its_order(tmp_path):
    one, heard = trainer(tmp_path / "run", "run.steps=4", "measure.every=2"), Heard()
    one.monitors = [heard]
    one.train()
    assert heard.said == [
        ("measured", 0, 4),
        ("step", 1, 4),
        ("step", 2, 4),
        ("measured", 2, 4),
        ("step", 3, 4),
        ("step", 4, 4),
        ("measured", 4, 4),
        ("ended", 4),
    ]
