"""Mixtures of views: shares, purity, and what a row's view decides."""

from __future__ import annotations

import tomllib
from collections import Counter

import pytest
from PIL import Image

from opd.errors import RecipeError
from opd.run.recipe import load, validate, write
from opd.testing.toy import ToyEncoder
from opd.types import Box, Example
from opd.views import usable
from opd.views.images import student_images, teacher_images, teacher_sizes, views_per_image
from opd.views.usable import Unusable
from opd.views.view import ViewOptions
from tests.views.test_views import noise

SHARES = {"crop": 0.6, "several": 0.3, "degrade": 0.1}
OPTIONS = ViewOptions(mixture=SHARES).seeded(5)


def named(id):
    return Example(id, (Image.new("1", (9, 9)),), "What?")


def kinds(options, count=10_000):
    return [options.view.kind(named(f"rows.jsonl:{row}"), options) for row in range(count)]


def test_every_view_gets_its_share():
    counts = Counter(kinds(OPTIONS))
    assert counts.keys() == SHARES.keys()
    for kind, share in SHARES.items():
        assert counts[kind] == pytest.approx(10_000 * share, abs=200)


def test_a_rows_view_is_of_its_id_and_the_seed_alone():
    assert kinds(OPTIONS, 500) == kinds(ViewOptions(mixture=SHARES).seeded(5), 500)
    assert kinds(OPTIONS, 500) != kinds(OPTIONS.seeded(6), 500)
    same = sum(a == b for a, b in zip(kinds(OPTIONS), kinds(OPTIONS.seeded(6)), strict=True))
    assert same == pytest.approx(10_000 * (0.36 + 0.09 + 0.01), abs=200)  # independent draws


def test_a_row_is_shown_as_in_its_view():
    met = set()
    for number in range(40):
        one = Example(f"{number}", (noise(60, 40),), "What?", (Box(9, 9, 30, 20),))
        kind = OPTIONS.view.kind(one, OPTIONS)
        alone = ViewOptions(kind=kind).seeded(5)
        met.add(kind)
        for see in (teacher_images, student_images):
            mixed, expected = see(one, OPTIONS), see(one, alone)
            assert [image.tobytes() for image in mixed] == [image.tobytes() for image in expected]
        assert teacher_sizes(one, OPTIONS) == teacher_sizes(one, alone)
        assert views_per_image(one, OPTIONS) == views_per_image(one, alone)
    assert met == SHARES.keys()


def test_a_row_that_lacks_what_its_view_needs_gets_no_other():
    reasons = Counter()
    for number in range(200):
        one = Example(f"{number}", (noise(60, 40),), "What?")
        try:
            usable.encode(ToyEncoder(), one, OPTIONS)
            assert OPTIONS.view.kind(one, OPTIONS) == "degrade"
        except Unusable as error:
            reasons[error.kind] += 1
    assert all("needs boxes" in reason for reason in reasons)
    assert 160 < reasons.total() < 200


@pytest.mark.parametrize(
    ("shares", "needed"),
    [
        ({"crop": 0.5, "context": 0.5}, True),
        ({"crop": 0.9, "degrade": 0.1}, False),  # the rows that are degraded need none
        ({"full": 0.5, "degrade": 0.5}, False),
    ],
)
def test_evidence_is_needed_where_every_view_needs_it(shares, needed):
    assert ViewOptions(mixture=shares).view.needs_evidence is needed


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{crop = 0.7, context = 0.2}", "the shares sum to 0.9, not to 1"),
        ("{crop = 0.7, context = 0.3001}", "the shares sum to 1.0001, not to 1"),
        ("{crop = 0.7, context = 0.7}", "the shares sum to 1.4, not to 1"),
        ("{crop = 1, full = 0}", "view.mixture.full = 0: input should be greater than 0"),
        ("{crop = 1.5, full = -0.5}", "view.mixture.crop = 1.5: input should be less than or"),
        ("{corp = 1}", "view.mixture.corp = 'corp': no view has this name; did you mean 'crop'"),
        ("{crop = nan}", "view.mixture.crop = nan: input should be a finite number"),
        ("crop", "view.mixture = 'crop': write it as {crop = 0.7, context = 0.3}"),
        ('["crop"]', "view.mixture = ['crop']: write it as {crop = 0.7, context = 0.3}"),
    ],
)
def test_a_mixture_that_is_none_is_refused_in_one_line(value, said):
    with pytest.raises(RecipeError) as refused:
        load("tiny", [f"view.mixture={value}"])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_kind_beside_a_mixture_is_refused():
    both = ["view.kind=full", "view.mixture={crop = 1}"]
    with pytest.raises(RecipeError, match="kind = 'full' beside a mixture; set view"):
        load("tiny", both)
    assert load("tiny", [*both, "view.mixture={}"]).view.title == "full"  # as the message says
    assert load("tiny", [*both, "view.kind=crop"]).view.title == "crop 1"


@pytest.mark.parametrize(
    "value", ["{crop = 0.25, context = 0.75}", '{"crop": 0.25, "context": 0.75}']
)
def test_a_mixture_is_read_back_as_it_was_written(value):
    """From the command line as TOML or JSON; from a run's config.toml."""
    recipe = load("tiny", [f"view.mixture={value}", "run.seed=9"])
    assert recipe.view.title == "crop 0.25, context 0.75"
    values = tomllib.loads(write(recipe, {"opd": "0"}))
    values.pop("made_with")
    assert validate(values, "config.toml") == recipe
    assert recipe.seeded_view.seed == 9
    assert (recipe.view.seed, load("tiny").seeded_view.seed) == (0, 0)


def test_shares_within_rounding_are_taken():
    assert ViewOptions(mixture={"crop": 1 / 3, "full": 1 / 3, "wrong": 0.3333337}).title
