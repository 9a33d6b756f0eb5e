"""Before the first step a person hears how many rows are too long, and what would keep them; and
where none can be used, nothing runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from opd.data import spread
from opd.errors import DataError
from opd.progress import Quiet
from opd.prompts.encoder import PromptEncoder
from opd.prompts.processor import open_encoder
from opd.run import preflight
from opd.run import recipe as recipes
from opd.testing.toy import ToyEncoder
from opd.tiny import MODEL
from opd.types import Box, Example
from opd.views import usable
from opd.views.images import teacher_images, teacher_sizes
from opd.views.view import ViewOptions
from opd_cli import main
from tests.conftest import coloured
from tests.support import random_models

PUBLISHED = {"qwen3_vl": (16, 65_536, 16_777_216), "qwen2_5_vl": (14, 3_136, 12_845_056)}
"""Patch size and bounds on pixels of the processors of published models."""


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """A folder whose processor has its published bounds."""
    folder = getattr(random_models, request.param)(tmp_path_factory.mktemp(request.param))
    patch, least, most = PUBLISHED[request.param]
    file = folder / "preprocessor_config.json"
    settings = {"patch_size": patch, "size": {"shortest_edge": least, "longest_edge": most}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def photo(width=4000, height=3000, question="What is it?", **more):
    image = Image.new("1", (width, height))
    return Example(
        f"{width}x{height}", (image,), question, (Box(2, 3, width // 3, height // 3),), **more
    )


def looked(folder, examples, *options, preset="lora"):
    recipe = recipes.load(preset, [f"model.path={folder}", *options])
    return recipe, preflight.inspect_rows(
        recipe, PromptEncoder(folder, **recipe.model.pixels()), examples
    )


def bound(line, key="model.max_pixels"):
    return int(line.partition(f"{key}=")[2].split()[0])


@pytest.mark.parametrize("preset", ["lora", "paper"])
def test_a_presets_bounds_fit_each_other(published, preset):
    """Photos of 12 million pixels, wide ones and tall ones, with questions of some hundred
    tokens."""
    sizes = [(4000, 3000), (3000, 4000), (8000, 1500), (6000, 4000), (12_000, 9_000), (640, 480)]
    examples = [photo(*size, question="What is it? " * 15) for size in sizes]
    recipe, found = looked(published, examples, preset=preset)
    assert (found.lines(), found.usable) == ([], len(sizes))
    assert recipe.data.max_prompt_tokens == 8192


@pytest.mark.parametrize(
    ("options", "examples"),
    [
        ([], [photo()] * 8),
        ([], [photo(), photo(3000, 4000), photo(9000, 2000, "What? " * 50)]),
        (["data.max_prompt_tokens=100"], [photo(640, 480), photo(300, 900), photo(50, 4000)]),
        (["data.max_prompt_tokens=700", "view.margin=2000"], [photo(4000, 3000), photo(640, 480)]),
        (["data.max_prompt_tokens=3000"], [replace(photo(), images=photo().images * 3)]),
    ],
    ids=["photos", "shapes", "few tokens", "teacher too", "three images"],
)
def test_the_bound_that_is_named_keeps_every_row(published, options, examples):
    """And it is the largest to three digits."""
    _, found = looked(published, examples, "model.max_pixels=0", *options)
    assert len(found.long) == len(examples)
    (line,) = found.lines()
    named = bound(line)
    assert line.endswith(f"; set model.max_pixels={named}")
    _, kept = looked(published, examples, f"model.max_pixels={named}", *options)
    assert (kept.lines(), kept.usable) == ([], len(examples))
    _, above = looked(published, examples, f"model.max_pixels={named * 103 // 100 + 1}", *options)
    assert above.long


def test_what_is_said_of_photos(published):
    _, found = looked(published, [photo()] * 8, "model.max_pixels=0")
    (line,) = found.lines()
    assert line.startswith("8 of 8 rows are above data.max_prompt_tokens = 8192 (median 1")
    tokens = {"qwen3_vl": 94 * 125, "qwen2_5_vl": 107 * 143}[published.name[:-1]]
    middle = int(line.partition("median ")[2].partition(")")[0].replace(",", ""))
    assert 0 < middle - tokens < 200


def test_the_policys_own_bound_is_named(published):
    """Where the teacher has bounds of its own, the ones that are too high."""
    teacher = replace(photo(64, 48), teacher_images=photo().images)
    _, found = looked(
        published, [teacher], "model.max_pixels=100000", "model.teacher_max_pixels=12000000"
    )
    (line,) = found.lines()
    assert "model.max_pixels" not in line
    named = bound(line, "model.teacher_max_pixels")
    _, kept = looked(
        published, [teacher], "model.max_pixels=100000", f"model.teacher_max_pixels={named}"
    )
    assert kept.usable == 1


def test_rows_whose_text_is_too_long_are_not_kept_by_smaller_images(published):
    long = photo(64, 48, "word " * 3000)
    _, found = looked(published, [long, photo(640, 480)])
    (line,) = found.lines()
    most = int(found.long[0][1])
    assert (
        line == f"1 of 2 rows (50.0%) is above data.max_prompt_tokens = 8192 (median {most:,}); "
        f"set data.max_prompt_tokens={most}, or shorten the questions"
    )
    _, found = looked(published, [long, photo(), photo()], "model.max_pixels=0")
    most = max(tokens for _, tokens in found.long)
    (line,) = found.lines()
    assert line.endswith(
        f"; set model.max_pixels={bound(line)} to keep 2 of them, or set"
        f" data.max_prompt_tokens={most} to keep all"
    )
    _, kept = looked(published, [long, photo(), photo()], f"model.max_pixels={bound(line)}")
    assert kept.usable == 2


@pytest.mark.parametrize(
    "family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5", "gemma3", "smolvlm", "llava"]
)
def test_a_prompts_length_is_known_from_the_sizes_of_its_images(tmp_path, family):
    encoder = open_encoder(getattr(random_models, family)(tmp_path))
    rng = np.random.default_rng(0)
    for _ in range(12):
        sizes = [
            (int(width), int(height))
            for width, height in np.exp(
                rng.uniform(np.log(12), np.log(900), (rng.integers(1, 3), 2))
            )
        ]
        images = [Image.new("RGB", size) for size in sizes]
        for policy in ("student", "teacher"):
            assert encoder.length(sizes, "What is it?", policy) == len(
                encoder.encode(images, "What is it?", policy)
            )


@pytest.mark.parametrize("family", ["gemma3", "smolvlm", "llava", "llava_next"])
def test_presets_open_models_whose_images_have_a_size_of_their_own(tmp_path, family):
    folder = getattr(random_models, family)(tmp_path)
    recipe = recipes.load("lora", [f"model.path={folder}"])
    assert recipe.model.max_pixels
    open_encoder(folder, **recipe.model.pixels())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"boxes": "each"},
        {"kind": "full"},
        {"kind": "wrong"},
        {"enlarge": 3.0},
        {"margin": 40, "min_size": 90},
    ],
)
@pytest.mark.parametrize("bound", [None, 2000, 40_000])
def test_the_teachers_sizes_are_known_without_pixels(options, bound):
    image = Image.new("RGB", (210, 160))
    boxes = (Box(3, 4, 50, 9), Box(100, 90, 180, 150), Box(1, 1, 2, 2, 1))
    for example in (
        Example("a", (image, image), "?", boxes),
        Example("b", (image,), "?", boxes[:2], teacher_images=(image, image)),
    ):
        view = ViewOptions(**options)
        assert teacher_sizes(example, view, bound) == [
            one.size for one in teacher_images(example, view, bound)
        ]


def test_large_data_are_sampled():
    """Evenly spread, as a plan reads them too."""
    examples = [
        replace(one, question="w" * (1 + 20 * (index % 2)))
        for index, one in enumerate(coloured(12) * 32)
    ]
    recipe = recipes.load("tiny", ["data.max_prompt_tokens=10"])
    examples[::6] = [replace(one, question="short") for one in examples[::6]]
    examples[6] = replace(examples[6], question="w" * 30)
    found = preflight.inspect_rows(recipe, ToyEncoder(), examples)
    assert found.lines() == [
        "1 of 64 rows (1.6%), of 384 in all, is above data.max_prompt_tokens = 10 (median 31); "
        "set data.max_prompt_tokens=31, or shorten the questions"
    ]


@pytest.mark.parametrize("usable", [0, 1])
def test_all_rows_are_looked_at_where_none_of_the_sample_can_be_used(usable):
    examples = [replace(one, question="w" * 30) for one in coloured(12) * 11]
    if usable:
        sample = spread(range(len(examples)), preflight.SAMPLE)
        others = [place for place in range(len(examples)) if place not in sample]
        examples[others[3]] = replace(examples[others[3]], question="w")
    recipe, notes, progress = recipes.load("tiny", ["data.max_prompt_tokens=10"]), [], Quiet()
    progress.note = notes.append
    if usable:
        preflight.check(recipe, ToyEncoder(), examples, progress)
        assert notes[0].startswith(
            "67 of 68 rows (98.5%), of 132 in all, are above data.max_prompt_tokens = 10"
        )
    else:
        with pytest.raises(
            DataError, match=r"^132 of 132 rows are above data.max_prompt_tokens = 10 \(median 31\)"
        ):
            preflight.check(recipe, ToyEncoder(), examples, progress)


def test_other_faults_are_counted_by_their_reason():
    class Refusing(ToyEncoder):
        def encode(self, images, question, policy="student"):
            raise DataError(f"images of {len(question)} x 9 pixels cannot be encoded")

    examples = [
        replace(one, question=one.question if index else "half \ud83d")
        for index, one in enumerate(coloured(4))
    ]
    with pytest.raises(DataError) as error:
        preflight.check(recipes.load("tiny"), Refusing(), examples, Quiet())
    assert str(error.value).startswith("4 of 4 rows cannot be used: 3 rows: images of ")
    assert "1 row: the question holds half of a surrogate pair" in str(error.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiles = Image.new("RGB", (240, 160), "white")
    tiles.paste("green", (0, 0, 60, 80))
    tiles.save("tiles.png")
    return tmp_path


def write(*questions, **more):
    rows = [
        {
            "image": "tiles.png",
            "question": one,
            "boxes": [[0, 0, 60, 80]],
            "answer": "green",
            **more,
        }
        for one in questions
    ]
    with open("rows.jsonl", "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def opd(*arguments, code):
    result = CliRunner().invoke(main, [*arguments, "--backend", "cpu", "--data", "rows.jsonl"])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


SHORT = (
    "--set measure.count=0 --set rollout.prompts=4 --set rollout.completions=2 --steps 1"
).split()


def test_training_and_planning_say_the_same_of_rows_that_are_too_long(here):
    pytest.importorskip("torch")
    limit = ["--set", "data.max_prompt_tokens=200"]
    write("What is it?", "Which?", "word " * 500)
    trained = opd("train", *SHORT, *limit, "--out", "run", code=0)
    (line,) = [
        line
        for line in trained.stderr.splitlines()
        if "above data.max_prompt_tokens" in line and line.startswith("1 of 3")
    ]
    assert line.startswith("1 of 3 rows (33.3%) is above data.max_prompt_tokens = 200 (median ")
    planned = opd("plan", *limit, code=0)
    assert line in planned.stdout
    assert json.loads(opd("plan", *limit, "--json", code=0).stdout)["notes"] == [line]
    write(*["word " * 500] * 3)
    refused = opd("train", *SHORT, *limit, "--out", "other", code=2)
    assert not (here / "other").exists()
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("opd: ")]
    assert line.startswith("opd: 3 of 3 rows are above data.max_prompt_tokens = 200 (median ")
    assert refused.stdout == ""
    assert opd("plan", *limit, code=2).stderr.splitlines()[-1] == line


def test_a_plan_of_sizes_that_are_given_names_the_limit(here):
    write("What is it?")
    sizes = ["--image", "1000x1000", "--crop", "20x20", "--set", "data.max_prompt_tokens=100"]
    said = opd("plan", *sizes, code=0).stdout
    assert "tokens, above data.max_prompt_tokens = 100: training skips such rows" in said


def test_rows_that_all_weigh_nothing_are_refused(here):
    pytest.importorskip("torch")
    write("What is it?", "Which?", weight=0)
    said = opd("train", *SHORT, "--out", "run", code=2)
    assert said.stderr.splitlines()[-1] == (
        "opd: every row of rows.jsonl has weight 0, so nothing would be learnt; give rows a"
        " weight above 0"
    )
    assert not (here / "run").exists()


def test_a_template_that_prints_no_image_is_the_cause(here):
    pytest.importorskip("torch")
    shutil.copytree(MODEL, "model")
    template = (
        "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor"
        " %}{% endfor %}"
    )
    (here / "model/chat_template.jinja").write_text(template)
    write("What is it?")
    said = opd("train", "--model", "model", *SHORT, "--out", "run", code=2)
    assert "chat template" in said.stderr.splitlines()[-1]
    assert not (here / "run").exists()


@pytest.mark.parametrize("count", [0, 2], ids=["training", "measuring"])
def test_weights_that_are_nan_end_a_run_with_the_cause(here, backend_name, count):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(MODEL, "model")
    weights = load_file("model/model.safetensors")
    name = next(name for name in weights if "norm" in name and "visual" not in name)
    save_file(
        {**weights, name: np.full_like(weights[name], np.nan)},
        "model/model.safetensors",
        metadata={"format": "pt"},
    )
    write("What is it?", "Which?")
    options = [
        *SHORT,
        "--set",
        f"measure.count={count}",
        *"--set model.path=model --out run".split(),
    ]
    result = CliRunner().invoke(
        main, ["train", "tiny", "--backend", backend_name, "--data", "rows.jsonl", *options]
    )
    assert result.exit_code in (1, 2), result.output + repr(result.exception)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("opd: ")
    assert "finite" in last or "NaN" in last
    assert not [
        path
        for path in here.glob("run/*")
        if path.name in ("model", "adapter", "summary.json", "checkpoints")
    ]


def test_lengths_are_those_of_what_is_encoded(published):
    encoder = PromptEncoder(published)
    for example in (
        photo(300, 200),
        photo(50, 900, "Which?", teacher_question="And which?"),
        photo(40, 30, choices=("a b", "c d")),
    ):
        student, teacher = usable.encode(encoder, example, ViewOptions(enlarge=2))
        assert usable.lengths(encoder, example, ViewOptions(enlarge=2)) == (
            len(student),
            len(teacher),
        )
