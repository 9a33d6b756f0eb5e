"""The wiring: every key of the recipe, and every argument that crosses a boundary, arrives where it
is meant to, and nowhere else.

`opd` runs as a person runs it, on a backend that computes nothing and writes every call down
(see `tests.support.recorder`); prompts are the real encoder's. What is expected is worked out here
by hand, or by Pillow and transformers, and never by the code between recipe and protocol.

`@key(name, default, other, ...)` says what a key does; `test_every_key_does_what_it_says` is made
of the recipe itself, so that a new key without an expectation fails. That these tests can fail was
tried on the code with one wire cut at a time: a key dropped or crossed with another, an argument
left at its default, one policy in place of the other.
"""

from __future__ import annotations

import json
import shutil
import tomllib
import zlib
from collections import Counter
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations, count
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from opd.data.tables.json_lines import open_json
from opd.objective import Objective
from opd.prompts.processor import open_encoder
from opd.run.recipe import Recipe
from opd.tiny import MODEL
from opd.types import MAX_IMAGE_PIXELS, AdapterOptions, Completion, Example, Sampling, Update
from opd.views.images import student_images
from opd.views.view import ViewOptions
from opd_cli import main
from tests.support import plugins, recorder

KEYS = {
    f"{section}.{key}": value
    for section, values in Recipe().model_dump().items()
    for key, value in values.items()
}
"""Every key of the recipe with its default."""

BASE = {
    "view.margin": 0,
    "view.min_size": 1,
    "rollout.prompts": 3,
    "rollout.completions": 2,
    "rollout.max_tokens": 4,
    "run.steps": 2,
    "run.checkpoint_every": 0,
    "run.rollouts_every": 0,
    "measure.count": 0,
    "optimizer.learning_rate": 0.5,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
    "optimizer.weight_decay": 0.25,
    "objective.top_k": 7,
    "teacher.rate": 0.125,
}
"""A run of milliseconds, with few values that are anybody's default."""

OBJECTIVE = Objective(
    alpha=0.5, top_k=7, tail=True, ratio_clip=2.0, temperature=1.0, form="divergence"
)
UPDATE = Update(
    learning_rate=0.5, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.25, gradient_clip=1.0
)

SIZE, BOXES, HULL = (96, 64), [[16, 16, 40, 32], [56, 24, 80, 48]], (16, 16, 80, 48)
"""Images of the rows, their evidence, and the smallest box around it."""

CHECKS = {}


def key(name, *values):
    """Registers what a key does: called with the run's maker and a value, a check asserts the
    effect and returns what was seen of it."""

    def register(check):
        CHECKS[name] = values, check
        return check

    return register


def pairs_of(checks):
    return list(combinations(checks, 2))


@pytest.mark.parametrize("name", KEYS)
def test_every_key_does_what_it_says(name, opd):
    assert name in CHECKS, (
        f"say here what {name} does: @key({name!r}, default, other) on a function that sees its"
        " effect"
    )
    values, check = CHECKS[name]
    assert values[0] == KEYS[name], "the first value is the key's default"
    seen = [check(opd, value) for value in values]
    assert len(seen) > 1
    assert all(one != other for one, other in pairs_of(seen)), f"{name} changes nothing: {seen}"


def test_no_expectation_is_of_a_key_that_is_gone():
    assert CHECKS.keys() <= KEYS.keys()


class Run:
    """What one command did: its exit code, its output, the backend it loaded, and the run
    folder."""

    def __init__(self, result, loaded, out):
        self.code, self.stdout, self.stderr, self.out = (
            result.exit_code,
            result.stdout,
            result.stderr,
            out,
        )
        self.error = result.exception
        self.backend = loaded[-1] if loaded else None
        self.options = self.backend.options if loaded else None
        self.calls = self.backend.calls if loaded else []

    def of(self, name):
        return [call for call in self.calls if call.name == name]

    @property
    def drawn(self):
        """Sampling for training."""
        return [call for call in self.of("sample") if call.sampling.temperature > 0]

    @property
    def measured(self):
        """Sampling for measuring."""
        return [call for call in self.of("sample") if call.sampling.temperature == 0]

    @property
    def groups(self):
        return [group for call in self.of("accumulate") for group in call.groups]

    @property
    def updates(self):
        return [call.update for call in self.of("apply")]

    @property
    def rates(self):
        """The rates at which the teacher moved, in a list for each step."""
        moves = []
        for call in self.calls:
            if call.name == "apply":
                moves.append([])
            elif call.name == "move_teacher":
                moves[-1].append(call.rate)
        return moves

    def steps_before(self, call):
        """Steps that were taken before a call."""
        place = next(place for place, one in enumerate(self.calls) if one is call)
        return sum(one.name == "apply" for one in self.calls[:place])

    def rows(self, name):
        return (
            [json.loads(line) for line in (self.out / name).read_text().splitlines()]
            if (self.out / name).is_file()
            else []
        )


class Maker:
    """Makes data and runs commands on the recorder; a folder of its own for each."""

    def __init__(self, root):
        self.root, self.numbers = root, count()

    def folder(self):
        folder = self.root / str(next(self.numbers))
        folder.mkdir()
        return folder

    def data(self, rows, name="rows.jsonl"):
        """A data file of `rows` in a folder of its own; images in a row are saved beside it."""
        folder = self.folder()
        for number, row in enumerate(rows):
            for field in ("image", "teacher_image"):
                if isinstance(row.get(field), Image.Image):
                    row[field].save(folder / f"{field}-{number}.png")
        named = [
            {
                field: f"{field}-{n}.png" if isinstance(v, Image.Image) else v
                for field, v in row.items()
            }
            for n, row in enumerate(rows)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in named))
        return folder / name

    def __call__(self, command, *arguments, out=None, code=0):
        recorder.LOADED.clear()
        result = CliRunner().invoke(main, [command, *map(str, arguments)])
        assert result.exit_code == code, f"{result.output} {result.exception!r}"
        return Run(result, recorder.LOADED, out)

    def train(self, settings=None, *arguments, data=None, code=0, model="tiny"):
        """`opd train` with the base's settings and these; `data` None: the twelve rows."""
        out = self.folder() / "run"
        chosen = {
            "data.path": str(data or self.twelve),
            "model.path": str(model),
            **BASE,
            **(settings or {}),
        }
        return self(
            "train",
            "tiny",
            "--backend",
            recorder.NAME,
            *self.sets(chosen),
            "--out",
            out,
            *arguments,
            out=out,
            code=code,
        )

    @staticmethod
    def sets(settings):
        return [
            part
            for name, value in settings.items()
            for part in ("--set", f"{name}={json.dumps(value)}")
        ]


@pytest.fixture(scope="module")
def opd(tmp_path_factory):
    root = tmp_path_factory.mktemp("wiring")
    plugins.install(root / "site", recorder=recorder.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "site"))
        maker = Maker(root)
        maker.twelve = maker.data([row(number) for number in range(12)])
        yield maker


def ask(number):
    """A row's question; all are of one length, so that their prompts stay in their order where they
    run together."""
    return f"What is {number:02}?"


def image(number, size=SIZE):
    """A picture of random blocks, another one for each number."""
    blocks = np.random.default_rng(number).integers(
        0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8
    )
    return Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8)))


def row(number, **fields):
    given = {
        "id": str(number),
        "image": image(number),
        "question": ask(number),
        "boxes": BOXES,
        "answer": "7",
    }
    return {name: value for name, value in {**given, **fields}.items() if value is not None}


ENCODER = None


def encoder():
    """The embedded model's encoder, opened once and apart from the run's."""
    global ENCODER
    ENCODER = ENCODER or open_encoder(MODEL)
    return ENCODER


def print_of(prompt):
    """All that a model sees of a prompt."""
    return prompt.tokens.tobytes(), *(
        prompt.images[name].tobytes() for name in sorted(prompt.images)
    )


def prints(*asked):
    """What models see of images and a question each, in any order."""
    return Counter(print_of(encoder().encode(images, question)) for images, question in asked)


def same(prompt, images, question):
    """Whether a prompt is that of these images and this question."""
    return prints((images, question)) == Counter([print_of(prompt)])


def number_of(prompt):
    """The row of a student's prompt."""
    text = encoder().decode(prompt.tokens)
    return int(text.split("What is ")[1].split("?")[0])


def numbers_of(prompts):
    return [number_of(prompt) for prompt in prompts]


def crop(number, place=HULL, size=None):
    cut = image(number).crop(place)
    return cut if size is None else cut.resize(size, Image.Resampling.BICUBIC)


def teachers_see(run, *views):
    """Asserts that every teacher of a run saw these views of its row, `views` as functions of the
    row's number; says their sizes."""
    assert run.groups
    for group in run.groups:
        number = number_of(group.student)
        images = [view(number) for view in views]
        assert same(group.student, [image(number)], ask(number))
        assert same(group.teacher, images, ask(number))
    return [one.size for one in images]


# Model


@key("model.path", "tiny", "copy")
def _(opd, value):
    folder = MODEL
    if value != "tiny":
        folder = opd.folder() / "copy"
        shutil.copytree(MODEL, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["chat_template"] = settings["chat_template"].replace(
            "{{- part.text -}}", "{{- 'Look: ' + part.text -}}"
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        value = str(folder)
    run = opd.train({"model.path": value})
    assert Path(run.options.path) == folder
    looks = {"Look: What is" in encoder().decode(group.student.tokens) for group in run.groups}
    assert len(looks) == 1
    return looks


@key("model.base", "", "copy")
def _(opd, value):
    """Of an adapter, which is trained on with a rank and a scale of its own, or is added to what is
    trained whole."""
    adapter, base = opd.folder() / "adapter", MODEL
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(MODEL), "r": 3, "lora_alpha": 6}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    shapes = {f"{layer}.lora_A.weight": (3, 96), f"{layer}.lora_B.weight": (96, 3)}
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
        adapter / "adapter_model.safetensors",
    )
    if value:
        base = opd.folder() / "copy"
        shutil.copytree(MODEL, base)
    settings = {"model.base": str(base) if value else "", "model.rank": 32, "model.alpha": 64.0}
    for tune, expected in (("full", None), ("lora", AdapterOptions(3, 6.0))):
        options = opd.train({**settings, "model.tune": tune}, model=adapter).options
        assert (options.path, options.adapter, options.adapters) == (base, adapter, expected)
    return base == MODEL


@key("model.revision", "", "v1")
def _(opd, value):
    """From a cache of two commits."""
    from huggingface_hub import constants

    commits = {"main": "a" * 40, "v1": "b" * 40}
    cache = opd.folder()
    repository = cache / "models--org--tiny"
    for name, commit in commits.items():
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(MODEL, repository / "snapshots" / commit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        run = opd.train({"model.path": "org/tiny", "model.revision": value})
    commit = Path(run.options.path).name
    assert commit == commits[value or "main"]
    assert tomllib.loads((run.out / "config.toml").read_text())["model"]["revision"] == commit
    return commit


@key("model.tune", "full", "lora", "qlora")
def _(opd, value):
    run = opd.train({"model.tune": value})
    kind = "model" if value == "full" else "adapter"
    assert [
        (call.kind, (run.out / kind / "weights.txt").is_file()) for call in run.of("export")
    ] == [(kind, True)]
    assert (run.out / kind / "tokenizer_config.json").is_file()
    assert (run.options.adapters is None, run.options.four_bit) == (
        value == "full",
        value == "qlora",
    )
    assert run.options.tune_vision is (value == "full")
    return kind, run.options.four_bit


@key("model.recompute_above", 2.0, 0.0, 0.5)
def _(opd, value):
    """GiB in the recipe, bytes in what the backend is given, whatever is trained."""
    settings = {"model.recompute_above": value}
    runs = [opd.train({**settings, "model.tune": tune}) for tune in ("full", "lora")]
    seen = {run.options.checkpoint_above for run in runs}
    assert seen == {int(value * 2**30)}
    return seen


@key("model.dtype", "float32", "bfloat16")
def _(opd, value):
    assert opd.train({"model.dtype": value, "model.tune": "lora"}).options.dtype == value
    seen = opd.train({"model.dtype": value}).options.dtype
    assert seen == value
    return seen


ADAPTERS = {
    "model.tune": "lora",
    "model.rank": 3,
    "model.alpha": 5.0,
    "model.targets": ["q_proj", "v_proj"],
    "run.seed": 11,
}


def adapters(opd, **changes):
    """The adapter options that arrive, which differ from those above in one value alone."""
    names = {
        "rank": 3,
        "alpha": 5.0,
        "targets": ("q_proj", "v_proj"),
        "vision": False,
        "projector": False,
        "seed": 11,
    }
    run = opd.train({**ADAPTERS, **{f"model.{name}": value for name, value in changes.items()}})
    expected = {
        **names,
        **{name: tuple(value) if name == "targets" else value for name, value in changes.items()},
    }
    assert run.options.adapters == AdapterOptions(**expected)
    return run.options.adapters


@key("model.vision", True, False)
def _(opd, value):
    tuned = opd.train({"model.vision": value}).options
    assert tuned.tune_vision is value
    return tuned.tune_vision, adapters(opd, vision=value).vision


@key("model.projector", False, True)
def _(opd, value):
    return adapters(opd, projector=value)


@key("model.rank", 32, 8)
def _(opd, value):
    return adapters(opd, rank=value)


@key("model.alpha", 64.0, 12.0)
def _(opd, value):
    return adapters(opd, alpha=value)


@key("model.targets", (), ("o_proj",))
def _(opd, value):
    return adapters(opd, targets=value)


def grids(opd, **bounds):
    """Patches (height, width) that student and teacher see, of 96 x 64 and of 128 x 64 pixels, as
    the official processor would have them; `bounds` as least and largest pixels of the student's
    and of the teacher's images.

    Measuring asks under the bounds of training.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    student, teacher = bounds.pop("student", {}), bounds.pop("teacher", {})
    run = opd.train(
        {
            "view.enlarge": 2,
            "measure.count": 1,
            **{f"model.{name}": value for name, value in bounds.items()},
        }
    )
    sizes = (
        smart_resize(64, 96, 16, **{**OWN, **student}),
        smart_resize(64, 128, 16, **{**OWN, **teacher}),
    )
    expected = [(height // 8, width // 8) for height, width in sizes]
    seen = {
        tuple(grid(prompt) for prompt in (group.student, group.teacher)) for group in run.groups
    }
    assert seen == {tuple(expected)}
    for call in run.measured:
        assert sorted(grid(prompt) for prompt in call.prompts) == sorted(expected)
    return expected


OWN = {"min_pixels": 256, "max_pixels": 65536}
"""The embedded model's own bounds."""


def grid(prompt):
    ((frames, height, width),) = prompt.images["image_grid_thw"].tolist()
    assert frames == 1
    return height, width


@key("model.max_pixels", 0, 2048)
def _(opd, value):
    both = {"max_pixels": value} if value else {}
    return grids(opd, max_pixels=value, student=both, teacher=both)


@key("model.min_pixels", 0, 32768)
def _(opd, value):
    both = {"min_pixels": value} if value else {}
    return grids(opd, min_pixels=value, student=both, teacher=both)


@key("model.teacher_max_pixels", 0, 2048)
def _(opd, value):
    return grids(opd, teacher_max_pixels=value, teacher={"max_pixels": value} if value else {})


@key("model.teacher_min_pixels", 0, 32768)
def _(opd, value):
    return grids(opd, teacher_min_pixels=value, teacher={"min_pixels": value} if value else {})


def test_the_teachers_bounds_win_over_the_students(opd):
    bounds = {
        "max_pixels": 2048,
        "min_pixels": 1024,
        "teacher_max_pixels": 40000,
        "teacher_min_pixels": 32768,
    }
    student, teacher = (
        {"max_pixels": 2048, "min_pixels": 1024},
        {
            "max_pixels": 40000,
            "min_pixels": 32768,
        },
    )
    grids(opd, **bounds, student=student, teacher=teacher)


def test_images_of_another_size_are_no_known_features(opd):
    """A prompt's key tells bounds apart too: a frozen tower's features of it are computed once for
    both policies."""
    for bound in (0, 2048):
        run = opd.train({"view.kind": "full", "model.teacher_max_pixels": bound})
        assert {group.student.key == group.teacher.key for group in run.groups} == {bound == 0}
        assert {grid(group.student) == grid(group.teacher) for group in run.groups} == {bound == 0}
    assert len({group.student.key for group in run.groups}) == len(run.groups)


# Data and view


@key("data.path", "tiny", "twelve")
def _(opd, value):
    run = opd.train({"data.path": value if value == "tiny" else str(opd.twelve)})
    texts = {encoder().decode(group.student.tokens) for group in run.groups}
    ours = {"What is" in text and "tile" not in text for text in texts}
    assert ours == {value != "tiny"}
    return ours


def asked_of(run):
    """The rows that a run was trained on."""
    return sorted({number_of(group.student) for group in run.groups})


@key("data.format", "", "vision-opd-paper")
def _(opd, value):
    data = opd.data([row(0), row(1)])  # for the pictures beside it
    question = {
        "problem": f"<image>{ask(0)} See the red frame.",
        "extra_info": {"question": ask(1)},
    }
    pictures = {"images": ["image-0.png"], "original_images": ["image-1.png"]}
    given = {**question, **pictures, "teacher_images": ["image-1.png"], "bbox": [16, 16, 80, 48]}
    data.write_text(json.dumps(given))
    run = opd.train({"data.format": value}, data=data)
    if value:
        assert same(run.groups[0].teacher, [image(1)], f"{ask(0)} See the red frame.")
    else:
        assert same(run.groups[0].teacher, [image(1).crop(HULL)], ask(1))
    return asked_of(run)


@key("data.box_format", "", "per-mille")
def _(opd, value):
    data = opd.data([row(0, boxes=[[10, 10, 60, 60]])])
    run = opd.train({"data.box_format": value}, data=data)
    place = (0, 0, 6, 4) if value else (10, 10, 60, 60)  # of 96 x 64, in whole pixels
    assert same(run.groups[0].teacher, [image(0).crop(place)], ask(0))
    return place


@key("data.box_image", "", "stored")
def _(opd, value):
    """The picture is stored lying on its left side."""
    data = opd.data([row(0, boxes=[[8, 8, 40, 24]])])
    exif = Image.Exif()
    exif[0x0112] = 6
    image(0).save(data.parent / "image-0.png", exif=exif)
    run = opd.train({"data.box_image": value}, data=data)
    place = (40, 8, 56, 40) if value else (8, 8, 40, 24)
    upright = image(0).transpose(Image.Transpose.ROTATE_270)
    assert same(run.groups[0].teacher, [upright.crop(place)], ask(0))
    return place


@key("data.images", "", "another folder")
def _(opd, value):
    data, other = opd.data([row(0)]), opd.data([row(0, image=image(1))])
    run = opd.train({"data.images": str(other.parent) if value else ""}, data=data)
    assert same(run.groups[0].student, [image(1 if value else 0)], ask(0))
    return value


@key("data.columns", {}, {"question": "asked"})
def _(opd, value):
    data = opd.data([row(0, asked=ask(1))])
    named = {f"data.columns.{field}": column for field, column in value.items()}
    return asked_of(opd.train(named, data=data))


@key("data.question", "", ask(5))
def _(opd, value):
    asked = asked_of(
        opd.train({"data.question": value}, data=opd.data([row(0), row(1, question=None)]))
    )
    assert asked == ([0, 5] if value else [0])
    return asked


@key("data.split", "", "test")
def _(opd, value):
    folder = opd.data([row(0)], "train.jsonl").parent
    (folder / "test.jsonl").write_text(json.dumps(row(1, image="image-0.png")))
    run = opd.train({"data.split": value}, data=folder, code=0 if value else 2)
    assert value or "name one of them, or a split with data.split" in run.stderr
    return asked_of(run) if value else run.code


@key("data.revision", "", "v2")
def _(opd, value):
    """Nothing is downloaded: what would be is a file here."""
    data, asked = opd.data([row(0)]), []

    def fetched(path, split, revision, progress):
        asked.append(revision)
        return open_json(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opd.data.tables.open_hub", fetched)
        opd.train(
            {"data.path": "org/name", "data.images": str(data.parent), "data.revision": value}
        )
    assert set(asked) == {value}
    return asked


@key("data.allow_download", False, True)
def _(opd, value):
    data = opd.data([row(0), row(1)])
    folder = data.parent

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=folder)

        def log_message(self, *given):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/image-1.png"
        data.write_text(
            "\n".join(
                json.dumps(row(n, image=each)) for n, each in enumerate(("image-0.png", address))
            )
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            asked = asked_of(opd.train({"data.allow_download": value}, data=data))
        server.shutdown()
    assert asked == ([0, 1] if value else [0])
    return asked


@key("data.max_prompt_tokens", 8192, 60)
def _(opd, value):
    """A prompt of just so many tokens is used, one more is not, whichever policy's is the longer
    one."""
    small, large = image(0, (32, 32)), image(1, (64, 64))

    def question(picture, length):
        return "a" * (length - len(encoder().encode([picture], "")))

    def long(length, student, teacher):
        asked = question(max(student, teacher, key=lambda one: one.width), length)
        return {"image": student, "teacher_image": teacher, "question": asked, "id": f"{length}"}

    rows = [
        long(value + more, *views) for more in (0, 1) for views in ((small, large), (large, small))
    ]
    data = opd.data(rows)
    settings = {
        "data.max_prompt_tokens": value,
        "rollout.prompts": 4,
        "run.steps": 1,
        "measure.path": str(data),
        "measure.count": 4,
    }
    run = opd.train(settings, data=data)
    lengths = sorted((len(group.student), len(group.teacher)) for group in run.groups)
    less = value - (16 - 4)
    assert lengths == [(less, value), (value, less)]
    assert [one["skipped"] for one in run.rows("metrics.jsonl")] == [2]
    for when in range(2):
        asked = run.measured[when * len(run.measured) // 2 : (when + 1) * len(run.measured) // 2]
        assert sorted(len(prompt) for call in asked for prompt in call.prompts) == [
            less,
            less,
            value,
            value,
        ]
    return lengths


@key("data.strict", False, True)
def _(opd, value):
    data = opd.data([row(0), row(1), row(2, image="missing.png")])
    run = opd.train(
        {"data.strict": value, "rollout.prompts": 2, "run.steps": 1},
        data=data,
        code=2 if value else 0,
    )
    assert (run.backend is None) is value
    measured = opd.train(
        {"data.strict": value, "measure.path": str(data), "measure.count": 3, "run.steps": 1},
        code=2 if value else 0,
    )
    assert (
        not measured.calls if value else [len(call.prompts) for call in measured.measured] == [4, 4]
    )
    if not value:
        assert sorted(numbers_of(run.drawn[0].prompts)) == [0, 1]
    return run.code


@key("data.max_image_pixels", MAX_IMAGE_PIXELS, 6143)
def _(opd, value):
    """Rows to train on and rows to measure alike; the larger picture has a pixel or a line too
    much."""
    picture = Image.new("1", (16384, value // 16384 + 1)) if value > 10**6 else image(1, (96, 64))
    data = opd.data(
        [
            row(0, image=image(0, (64, 64)), boxes=[[0, 0, 32, 32]]),
            row(1, image=picture, boxes=[[0, 0, 32, 32]]),
        ]
    )
    run = opd.train(
        {"data.max_image_pixels": value, "measure.path": str(data), "measure.count": 4}, data=data
    )
    assert {number_of(group.student) for group in run.groups} == {0}
    assert [len(call.prompts) for call in run.measured] == [2, 2]
    return picture.size


@key("view.kind", "crop", "full", "wrong", "context", "given")
def _(opd, value):
    """The box is the right half, so a wrong crop of that size is the left one."""
    box = (48, 0, 96, 64)
    own = value == "given"
    data = opd.data(
        [
            row(number, boxes=[box], teacher_image=image(90 + number) if own else None)
            for number in range(4)
        ]
    )
    run = opd.train({"view.kind": value, "measure.count": 2}, data=data)
    places = {
        "crop": box,
        "full": (0, 0, *SIZE),
        "wrong": (0, 0, 48, 64),
        "context": (24, 0, *SIZE),
    }

    def teacher(number):
        return image(90 + number) if own else crop(number, places[value])

    teachers_see(run, teacher)
    for call in run.measured:  # on the evidence, whatever the teacher sees
        expected = prints(
            *(
                ([view], ask(number))
                for number in (0, 2)
                for view in (image(number), teacher(number) if own else crop(number, box))
            )
        )
        assert Counter(map(print_of, call.prompts)) == expected
    return "own" if own else places[value]


@key("view.mixture", {}, {"full": 1.0}, {"crop": 0.5, "context": 0.5})
def _(opd, value):
    """Each row has one of the views, and the same in every step; the seed decides which."""
    places = {"crop": HULL, "full": (0, 0, *SIZE), "context": (0, 0, 96, 64)}
    names = sorted(value) or ["crop"]
    found = []
    for seed in (0, 1):
        settings = {"view.mixture": value, "run.seed": seed, "rollout.prompts": 12}
        chosen = {}
        for group in opd.train(settings).groups:
            number = number_of(group.student)
            met = [n for n in names if same(group.teacher, [crop(number, places[n])], ask(number))]
            assert len(met) == 1
            assert chosen.setdefault(number, met[0]) == met[0]
        assert set(chosen.values()) == set(names)
        found.append([chosen[number] for number in range(12)])
    assert (found[0] != found[1]) is (len(names) > 1)
    return found[0]


@key("view.pieces", ("full", "crop"), ("full", "context", "crop"))
def _(opd, value):
    places = {"full": (0, 0, *SIZE), "context": (0, 0, 96, 64), "crop": HULL}
    views = [(lambda number, at=places[name]: crop(number, at)) for name in value]
    return teachers_see(opd.train({"view.kind": "several", "view.pieces": value}), *views)


def test_students_of_degraded_images_are_measured_on_clean_ones(opd):
    """And their teacher sees these; what a student sees is the same in every step."""
    settings = {"view.kind": "degrade", "rollout.prompts": 12, "measure.count": 3}
    run = opd.train(settings)
    seen = {}
    for group in run.groups:
        number = number_of(group.student)
        assert same(group.teacher, [image(number)], ask(number))
        assert seen.setdefault(number, print_of(group.student)) == print_of(group.student)
    degraded = [n for n in seen if seen[n] != print_of(encoder().encode([image(n)], ask(n)))]
    assert 8 <= len(degraded) <= 12
    for call in run.measured:
        expected = prints(
            *(([view], ask(n)) for n in (0, 4, 8) for view in (image(n), crop(n, HULL)))
        )
        assert Counter(map(print_of, call.prompts)) == expected


@key("view.boxes", "hull", "each")
def _(opd, value):
    places = [HULL] if value == "hull" else BOXES
    return teachers_see(
        opd.train({"view.boxes": value}),
        *((lambda number, at=place: crop(number, at)) for place in places),
    )


@key("view.margin", 6.0, 2.0)
def _(opd, value):
    wide = (16 - value, 16 - value, 80 + value, 48 + value)
    return teachers_see(opd.train({"view.margin": value}), lambda number: crop(number, wide))


@key("view.margin_fraction", 0.0, 0.125)
def _(opd, value):
    more = 64 * value
    wide = (16 - more, 16 - more, 80 + more, 48 + more)
    return teachers_see(
        opd.train({"view.margin_fraction": value}), lambda number: crop(number, wide)
    )


@key("view.min_size", 48, 64)
def _(opd, value):
    return teachers_see(
        opd.train({"view.min_size": value}), lambda number: crop(number, HULL, (2 * value, value))
    )


@key("view.enlarge", 1.0, 2.0)
def _(opd, value):
    size = (int(64 * value), int(32 * value))
    return teachers_see(opd.train({"view.enlarge": value}), lambda number: crop(number, HULL, size))


# Rollout


@key("rollout.prompts", 96, 5)
def _(opd, value):
    run = opd.train({"rollout.prompts": value, "rollout.completions": 1, "run.steps": 1})
    assert sum(len(call.prompts) for call in run.drawn) == len(run.groups) == value
    return value


@key("rollout.completions", 8, 3)
def _(opd, value):
    run = opd.train({"rollout.completions": value})
    assert {call.uniforms.shape[1] for call in run.drawn} == {value}
    assert {len(group.completions) for group in run.groups} == {value}
    return value


@key("rollout.max_tokens", 1024, 5)
def _(opd, value):
    with recorder.writing(recorder.endless):
        run = opd.train({"rollout.max_tokens": value, "measure.count": 1, "measure.max_tokens": 9})
    assert {call.uniforms.shape for call in run.drawn} == {(3, 2, value)}
    assert {len(one) for group in run.groups for one in group.completions} == {value}
    assert {call.uniforms.shape[2] for call in run.measured} == {9}
    return value


@key("rollout.temperature", 1.0, 0.5)
def _(opd, value):
    run = opd.train({"rollout.temperature": value, "measure.count": 1})
    assert [call.sampling.temperature for call in run.drawn] == [value] * 2
    assert [call.sampling.temperature for call in run.measured] == [0.0] * 2
    assert {call.objective for call in run.of("accumulate")} == {
        replace(OBJECTIVE, temperature=value)
    }
    return value


@key("rollout.microbatch_tokens", 16384, 60)
def _(opd, value):
    """60 is room for a prompt and two of its four completions of eight tokens: a group a call,
    split in halves.

    The longer prompt counts, which is the teacher's where crops are enlarged.
    """
    calls, (student, teacher) = microbatches(opd, value)
    assert teacher < student
    assert 60 - 24 < student <= 60 - 16
    assert calls == ([(3, 0)] if value > 60 else [(1, 2)] * 3)
    student, teacher = microbatches(opd, value, {"view.enlarge": 2})[1]
    assert student + 8 <= teacher
    assert microbatches(opd, teacher + 16, {"view.enlarge": 2})[0] == [(1, 2)] * 3
    assert microbatches(opd, 3 * (teacher + 32) - 1, {"view.enlarge": 2})[0] == [(2, 0), (1, 0)]
    return calls


def microbatches(opd, value, settings=None):
    """Groups and split of every call of a step, and the length of the student's and of the
    teacher's prompts."""
    rollout = {
        "rollout.microbatch_tokens": value,
        "rollout.completions": 4,
        "rollout.max_tokens": 8,
        "run.steps": 1,
    }
    with recorder.writing(recorder.endless):
        run = opd.train({**rollout, **(settings or {})})
    assert [len(call.prompts) for call in run.drawn] == [3]
    (lengths,) = {(len(group.student), len(group.teacher)) for group in run.groups}
    return [(len(call.groups), call.split) for call in run.of("accumulate")], lengths


@key("rollout.sample_tokens", 65536, 60)
def _(opd, value):
    """60 is room for one prompt and its completions, and not for two; measured rows are two prompts
    each."""
    run = opd.train(
        {
            "rollout.sample_tokens": value,
            "measure.count": 2,
            "measure.max_tokens": 20,
            "run.steps": 1,
        }
    )
    lengths = (
        [len(call.prompts) for call in run.drawn],
        [len(call.prompts) for call in run.measured],
    )
    assert lengths == (([3], [4] * 2) if value > 60 else ([1] * 3, [1] * 8))
    assert [len(call.groups) for call in run.of("accumulate")] == [3]
    return lengths


# Objective


def objective(opd, name, value, **expected):
    """Every call has the objective with this one value changed."""
    run = opd.train({f"objective.{name}": value, "rollout.microbatch_tokens": 1})
    calls = run.of("accumulate")
    assert len(calls) == 6
    assert {call.objective for call in calls} == {replace(OBJECTIVE, **(expected or {name: value}))}
    return calls[0].objective


@key("objective.form", "divergence", "sampled")
def _(opd, value):
    return objective(opd, "form", value)


@key("objective.alpha", 0.5, 0.0, 1.0, 0.25)
def _(opd, value):
    return objective(opd, "alpha", value)


@key("objective.top_k", 100, 0, 3)
def _(opd, value):
    return objective(opd, "top_k", value, top_k=value or None)


@key("objective.tail", True, False)
def _(opd, value):
    return objective(opd, "tail", value)


@key("objective.ratio_clip", 2.0, 0.0, 5.0)
def _(opd, value):
    return objective(opd, "ratio_clip", value, ratio_clip=value or None)


# Teacher and optimizer


@key("teacher.rule", "ema", "frozen", "sync", "live")
def _(opd, value):
    run = opd.train(
        {"teacher.rule": value, "teacher.every": 2, "teacher.rate": 0.25, "run.steps": 4}
    )
    expected = {
        "ema": [[], [0.25]] * 2,
        "frozen": [[]] * 4,
        "sync": [[], [1.0]] * 2,
        "live": [[1.0]] * 4,
    }[value]
    assert run.rates == expected
    return expected


@key("teacher.rate", 0.05, 0.5)
def _(opd, value):
    run = opd.train({"teacher.rate": value})
    assert run.rates == [[value]] * 2
    return run.rates


@key("teacher.every", 1, 3)
def _(opd, value):
    run = opd.train({"teacher.every": value, "run.steps": 4})
    expected = [[0.125]] * 4 if value == 1 else [[], [], [0.125], []]
    assert run.rates == expected
    return expected


def updates(opd, settings, **changes):
    """Every step's update has these values changed alone; a list has a value for each step."""
    run = opd.train(
        {f"optimizer.{name}": value for name, value in settings.items() if "." not in name}
        | {"run.steps": 3}
    )
    assert run.updates == [replace(UPDATE, **changes)] * 3
    return run.updates


@key("optimizer.learning_rate", 2e-6, 1e-3)
def _(opd, value):
    return updates(opd, {"learning_rate": value}, learning_rate=value)


def learning_rates(opd, steps, settings):
    """Every step's learning rate as a share of its peak."""
    run = opd.train({"optimizer.learning_rate": 0.25, "run.steps": steps, **settings})
    rates = [update.learning_rate for update in run.updates]
    assert [one["learning_rate"] for one in run.rows("metrics.jsonl")] == rates
    return [rate / 0.25 for rate in rates]


@key("optimizer.schedule", "constant", "cosine", "linear")
def _(opd, value):
    rates = learning_rates(opd, 6, {"optimizer.schedule": value, "optimizer.warmup_steps": 2})
    down = {
        "constant": [1, 1, 1],
        "linear": [0.75, 0.5, 0.25],
        "cosine": [0.853553, 0.5, 0.146447],
    }[value]
    assert rates == pytest.approx([0.5, 1, 1, *down], abs=1e-6)
    return rates


@key("optimizer.warmup_steps", 10, 0, 4)
def _(opd, value):
    rates = learning_rates(opd, 12, {"optimizer.warmup_steps": value})
    assert rates == pytest.approx(
        [*((step + 1) / value for step in range(value)), *[1.0] * (12 - value)]
    )
    return rates


@key("optimizer.betas", (0.9, 0.999), (0.8, 0.95))
def _(opd, value):
    return updates(opd, {"betas": value}, betas=value)


@key("optimizer.epsilon", 1e-8, 1e-5)
def _(opd, value):
    return updates(opd, {"epsilon": value}, epsilon=value)


@key("optimizer.weight_decay", 0.01, 0.0)
def _(opd, value):
    return updates(opd, {"weight_decay": value}, weight_decay=value)


@key("optimizer.gradient_clip", 1.0, 0.0, 0.5)
def _(opd, value):
    return updates(opd, {"gradient_clip": value}, gradient_clip=value or None)


# Measuring


@key("measure.path", "", "other")
def _(opd, value):
    """Rows spread over the training data, or those of another file."""
    other = opd.data([row(number) for number in range(20, 24)]) if value else ""
    run = opd.train({"measure.path": str(other), "measure.count": 4})
    seen = {tuple(numbers_of(call.prompts[:4])) for call in run.measured}
    assert seen == {(20, 21, 22, 23) if value else (0, 3, 6, 9)}
    assert {number_of(prompt) for call in run.drawn for prompt in call.prompts} <= set(range(12))
    return seen


@key("measure.count", 200, 0, 5)
def _(opd, value):
    data = opd.data(
        [
            row(
                number % 12,
                id=str(number),
                image=image(number % 12, (32, 32)),
                boxes=[[0, 0, 16, 16]],
            )
            for number in range(201)
        ]
    )
    run = opd.train({"measure.count": value, "run.steps": 1, "rollout.prompts": 1}, data=data)
    assert sum(len(call.prompts) for call in run.measured) == 2 * 2 * value
    assert [
        json.loads((run.out / "summary.json").read_text())["examples"],
        len(run.rows("answers.jsonl")),
    ] == [value, 2 * value]
    return value


@key("measure.max_tokens", 64, 3)
def _(opd, value):
    run = opd.train({"measure.max_tokens": value, "measure.count": 2})
    assert [call.uniforms.shape for call in run.measured] == [(4, 1, value)] * 2
    assert {call.uniforms.shape[2] for call in run.drawn} == {4}
    return value


@key("measure.every", 0, 2)
def _(opd, value):
    run = opd.train({"measure.every": value, "measure.count": 2, "run.steps": 5})
    steps = [run.steps_before(call) for call in run.measured]
    assert (
        steps
        == [one["step"] for one in run.rows("accuracy.jsonl")]
        == ([0, 2, 4, 5] if value else [0, 5])
    )
    return steps


# The run itself


@key("run.steps", 65, 3)
def _(opd, value):
    run = opd.train({"run.steps": value, "rollout.prompts": 1})
    assert (
        len(run.updates)
        == len(run.rows("metrics.jsonl"))
        == json.loads((run.out / "summary.json").read_text())["steps"]
        == value
    )
    return value


@key("run.seed", 0, 5)
def _(opd, value):
    """Of data order, sampling, and fresh adapters: each."""

    def parts(seed):
        run = opd.train(
            {"run.seed": seed, "rollout.prompts": 6, "run.steps": 4, "model.tune": "lora"}
        )
        order = [numbers_of(call.prompts) for call in run.drawn]
        # Every epoch is all rows, in an order of its own.
        epochs = [order[0] + order[1], order[2] + order[3]]
        assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
        assert epochs[0] != epochs[1]
        assert epochs[0] != list(range(12))
        uniforms = np.stack([call.uniforms for call in run.drawn])
        assert uniforms.min() >= 0
        assert uniforms.max() < 1
        assert len(np.unique(uniforms.reshape(-1, 4), axis=0)) == 4 * 6 * 2
        return order, uniforms.tolist(), run.options.adapters.seed

    seen, again, other = parts(value), parts(value), parts(value + 1)
    assert seen == again
    assert all(one != two for one, two in zip(seen, other, strict=True))
    assert seen[2] == value
    return seen


@key("run.checkpoint_every", 50, 0, 2)
def _(opd, value):
    steps = 51 if value == 50 else 5
    run = opd.train(
        {"run.checkpoint_every": value, "run.keep": 9, "run.steps": steps, "rollout.prompts": 1}
    )
    seen, applied = [], 0
    for call in run.calls:
        applied += call.name == "apply"
        seen += [applied] * (call.name == "save")
    assert seen == {50: [50, 51], 0: [5], 2: [2, 4, 5]}[value]
    assert sorted(int(path.name[-6:]) for path in (run.out / "checkpoints").iterdir()) == seen
    return seen


@key("run.keep", 2, 1)
def _(opd, value):
    run = opd.train({"run.keep": value, "run.checkpoint_every": 1, "run.steps": 4})
    kept = sorted(int(path.name[-6:]) for path in (run.out / "checkpoints").iterdir())
    assert kept == [3, 4][-value:]
    return kept


@key("run.rollouts_every", 10, 0, 2)
def _(opd, value):
    run = opd.train({"run.rollouts_every": value, "run.steps": 12})
    steps = sorted({one["step"] for one in run.rows("rollouts.jsonl")})
    assert steps == {10: [1, 11], 0: [], 2: [1, 3, 5, 7, 9, 11]}[value]
    return steps


# What crosses a boundary without a key


def test_a_step_is_rollout_gradient_update_and_teacher(opd):
    """The student draws; both are read along just what was drawn, in its own group, at the weight
    of its row."""
    data = opd.data([row(number, weight=1 + number / 4) for number in range(12)])
    run = opd.train(
        {"run.steps": 3, "rollout.prompts": 4, "rollout.microbatch_tokens": 1}, data=data
    )
    assert [call.name for call in run.calls] == [
        *(["sample", *["accumulate"] * 4, "apply", "move_teacher"] * 3),
        "save",
        "export",
    ]
    teachers_see(run, crop)
    assert run.updates == [UPDATE] * 3
    assert run.rates == [[0.125]] * 3
    for step, call in enumerate(run.drawn):
        assert call.policy == "student"
        assert call.sampling == Sampling(1.0, encoder().stop, encoder().banned)
        assert (len(encoder().stop), len(encoder().banned)) == (1, 4)
        sampled = {
            number_of(prompt): (prompt, found)
            for prompt, found in zip(call.prompts, call.result, strict=True)
        }
        groups = [
            group for one in run.of("accumulate")[4 * step : 4 * step + 4] for group in one.groups
        ]
        assert sorted(map(number_of, (group.student for group in groups))) == sorted(sampled)
        tokens = sum(len(one) for _, found in sampled.values() for one in found)
        for group in groups:
            number = number_of(group.student)
            prompt, found = sampled[number]
            assert group.student is prompt
            assert list(group.completions) == found
            assert [len(one) for one in group.weights] == [len(one) for one in found]
            for weights in group.weights:
                np.testing.assert_allclose(weights, (1 + number / 4) / tokens, rtol=1e-6)


def test_what_is_drawn_stays_with_its_prompt(opd):
    """Prompts of unequal lengths are sampled and differentiated in another order than they were
    drawn in."""
    data = opd.data(
        [row(number, question=ask(number) + " Please" * (number % 4)) for number in range(8)]
    )

    def write(prompt, uniforms, sampling):
        """Another answer to every prompt."""
        if sampling.temperature > 0:
            return recorder.letters(prompt, uniforms, sampling)
        seed = zlib.crc32(b"".join(print_of(prompt)))
        tokens = np.random.default_rng(seed).integers(33, 90, len(uniforms))
        return Completion(tokens.astype(np.int32), np.zeros(len(tokens), np.float32), False)

    with recorder.writing(write):
        run = opd.train(
            {"rollout.prompts": 8, "measure.count": 8, "measure.max_tokens": 4}, data=data
        )
    assert [number % 4 for number in numbers_of(run.drawn[0].prompts)] == [3, 3, 2, 2, 1, 1, 0, 0]
    for step, call in enumerate(run.drawn):
        drawn = {
            number_of(prompt): found
            for prompt, found in zip(call.prompts, call.result, strict=True)
        }
        groups = run.groups[8 * step : 8 * step + 8]
        assert {number_of(group.student): list(group.completions) for group in groups} == drawn
        for group in groups:
            number = number_of(group.student)
            asked = ask(number) + " Please" * (number % 4)
            assert same(group.student, [image(number)], asked)
            assert same(group.teacher, [crop(number)], asked)
    said = {
        print_of(prompt): encoder().decode(found[0].tokens)
        for prompt, found in zip(run.measured[0].prompts, run.measured[0].result, strict=True)
    }
    assert len(set(said.values())) == 16
    for answer in run.rows("answers.jsonl")[:8]:
        number = int(answer["id"])
        asked = ask(number) + " Please" * (number % 4)
        views = {"full": image(number), "crop": crop(number)}
        for name, view in views.items():
            assert answer[name] == said[print_of(encoder().encode([view], asked))]


def test_completions_do_not_depend_on_the_cut(opd):
    whole, cut = opd.train(), opd.train({"rollout.sample_tokens": 1})
    assert (len(whole.drawn), len(cut.drawn)) == (2, 6)

    def drawn(run, steps):
        return {
            (step, number_of(prompt)): uniforms.tolist()
            for step in range(2)
            for call in run.drawn[step * steps : (step + 1) * steps]
            for prompt, uniforms in zip(call.prompts, call.uniforms, strict=True)
        }

    assert drawn(whole, 1) == drawn(cut, 3)


def test_a_row_that_stands_twice_in_a_step_is_drawn_twice(opd):
    run = opd.train({"rollout.prompts": 4}, data=opd.data([row(0)]))
    assert (
        len(np.unique(np.concatenate([call.uniforms for call in run.drawn]).reshape(-1, 4), axis=0))
        == 2 * 4 * 2
    )
    assert [len(group.completions) for group in run.groups] == [2] * 8


def test_completions_with_a_banned_token_are_dropped(opd):
    banned = encoder().banned[1]

    def write(prompt, uniforms, sampling):
        one = recorder.letters(prompt, uniforms, sampling)
        if uniforms[0] >= 0.5:
            return one
        return Completion(
            np.append(one.tokens, np.int32(banned)),
            np.append(one.logprobs, np.float32(-1)),
            one.finished,
        )

    with recorder.writing(write):
        run = opd.train({"rollout.completions": 4, "run.steps": 3})
    found = [one for call in run.drawn for group in call.result for one in group]
    bad = [one for one in found if banned in one.tokens]
    used = [one for group in run.groups for one in group.completions]
    assert 0 < len(bad) < len(found) == len(bad) + len(used)
    assert not any(banned in one.tokens for one in used)
    metrics = run.rows("metrics.jsonl")
    assert sum(one["dropped"] for one in metrics) == len(bad)
    assert sum(one["completions"] for one in metrics) == len(used)
    assert json.loads((run.out / "summary.json").read_text())["completions_dropped"] == len(bad)


def test_the_teacher_is_asked_its_own_question_and_shown_its_own_image(opd):
    """In training, and on the crop in measuring; the student never is."""
    rows = [
        row(n, boxes=None, teacher_image=image(100 + n), teacher_question=f"And {n}, enlarged?")
        for n in range(4)
    ]
    run = opd.train({"measure.count": 4}, data=opd.data(rows))
    assert len(run.groups) == 6
    for group in run.groups:
        number = number_of(group.student)
        assert same(group.student, [image(number)], ask(number))
        assert same(group.teacher, [image(100 + number)], f"And {number}, enlarged?")
    for call in run.measured:
        asked = [([image(number)], ask(number)) for number in range(4)]
        asked += [([image(100 + number)], f"And {number}, enlarged?") for number in range(4)]
        assert Counter(map(print_of, call.prompts)) == prints(*asked)


def test_measuring_is_the_students_greedy_answer(opd):
    """On the full image and on the crop, without a token that no answer may hold; what it says is
    judged and kept."""
    said = {True: "7", False: "8"}
    letter = {
        text: next(token for token in range(200) if encoder().decode([token]) == text)
        for text in said.values()
    }

    def write(prompt, uniforms, sampling):
        if sampling.temperature > 0:
            return recorder.letters(prompt, uniforms, sampling)
        tokens = [letter[said[grid(prompt) == (4, 8)]], *sampling.stop[:1]]  # the crop's
        return Completion(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), True)

    with recorder.writing(write):
        run = opd.train({"measure.count": 3})
    assert len(run.measured) == 2
    for call in run.measured:
        assert call.policy == "student"
        assert call.sampling == Sampling(0.0, encoder().stop, encoder().banned)
        assert numbers_of(call.prompts) == [0, 4, 8] * 2
        assert [grid(prompt) for prompt in call.prompts] == [(8, 12)] * 3 + [(4, 8)] * 3
    answers = run.rows("answers.jsonl")
    assert [
        (one["when"], one["id"], one["answer"], one["full"], one["crop"]) for one in answers
    ] == [
        (when, str(number), "7", "8", "7") for when in ("before", "after") for number in (0, 4, 8)
    ]
    assert {(one["full_right"], one["crop_right"]) for one in answers} == {(False, True)}
    summary = json.loads((run.out / "summary.json").read_text())
    for when in ("before", "after"):
        assert (
            summary[when]["full_accuracy"],
            summary[when]["crop_accuracy"],
            summary[when]["gap"],
        ) == (0.0, 1.0, 1.0)


def test_what_the_backend_says_is_written_under_its_name(opd):
    run = opd.train(
        {"run.rollouts_every": 1, "optimizer.warmup_steps": 4, "rollout.completions": 5}
    )
    for step, metrics in enumerate(run.rows("metrics.jsonl")):
        found = [one for group in run.drawn[step].result for one in group]
        tokens = sum(map(len, found))
        expected = {
            "step": step + 1,
            "loss": recorder.RATIO * recorder.DIVERGENCE,
            "divergence": recorder.DIVERGENCE,
            "ratio": recorder.RATIO,
            "student_entropy": recorder.ENTROPIES[0],
            "teacher_entropy": recorder.ENTROPIES[1],
            "logprob_gap": recorder.GAP,
            "gradient_norm": recorder.NORM,
            "taken": True,
            "learning_rate": (step + 1) / 8,
            "teacher_rate": 0.125,
            "tokens": tokens,
            "completions": 15,
            "truncated": sum(not one.finished for one in found),
            "dropped": 0,
            "skipped": 0,
            "peak_memory_bytes": 7,
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert 0 < expected["truncated"] < 15
        assert metrics["tokens_per_second"] > 0
    first = [number_of(call.prompts[0]) for call in run.drawn]
    written = run.rows("rollouts.jsonl")
    assert [(one["step"], one["id"]) for one in written] == [
        (step, str(first[step - 1])) for step in (1, 2) for _ in range(5)
    ]
    for one, found in zip(
        written, [one for call in run.drawn for one in call.result[0]], strict=True
    ):
        assert one["tokens"] == found.tokens.tolist()
        assert one["sampler_logprobs"] == one["student_logprobs"] == found.logprobs.tolist()
        assert (one["finished"], one["text"]) == (found.finished, encoder().decode(found.tokens))
        for name, value in zip(
            ("divergence", "ratio", "student_entropy", "teacher_entropy"),
            (recorder.DIVERGENCE, recorder.RATIO, *recorder.ENTROPIES),
            strict=True,
        ):
            assert one[name] == [value] * len(found)
        assert one["teacher_logprobs"] == pytest.approx(found.logprobs - recorder.GAP)


def test_a_resumed_run_has_the_same_calls(opd):
    """On the last checkpoint's state, with the run's own recipe."""
    settings = {
        **ADAPTERS,
        "run.checkpoint_every": 2,
        "run.steps": 4,
        "measure.count": 2,
        "model.max_pixels": 2048,
        "view.margin": 4,
        "optimizer.schedule": "linear",
    }
    whole = opd.train(settings)
    shutil.rmtree(whole.out / "checkpoints/step-000004")
    shutil.rmtree(whole.out / "adapter")
    again = opd("train", "--resume", whole.out, out=whole.out)
    assert again.options == whole.options
    assert [call.name for call in again.calls] == [
        "load",
        *["prefill", "sample", "accumulate", "apply", "move_teacher"] * 2,
        "save",
        "export",
        "sample",
    ]
    (loaded,) = again.of("load")
    assert loaded.folder == whole.out / "checkpoints/step-000002"
    assert again.updates == whole.updates[2:]
    for ours, theirs in zip(again.drawn, whole.drawn[2:], strict=True):
        np.testing.assert_array_equal(ours.uniforms, theirs.uniforms)
        assert [prompt.key for prompt in ours.prompts] == [prompt.key for prompt in theirs.prompts]
        assert numbers_of(ours.prompts) == numbers_of(theirs.prompts)
    assert [group.teacher.key for group in again.groups] == [
        group.teacher.key for group in whole.groups[6:]
    ]
    assert [call.objective for call in again.of("accumulate")] == [OBJECTIVE] * 2


@pytest.mark.parametrize("command", ["gap", "sample"])
def test_gap_and_sample_ask_as_training_measures(command, opd):
    settings = {
        "view.margin": 4,
        "view.min_size": 48,
        "measure.max_tokens": 5,
        "model.max_pixels": 2048,
        "model.teacher_max_pixels": 4096,
        "rollout.sample_tokens": 1,
        "measure.count": 3,
        "model.dtype": "bfloat16",
        "data.max_prompt_tokens": 90,
    }
    # the second is too long
    data = opd.data(
        [row(number, question=ask(number) + "a" * 100 * (number == 1)) for number in range(3)]
    )
    train = opd.train(settings, data=data)
    chosen = {"data.path": str(data), **settings}
    run = opd(
        command,
        "tiny",
        "--backend",
        recorder.NAME,
        *opd.sets(chosen),
        *(["--count", 3] if command == "sample" else []),
        "--json",
    )
    before = train.measured[: len(train.measured) // 2]
    assert [[prompt.key for prompt in call.prompts] for call in run.calls] == [
        [prompt.key for prompt in call.prompts] for call in before
    ]
    assert [(call.policy, call.sampling, call.uniforms.shape) for call in run.calls] == [
        ("student", Sampling(0.0, encoder().stop, encoder().banned), (1, 1, 5))
    ] * 4
    assert run.options == train.options
    counted = opd(
        command, "tiny", "--backend", recorder.NAME, "--data", opd.twelve, "--count", 2, "--json"
    )
    assert sorted(number_of(prompt) for call in counted.calls for prompt in call.prompts) == [
        0,
        0,
        6,
        6,
    ]
    found = json.loads(counted.stdout)
    assert found["model"] == "tiny"
    assert (found["rows"] if command == "gap" else len(found["answers"])) == 2


def test_gap_compares_views_on_the_same_rows(opd):
    """A row without boxes has the full image alone, and what needs none."""
    data = opd.data([row(0), row(1, boxes=None), row(2)])
    settings = {"view.margin": 0, "view.min_size": 1, "run.seed": 3, "view.mixture": {"full": 1.0}}
    asked = ["--view", "crop", "--view", "context", "--view", "degrade", "--view", "crop"]
    run = opd(
        "gap", "tiny", "--backend", recorder.NAME, "--data", data, *opd.sets(settings), *asked,
        "--json",
    )  # fmt: skip
    found = json.loads(run.stdout)
    views = found["views"]
    assert {name: view["rows"] for name, view in views.items()} == {
        "full": 3,
        "crop": 2,
        "context": 2,
        "degrade (student)": 3,
        "degrade": 3,
    }
    assert (found["rows"], found["crop_rows"], found["full_alone"]) == (3, 2, 0)
    assert len(found["pairs"]) == 10
    ((reason, count),) = views["context"]["lacking"].items()
    assert (reason.count("needs boxes"), count) == (1, 1)
    assert "1 row without the view 'context': 1 row: example" in run.stderr
    seen = [prompt for call in run.calls for prompt in call.prompts]
    degrade = ViewOptions(kind="degrade").seeded(3)
    rows = [Example(str(number), (image(number),), "") for number in range(3)]
    students = [student_images(one, degrade) for one in rows]
    expected = prints(
        *(([image(number)], ask(number)) for number in range(3) for _ in range(2)),
        *(([crop(number, HULL)], ask(number)) for number in (0, 2)),
        *(([crop(number, (0, 0, 96, 64))], ask(number)) for number in (0, 2)),
        *((students[number], ask(number)) for number in range(3)),
    )
    assert Counter(map(print_of, seen)) == expected


@pytest.mark.parametrize("command", ["gap", "sample"])
def test_data_without_boxes_are_measured_on_the_full_image_alone(command, opd):
    data = opd.data([row(number, boxes=None) for number in range(3)])
    asked = [command, "tiny", "--backend", recorder.NAME, "--data", data]
    run = opd(*asked, "--json")
    seen = [prompt for call in run.calls for prompt in call.prompts]
    assert Counter(map(print_of, seen)) == prints(*(([image(n)], ask(n)) for n in range(3)))
    found = json.loads(run.stdout)
    if command == "gap":
        assert (found["rows"], found["crop_rows"], found["rows_skipped"]) == (3, 0, 0)
        assert "full_accuracy" in found
        assert not {"gap", "crop_accuracy", "agreement"} & found.keys()
        said = "3 examples without evidence: the full image alone was measured"
        assert said in opd(*asked).stdout
    else:
        assert [answer["crop"] for answer in found["answers"]] == [None] * 3
        assert opd(*asked).code == 0


def test_a_view_without_boxes_trains_on_data_without_them(opd):
    data = opd.data([row(number, boxes=None) for number in range(3)])
    run = opd.train({"view.kind": "degrade", "measure.count": 3}, data=data)
    assert len(run.groups) == 6
    assert [len(call.prompts) for call in run.measured] == [3, 3]
    summary = json.loads((run.out / "summary.json").read_text())
    assert "gap" not in summary["before"]
    assert opd.train(data=data, code=2).stderr.count("field 'boxes' is missing") == 1


def test_options_of_the_command_line_are_keys_of_the_recipe(opd):
    """And --set wins over them."""
    out = opd.folder() / "run"
    settings = {name: value for name, value in BASE.items() if name != "run.steps"}
    model = opd.folder() / "copy"
    shutil.copytree(MODEL, model)
    shared = [
        "train",
        "tiny",
        "--backend",
        recorder.NAME,
        *opd.sets(settings),
        "--data",
        opd.twelve,
        "--model",
        model,
    ]
    run = opd(*shared, "--steps", 3, "--seed", 5, "--out", out, out=out)
    assert run.options.path == model
    other = opd.train({"run.steps": 3, "run.seed": 5})
    assert [call.uniforms.tolist() for call in run.drawn] == [
        call.uniforms.tolist() for call in other.drawn
    ]
    assert [numbers_of(call.prompts) for call in run.drawn] == [
        numbers_of(call.prompts) for call in other.drawn
    ]
    assert len(run.updates) == 3
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["made_with"]["backend"] == recorder.NAME
    assert (config["run"]["steps"], config["run"]["seed"], config["data"]["path"]) == (
        3,
        5,
        str(opd.twelve),
    )
    last = opd(*shared, "--steps", 3, "--set", "run.steps=1", "--out", opd.folder() / "run")
    assert len(last.updates) == 1


@pytest.mark.parametrize(
    ("tune", "kind", "finished"),
    [
        ("full", "model", False),
        ("lora", "model", False),
        ("lora", "adapter", False),
        ("lora", "model", True),
    ],
)
def test_an_export_asks_the_backend_for_its_kind(tune, kind, finished, opd):
    run = opd.train(
        {
            "model.tune": tune,
            "run.checkpoint_every": 1,
            **({"model.rank": 3} if tune == "lora" else {}),
        }
    )
    own = "model" if tune == "full" else "adapter"
    if not finished:
        shutil.rmtree(run.out / own)
    else:
        (run.out / "adapter/adapter_config.json").write_text(
            json.dumps(
                {
                    "peft_type": "LORA",
                    "base_model_name_or_path": str(MODEL),
                    "r": 3,
                    "lora_alpha": 6,
                }
            )
        )
    target = opd.folder() / "exported"
    done = opd("export", run.out, "--as", kind, "--out", target)
    assert [(call.name, call.arguments.get("kind")) for call in done.calls] == [
        *([] if finished else [("load", None)]),
        ("export", kind),
    ]
    if finished:
        assert (done.options.adapters, done.options.adapter, done.options.path) == (
            None,
            run.out / "adapter",
            MODEL,
        )
    else:
        assert done.of("load")[0].folder == run.out / "checkpoints/step-000002"
        assert (done.options.adapters is None) == (tune == "full")
    assert (target / "weights.txt").is_file()
    assert (target / "tokenizer_config.json").is_file()
