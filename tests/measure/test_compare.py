"""Views compared on the same rows: accuracies, agreement and certainty, alone and in pairs; and
rows of which a view, or the crop, cannot be made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from opd.errors import RecipeError
from opd.measure.compare import Comparison, Seen, compare, names_of, report
from opd.measure.gap import accuracies, changes, gap_closed, greedy_answers, judge
from opd.measure.replies import Reply
from opd.objective import log_softmax
from opd.progress import Quiet
from opd.testing.toy import ToyBackend, ToyEncoder
from opd.types import Sampling
from opd.views import usable
from opd.views.usable import Skipped, Unusable
from opd.views.view import ViewOptions
from opd_cli import tables
from tests.conftest import coloured

BASE = ViewOptions(margin=0).seeded(4)


def views(*names):
    return {name: BASE.of(name) for name in names}


def compared(examples, *names, **options):
    return compare(ToyBackend(), ToyEncoder(), examples, views(*names), 4, 10**6, **options)


def made(letters, certainties=None):
    """A comparison of rows of letters by view: r is right, w wrong, and - has no such view."""
    names = tuple(letters)
    seen = []
    for row, marks in enumerate(zip(*letters.values(), strict=True)):
        texts = {"r": "7", "w": "8"}
        said = {
            name: Reply(texts[mark], (certainties or {}).get(name, -0.5), 10)
            for name, mark in zip(names, marks, strict=True)
            if mark != "-"
        }
        seen.append(Seen(row, said, {name: reply.text == "7" for name, reply in said.items()}))
    lacking = {name: Skipped(Quiet()) for name in names[1:]}
    return Comparison(names, tuple(seen), lacking)


def of(comparison):
    examples = [replace(one, answer="7") for one in coloured(len(comparison.seen))]
    return report(comparison, examples)


def test_accuracies_and_paired_differences():
    found = of(made({"full": "rwwr" * 25, "crop": "rrwr" * 25, "context": "wwwr" * 25}))
    got = {name: view["accuracy"] for name, view in found["views"].items()}
    assert got == {"full": 0.5, "crop": 0.75, "context": 0.25}
    assert {(one["a"], one["b"]): one["difference"] for one in found["pairs"]} == {
        ("full", "crop"): 0.25,
        ("full", "context"): -0.25,
        ("crop", "context"): -0.5,
    }
    first = found["pairs"][0]
    assert first["interval"] == found["gap_interval"]  # today's numbers stand beside
    assert (found["gap"], found["crop_accuracy"], found["agreement"]) == (0.25, 0.75, 0.75)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 100)  # a difference of 1 in a quarter of the rows
    assert first["interval"] == pytest.approx([0.25 - half, 0.25 + half], abs=0.1 * half)
    assert found["views"]["crop"]["agreement"] == 0.75
    assert "agreement" not in found["views"]["full"]


def test_equal_views_differ_by_nothing_at_all():
    """Intervals are paired: each resample has the same rows on both sides."""
    marks = "".join(np.random.default_rng(0).choice(["r", "w"], size=200))
    (pair,) = of(made({"full": marks, "context": marks}))["pairs"]
    assert (pair["difference"], pair["interval"], pair["agreement"]) == (0.0, [0.0, 0.0], 1.0)


def test_a_pair_is_of_the_rows_that_have_both():
    found = of(made({"full": "rrrrrr", "crop": "rw-r--", "given": "--rww-"}))
    assert [view["rows"] for view in found["views"].values()] == [6, 3, 3]
    pairs = {(one["a"], one["b"]): one for one in found["pairs"]}
    assert pairs["crop", "given"]["rows"] == 1
    assert pairs["crop", "given"]["difference"] == -1
    assert pairs["full", "given"]["difference"] == pytest.approx(-2 / 3)
    assert found["full_alone"] == 1
    assert (found["full_accuracy"], found["crop_accuracy"]) == (1.0, pytest.approx(2 / 3))
    assert found["crop_rows"] == 3
    nothing = of(made({"full": "rr", "crop": "--"}))
    assert nothing["pairs"] == []
    assert nothing["views"]["crop"]["rows"] == 0
    assert nothing["full_alone"] == 2


def test_without_answers_agreement_and_certainty_are_left():
    examples = [replace(one, answer=None) for one in coloured(6)]
    comparison = compared(examples, "crop", "full", "wrong")
    assert comparison.names == ("full", "crop", "wrong")
    found = report(comparison, examples)
    for name, view in found["views"].items():
        assert view["rows_with_answer"] == 0
        assert not {"accuracy", "interval"} & view.keys()
        low, high = view["certainty_interval"]
        assert low <= view["certainty"] <= high < 0
        assert ("agreement" in view) is (name != "full")
    for pair in found["pairs"]:
        assert not {"difference", "interval"} & pair.keys()
        a, b = (found["views"][pair[side]]["certainty"] for side in "ab")
        assert pair["certainty_difference"] == pytest.approx(b - a)
    assert "full_accuracy" not in found


def test_certainty_is_the_mean_log_probability_of_the_answers_own_tokens():
    backend, examples = ToyBackend(), coloured(3)
    comparison = compared(examples, "crop")
    for one in comparison.seen:
        encode = {
            "full": lambda example: usable.encode_full(ToyEncoder(), example),
            "crop": lambda example: usable.encode_view(ToyEncoder(), example, BASE),
        }
        for name, reply in one.replies.items():
            prompt = encode[name](examples[one.row])
            sampling = Sampling(0.0, ToyEncoder.stop, ToyEncoder.banned)
            ((completion,),) = backend.sample([prompt], np.zeros((1, 1, 4), np.float32), sampling)
            weights = backend.student
            state, logprobs = prompt.images["pixel_values"].mean(0) @ weights["vision"], []
            last = prompt.tokens[-1]
            for token in completion.tokens:
                logits = (weights["tokens"][last] + state).astype(float)
                logits[list(ToyEncoder.banned)] = -np.inf
                logprobs.append(log_softmax(logits)[token])
                last = token
            assert reply.certainty == pytest.approx(np.mean(logprobs), rel=1e-5)
            assert reply.prompt_tokens == len(prompt)
            assert reply.text == ToyEncoder().decode(completion.tokens)


def test_a_view_is_answered_as_the_teacher_sees_it_and_full_images_are_clean():
    """Of a view that degrades the student's images, the student's are measured too."""
    examples = coloured(12)
    comparison = compared(examples, "degrade", "several")
    assert comparison.names == ("full", "degrade (student)", "degrade", "several")
    assert comparison.names == names_of(views("degrade", "several"))
    encoder, differ = ToyEncoder(), 0
    for one in comparison.seen:
        example = examples[one.row]
        prompts = {
            "full": usable.encode_student(encoder, example),
            "degrade (student)": usable.encode_student(encoder, example, BASE.of("degrade")),
            "degrade": usable.encode_student(encoder, example),
            "several": usable.encode_teacher(encoder, example, BASE.of("several")),
        }
        for name, prompt in prompts.items():
            sampling = Sampling(0.0, encoder.stop, encoder.banned)
            ((said,),) = ToyBackend().sample([prompt], np.zeros((1, 1, 4), np.float32), sampling)
            assert one.replies[name].text == encoder.decode(said.tokens)
        differ += one.replies["full"].certainty != one.replies["degrade (student)"].certainty
    assert 4 <= differ <= 12


def test_rows_that_lack_a_view_keep_the_others():
    examples = coloured(8)
    for row in (1, 5):
        examples[row] = replace(examples[row], boxes=())
    heard, skipped = [], Skipped(Quiet())
    comparison = compared(
        examples, "crop", "marked", "degrade", progress=heard.append, skipped=skipped
    )
    assert sum(heard) == 8 * 5
    assert [one.row for one in comparison.seen] == list(range(8))
    assert skipped.reasons == {}
    found = report(comparison, examples)
    assert [view["rows"] for view in found["views"].values()] == [8, 6, 6, 8, 8]
    assert found["views"]["degrade"]["lacking"] == {}
    ((reason, count),) = found["views"]["marked"]["lacking"].items()
    assert count == 2
    assert "needs boxes, each in one of the example's images" in reason
    assert found["full_alone"] == 0
    assert report(compared(examples, "crop"), examples)["full_alone"] == 2


def test_a_row_whose_full_image_cannot_be_used_is_left_out():
    class Fading(ToyEncoder):
        def encode(self, images, question, policy="student"):
            if policy == "student" and question == coloured(3)[2].question:
                raise Unusable("no")
            return super().encode(images, question, policy)

    skipped, heard = Skipped(Quiet()), []
    comparison = compare(
        ToyBackend(), Fading(), coloured(3), views("crop"), 4, 10**6, heard.append, skipped=skipped
    )
    assert [one.row for one in comparison.seen] == [0, 1]
    assert (sum(heard), list(skipped.reasons)) == (6, ["toy:2 (toy-2)"])


def test_prompts_too_long_in_a_view_alone_lack_it():
    """`several` has one token more than the full image in the toy's prompts."""
    examples = coloured(7)
    limit = len(usable.encode_full(ToyEncoder(), max(examples, key=lambda one: len(one.question))))
    found = report(compared(examples, "several", limit=limit), examples)
    assert found["views"]["full"]["rows"] == 7
    ((reason, count),) = found["views"]["several"]["lacking"].items()
    assert reason == f"above data.max_prompt_tokens = {limit}"
    assert found["views"]["several"]["rows"] == 7 - count < 7


def test_an_unknown_view_is_told():
    with pytest.raises(RecipeError, match="no view is called 'corp'; did you mean 'crop'"):
        names_of(views("corp"))


def test_the_table_says_what_was_measured(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    marks = {"full": "rwwr" * 5, "degrade (student)": "wwwr" * 5, "crop": "rrw-" * 5}
    tables.compared(of(made(marks)), "a model", "a device")
    said = capsys.readouterr().out
    assert "a model: 20 examples, on a device" in said
    assert "degrade (student)   25.0 [11.2, 46.9]" in said
    assert "crop - full" in said
    assert "full image alone" not in said
    tables.compared(of(made({"full": "rr", "crop": "r-"})), "a model", "a device")
    line = "1 example without another view: the full image alone was measured"
    assert line in capsys.readouterr().out.splitlines()
    examples = [replace(one, answer=None) for one in coloured(4)]
    tables.compared(report(compared(examples, "crop"), examples), "a model", "a device")
    said = capsys.readouterr().out
    assert "% right" not in said
    assert "nats/token [95 % interval]" in said


# Rows without evidence, without --view


def without(examples, *rows):
    return [replace(e, boxes=()) if place in rows else e for place, e in enumerate(examples)]


def test_rows_without_evidence_are_answered_on_the_full_image_alone():
    heard = []
    given = ToyBackend(), ToyEncoder()
    found = greedy_answers(*given, without(coloured(6), 1, 4), BASE, 4, 10**6, heard.append)
    assert [one.crop is None for one in found] == [False, True, False, False, True, False]
    assert sum(heard) == 12
    whole = greedy_answers(*given, coloured(6), BASE, 4, 10**6)
    assert [one.full for one in found] == [one.full for one in whole]
    assert [one.crop for one in found if one.crop] == [
        one.crop for one, ours in zip(whole, found, strict=True) if ours.crop
    ]


def test_they_count_for_the_full_images_accuracy_alone():
    """The gap stays one of the rows that have both."""
    example = replace(coloured(1)[0], answer="7")

    def rows(*pairs):
        return [judge(row, example, *pair) for row, pair in enumerate(pairs)]

    found = accuracies(rows(("7", "7"), ("8", "7"), ("7", None), ("7", None)))
    assert (found["rows"], found["crop_rows"], found["full_accuracy"]) == (4, 2, 0.75)
    assert (found["crop_accuracy"], found["gap"], found["agreement"]) == (1.0, 0.5, 0.5)
    alone = accuracies(rows(("7", None), ("8", None)))
    assert alone.keys() == {
        "rows",
        "rows_with_answer",
        "crop_rows",
        "full_accuracy",
        "full_accuracy_interval",
    }
    assert gap_closed(rows(("7", None)), rows(("8", None))) == {}
    fell = changes(rows(*[("7", None)] * 50), rows(*[("8", None)] * 50))
    assert (fell["verdict"], fell["full_change"]) == ("collapsed", -1.0)
    assert "crop_change" not in fell
