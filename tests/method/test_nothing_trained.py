"""A run that trains nothing ends with the cause, and leaves nothing that looks trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from opd.errors import DataError, RunError
from opd.method.step import GRADIENT
from opd.run import preflight
from opd.run.folder import RunFolder
from opd.testing.toy import Together, ToyBackend, ToyEncoder
from opd.types import Completion
from tests.conftest import coloured
from tests.run.test_loop import metrics, trainer


class Poisoned(ToyBackend):
    """Its gradient is not finite in some steps, counted from 1 over a whole run."""

    def __init__(self, steps, seen=0):
        super().__init__()
        self.poisoned, self.seen = set(steps), seen

    def apply(self, update):
        self.seen += 1
        if self.seen in self.poisoned:
            self.gradient["tokens"][0, 0] = np.inf
        return super().apply(update)


class Drawing(ToyBackend):
    """Every completion is of the tokens given."""

    def __init__(self, *completions):
        super().__init__()
        self.completions = completions

    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        made = [
            Completion(np.array(one, np.int32), np.zeros(len(one), np.float32), False)
            for one in self.completions
        ]
        return [[made[index % len(made)] for index in range(uniforms.shape[1])] for _ in prompts]


class Refusing(ToyEncoder):
    """Refuses the questions given, as an encoder refuses a ribbon."""

    def __init__(self, *questions):
        self.questions = questions

    def encode(self, images, question, policy="student"):
        if question in self.questions:
            raise DataError(f"images of {images[0].width} x 2 pixels cannot be encoded")
        return super().encode(images, question, policy)


def ended(path, one):
    """The message with which a run ends; nothing that looks trained may be there."""
    with pytest.raises(RunError) as error:
        one.train()
    assert not list(path.glob("model*"))
    assert not list(path.glob("adapter*"))
    assert not (path / "summary.json").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "options", [["data.max_prompt_tokens=1"], ["data.max_prompt_tokens=1", "rollout.prompts=1"]]
)
def test_a_step_without_a_usable_prompt_ends_the_run_with_the_cause(tmp_path, options):
    one = trainer(tmp_path / "run", *options)
    said = ended(tmp_path / "run", one)
    assert (
        said == "step 1: no prompt of the step can be used, and none in the data (12 rows: above"
        " data.max_prompt_tokens = 1)"
    )
    assert "finite" not in said
    assert not one.folder.checkpoints()


def test_of_large_data_a_sample_is_named_as_one(tmp_path):
    examples = coloured(preflight.SAMPLE + 1)
    sets = ["data.max_prompt_tokens=1", "rollout.prompts=1"]
    one = trainer(tmp_path / "run", *sets, examples=examples)
    assert (
        "step 1: no prompt of the step can be used, and none of 64 rows spread over the data ("
        in ended(tmp_path / "run", one)
    )


def test_the_most_frequent_cause_stands_first(tmp_path):
    """Three rows are too long, one is a ribbon."""
    examples = [
        replace(one, question=question)
        for one, question in zip(coloured(4), ("aa", "bbbb", "cccc", "dddd"), strict=True)
    ]
    one = trainer(tmp_path / "run", "data.max_prompt_tokens=4", examples=examples)
    one.encoder = Refusing("aa")
    assert "(3 rows: above data.max_prompt_tokens = 4, 1 row: images of" in ended(
        tmp_path / "run", one
    )


def test_a_prompt_that_vanishes_late_ends_the_run_behind_what_was_learnt(tmp_path):
    """And once the images are back the run goes on to the same numbers."""
    whole = trainer(tmp_path / "whole", "measure.count=0")
    whole.train()

    class Vanishing(ToyEncoder):
        calls = 0

        def encode(self, images, question, policy="student"):
            self.calls += 1
            if self.calls > 2 * 4 * 3:
                raise DataError("image not found: /share/one.png")
            return super().encode(images, question, policy)

    one = trainer(tmp_path / "run", "measure.count=0", "run.checkpoint_every=0")
    one.encoder = Vanishing()
    assert ended(tmp_path / "run", one).startswith(
        "step 4: no prompt of the step can be used, and none in the data (12 rows: image not found)"
    )
    assert [step for step, _ in one.folder.checkpoints()] == [3]
    trainer(tmp_path / "run").train()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_processes_end_together_where_one_has_no_prompt(tmp_path):
    """Rows 1 and 3 of four fall to the second of two processes."""

    def run(backend):
        examples = [replace(one, question=f"q{index}") for index, one in enumerate(coloured(2))]
        one = trainer(
            tmp_path / "run",
            "rollout.prompts=2",
            "measure.count=0",
            backend=backend,
            examples=examples,
        )
        one.encoder = Refusing("q0")
        one.train()

    from opd.run import recipe as recipes
    from tests.run.test_loop import OPTIONS

    RunFolder.create(tmp_path / "run", recipes.write(recipes.load("paper", OPTIONS), {}))
    with pytest.raises(
        RunError,
        match=r"^steps 1 to 5 were not taken: no prompt of the step can be used; mend or remove",
    ):
        Together.start(2, run)


def test_a_run_goes_on_where_other_rows_can_be_used(tmp_path):
    """One prompt a step, and one row of four that cannot be used: its steps are not taken, which is
    told and counted."""
    examples = [replace(one, question=f"q{index}") for index, one in enumerate(coloured(4))]
    one = trainer(
        tmp_path / "run", "rollout.prompts=1", "run.steps=8", "measure.count=0", examples=examples
    )
    one.encoder = Refusing("q1")
    notes = []
    one.progress.note = notes.append
    summary = one.train()
    assert (
        summary["steps_not_taken"],
        summary["steps_not_finite"],
        summary["prompts_skipped"],
    ) == (2, 0, 2)
    assert (
        sum(
            note.endswith("no prompt of the step can be used, so the step was not taken")
            for note in notes
        )
        == 2
    )
    assert any(
        note.startswith("2 of 8 prompts (25.0%) could not be used: 1 row: images of")
        for note in notes
    )
    assert (tmp_path / "run/model").is_dir()


def test_five_steps_in_a_row_without_a_prompt_end_a_run(tmp_path):
    examples = [replace(one, question=f"q{index}") for index, one in enumerate(coloured(12))]
    one = trainer(
        tmp_path / "run", "rollout.prompts=1", "run.steps=24", "measure.count=0", examples=examples
    )
    one.encoder = Refusing(*(f"q{index}" for index in range(1, 12)))
    assert "were not taken: no prompt of the step can be used; mend or remove such rows" in ended(
        tmp_path / "run", one
    )


@pytest.mark.parametrize(
    ("backend", "cause"),
    [
        (Poisoned(range(1, 99)), "the gradient was not finite; lower optimizer.learning_rate"),
        (Drawing([]), "every completion was empty"),
        (Drawing([1, 0], [5, 1]), "every completion held a banned token"),
        (Drawing([1, 0], []), "every completion was empty or held a banned token"),
    ],
    ids=["infinite", "empty", "banned", "both"],
)
@pytest.mark.parametrize("steps", [3, 9])
def test_steps_that_are_not_taken_end_the_run(tmp_path, backend, cause, steps):
    backend.seen = 0
    before = backend.tensors("student")
    one = trainer(
        tmp_path / "run",
        "measure.count=0",
        f"run.steps={steps}",
        "run.checkpoint_every=1",
        backend=backend,
    )
    notes = []
    one.progress.note = notes.append
    said = ended(tmp_path / "run", one)
    assert said.startswith(f"steps 1 to {min(steps, 5)} were not taken: {cause}")
    assert len(metrics(tmp_path / "run")) == min(steps, 5)
    assert ("finite" in said) is ("finite" in cause)
    assert notes[0] == f"step 1: {cause.partition(';')[0]}, so the step was not taken"
    assert not one.folder.checkpoints()
    for name, value in backend.tensors("student").items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("count", [0, 4], ids=["trained", "measured"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_the_cause(tmp_path, count, value):
    backend = ToyBackend()
    backend.student["tokens"][:] = value
    with np.errstate(invalid="ignore"):
        said = ended(
            tmp_path / "run", trainer(tmp_path / "run", f"measure.count={count}", backend=backend)
        )
    assert said.startswith(
        "the model's log-probabilities are not finite (NaN or infinite), so it cannot answer"
    )
    assert metrics(tmp_path / "run") == []


def test_a_teacher_whose_weights_are_not_finite_is_no_gradient_that_is_not_finite(tmp_path):
    backend = ToyBackend()
    backend.teacher["tokens"][:] = np.nan
    with np.errstate(invalid="ignore"):
        said = ended(
            tmp_path / "run", trainer(tmp_path / "run", "measure.count=0", backend=backend)
        )
    assert said.startswith(
        "steps 1 to 5 were not taken: the model's log-probabilities were not finite; look for NaN"
    )


def test_a_step_of_rows_that_weigh_nothing_is_not_taken(tmp_path):
    """Not even weight decay moves the model then."""
    backend = ToyBackend()
    before = backend.tensors("student")
    examples = [replace(one, weight=0.0) for one in coloured()]
    said = ended(
        tmp_path / "run",
        trainer(tmp_path / "run", "measure.count=0", backend=backend, examples=examples),
    )
    assert said.startswith(
        "steps 1 to 5 were not taken: every row had weight 0; give rows a weight above 0"
    )
    for name, value in backend.tensors("student").items():
        np.testing.assert_array_equal(value, before[name])


def test_five_steps_in_a_row_end_a_run_that_has_learnt(tmp_path):
    """It is saved behind its last step, and going on it ends at the next bad step; a good one lets
    it go on."""
    options = ["measure.count=0", "run.steps=12", "run.checkpoint_every=4"]
    one = trainer(tmp_path / "run", *options, backend=Poisoned(range(3, 99)))
    said = ended(tmp_path / "run", one)
    assert said.startswith("steps 3 to 7 were not taken: the gradient was not finite")
    assert [step for step, _ in one.folder.checkpoints()] == [4, 7]
    again = trainer(tmp_path / "run", *options, backend=Poisoned(range(3, 99), seen=7))
    assert ended(tmp_path / "run", again).startswith("steps 3 to 8 were not taken")
    mended = trainer(tmp_path / "run", *options, backend=Poisoned(()))
    assert mended.train()["steps_not_taken"] == 6
    assert (tmp_path / "run/model").is_dir()


def test_a_run_whose_last_five_steps_were_not_taken_is_not_exported_when_resumed(tmp_path):
    options = ["measure.count=0", "run.steps=7"]
    for _ in range(2):
        one = trainer(tmp_path / "run", *options, backend=Poisoned(range(3, 99)))
        assert ended(tmp_path / "run", one).startswith("steps 3 to 7 were not taken")


def test_four_steps_in_a_row_do_not_end_a_run(tmp_path):
    one = trainer(
        tmp_path / "run",
        "measure.count=0",
        "run.steps=11",
        backend=Poisoned({1, 2, 3, 4, 6, 7, 8, 9, 11}),
    )
    summary = one.train()
    assert (summary["steps_not_taken"], one.state.taken, one.state.idle) == (9, 2, [GRADIENT])


def test_a_run_that_took_no_step_is_not_exported_when_it_is_resumed(tmp_path):
    for _ in range(2):
        one = trainer(
            tmp_path / "run", "measure.count=0", "run.steps=3", backend=Poisoned(range(99))
        )
        assert ended(tmp_path / "run", one).endswith(
            "no step was taken, so there is no trained model to write"
        )
