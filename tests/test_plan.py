"""`opd plan`: its arithmetic against transformers' own models, against what both backends allocate, and what it prints."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from opd import backend as backends
from opd.adapters import AdapterOptions
from opd.objective import Objective
from opd.plan import Assumed, devices, plan
from opd.plan.memory import CHECKPOINT_ABOVE, Setting, estimate, memory
from opd.plan.shape import Shape, Tune, Vision, read_shape
from opd.plan.work import View, Work, completions, prefix, stages, tower
from opd.recipe import load
from opd.types import Completion, Group, ModelOptions, Prompt, Sampling, VisualTokens
from opd_cli import main
from tests.random_models import qwen3_vl

SMALL_TOWER = Vision(1024, 24, 16, 4096, 16, 2, 3, 2, 2304, 3)
LARGE_TOWER = Vision(1152, 27, 16, 4304, 16, 2, 3, 2, 2304, 3)
PUBLISHED = {
    "2B": Shape(2048, 28, 16, 8, 128, 6144, 151_936, True, SMALL_TOWER),
    "4B": Shape(2560, 36, 32, 8, 128, 9728, 151_936, True, SMALL_TOWER),
    "8B": Shape(4096, 36, 32, 8, 128, 12_288, 151_936, False, LARGE_TOWER),
}
"""Sizes in the config.json of Qwen3-VL-2B, 4B and 8B-Instruct."""

PATCH = 8
BIG = {"hidden": 1024, "layers": 8, "heads": 16, "kv_heads": 8, "head_dim": 64, "mlp": 3072, "vision_hidden": 256, "vision_mlp": 1024}
MIDDLE = {**BIG, "hidden": 256, "layers": 6, "heads": 4, "kv_heads": 2, "mlp": 768, "vision_hidden": 128, "vision_mlp": 512}


def config(shape):
    vision = shape.vision
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": shape.tied,
        "text_config": {
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.intermediate,
            "vocab_size": shape.vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision_config": {
            "hidden_size": vision.hidden,
            "depth": vision.layers,
            "num_heads": vision.heads,
            "intermediate_size": vision.intermediate,
            "patch_size": vision.patch,
            "temporal_patch_size": vision.frames,
            "in_channels": vision.channels,
            "spatial_merge_size": vision.merge,
            "num_position_embeddings": vision.positions,
            "out_hidden_size": shape.hidden,
            "deepstack_visual_indexes": list(range(vision.taps)),
        },
    }


@pytest.fixture
def folder(tmp_path):
    """A model folder as it is before its weights are there: Qwen3-VL-4B's sizes."""
    (tmp_path / "config.json").write_text(json.dumps(config(PUBLISHED["4B"])))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}))
    return tmp_path


def meta_model(values, **options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**values))
    model.config._attn_implementation = "eager"
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model(name, tmp_path):
    shape = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config(shape)))
    assert read_shape(tmp_path) == shape
    model = meta_model(config(shape))
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    visual = model.model.visual
    projector = count(visual.merger) + count(visual.deepstack_merger_list)
    head = 0 if shape.tied else count(model.lm_head)
    assert list(shape.parameters.values()) == [count(visual) - projector, projector, count(model.model.language_model), head]
    assert sum(Tune("full", vision=False).trained(shape).values()) == count(model.model.language_model) + head


def test_adapters_have_the_parameters_that_backends_train(tmp_path):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    assert peft
    folder = qwen3_vl(tmp_path)
    options = AdapterOptions(rank=4, vision=True, projector=True)
    backend = backends.load("cpu", ModelOptions(folder, tune_vision=False, adapters=options))
    counts = Tune("lora", True, True, 4).trained(read_shape(folder))
    assert sum(counts.values()) == sum(value.size for value in backend.tensors("student").values())


def test_operations_are_those_of_the_model():
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(64, 2, 4, 2, 16, 96, 300, True, Vision(32, 2, 2, 48, 8, 2, 3, 2, 64, 1))
    values = config(shape)
    values["text_config"]["rope_parameters"]["mrope_section"] = [4, 2, 2]
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**values, attn_implementation="eager"))
    rows, columns = 8, 12
    pixels = torch.zeros(rows * columns, shape.vision.values)
    with FlopCounterMode(display=False) as counter:
        model.model.visual(pixels, grid_thw=torch.tensor([[1, rows, columns]]))
    # Two stock merger calls less rows than patches; attention is over all patches in both.
    assert counter.get_total_flops() == pytest.approx(tower(shape.vision, shape.hidden, rows * columns), rel=1e-9)

    length = 40
    embeddings = torch.zeros(1, length, shape.hidden, requires_grad=True)
    positions = torch.arange(length).expand(3, 1, length)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        forward = counter.get_total_flops()
        hidden.sum().backward()
    # Eager attention multiplies with all keys; a prompt of length / 2 and half of the completion are as many.
    assert forward == completions(shape, length / 2, length, 1)
    assert counter.get_total_flops() == 3 * forward
    half = 2.0 * length**2 * shape.query
    keys = 2.0 * length * 2 * shape.hidden * shape.key
    assert prefix(shape, length) == forward / shape.layers - half + keys


@pytest.mark.parametrize(("tokens", "teacher", "training"), [(128, (105, 20), (2340, 327)), (512, (130, 45), (2462, 449))])
def test_cost_of_one_group(tokens, teacher, training):
    """TFLOP of Qwen3-VL-4B with a prompt of 4096, a crop of 1024 and 8 completions, apart and shared, worked out by hand."""
    shared = Work(1, 8, tokens, View(16_384, 0, 2), View(4096, 0, 2), 1)
    apart = replace(shared, completions=1)
    one, eight = (stages(PUBLISHED["4B"], Tune(), work, 2, True) for work in (apart, shared))

    def operations(found, *names):
        return sum(found[name].operations for name in names) / 1e12

    student = ("student forward", "student backward", "recomputation")
    assert operations(eight, "rollout prefill") == pytest.approx(72, rel=0.03)
    assert 8 * operations(one, "rollout prefill") == pytest.approx(575, rel=0.03)
    assert operations(eight, "teacher forward") == pytest.approx(teacher[1], rel=0.03)
    assert 8 * operations(one, "teacher forward") == pytest.approx(teacher[0], rel=0.03)
    assert operations(eight, *student) == pytest.approx(training[1], rel=0.03)
    assert 8 * operations(one, *student) == pytest.approx(training[0], rel=0.03)
    assert operations(eight, "head and divergence") == pytest.approx(4 * 2 * 8 * tokens * 151_936 * 2560 / 1e12, rel=1e-9)


def prompt(text, side, seed):
    """A prompt of `text` tokens and an image of side x side patches."""
    visual = side * side // 4
    tokens = np.concatenate([np.full(2, 5), np.full(visual, 342), np.full(text - 2, 7)]).astype(np.int32)
    pixels = np.random.default_rng(seed).standard_normal((side * side, 6 * PATCH**2)).astype(np.float32)
    return Prompt(
        tokens,
        np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1)),
        {"pixel_values": pixels, "image_grid_thw": np.array([[1, side, side]], np.int32)},
        f"image {seed}",
        VisualTokens(np.arange(2, 2 + visual).astype(np.int32), np.zeros(visual, np.int32), np.zeros((visual, 4), np.float32)),
    )


class Measured:
    """One group on a backend of random weights, what it allocates, and the plan of the same."""

    def __init__(self, name, folder, text, side, crop, n, length, adapters=None, dtype="float32"):
        self.name = name
        self.shape = read_shape(folder)
        self.tune = Tune() if adapters is None else Tune("lora", False, rank=adapters.rank)
        self.setting = Setting(name == "mlx", False, dtype == "bfloat16")
        self.work = Work(2, n, length, View(side**2, text, 2), View(crop**2, text, 2), 0)  # two micro-batches of one group
        options = ModelOptions(folder, dtype, adapters is None, adapters)
        # Apart from the tested one, so that nothing a call left behind is counted.
        self.backend = backends.load(name, options)
        self.module = importlib.import_module("opd_mlx.backend" if name == "mlx" else "opd_torch.backend")
        self.backend.move_teacher(0.5)
        rng = np.random.default_rng(0)
        completion = [Completion(rng.integers(0, 250, length).astype(np.int32), np.full(length, -5, np.float32), False) for _ in range(n)]
        weights = tuple(np.full(length, 0.01, np.float32) for _ in range(n))
        self.group = Group(prompt(text, side, 0), prompt(text, crop, 1), tuple(completion), weights)
        self.short = prompt(4, 4, 2)
        self.uniforms = np.full((1, n, length), 0.5, np.float32)

    def plan(self, checkpointed):
        return memory(self.shape, self.tune, self.work, self.setting, checkpointed=checkpointed)

    def peak(self, run):
        """Largest number of bytes allocated in a call above those before it."""
        if self.name == "mlx":
            import mlx.core as mx

            mx.set_cache_limit(0)
            mx.eval(mx.zeros(1) + 1)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            run()
            return mx.get_peak_memory() - before
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())

    def rollout(self):
        return self.peak(lambda: self.backend.sample([self.group.student], self.uniforms, Sampling()))

    def accumulate(self, monkeypatch, checkpointed):
        """Above what is held: the second micro-batch, and the gradient of the first."""
        monkeypatch.setattr(self.module, "CHECKPOINT_ABOVE", 0 if checkpointed else 2**60)
        self.backend._gradient = {}
        # Whatever the first micro-batch was, its gradient is as large; so it is a short one.
        first = Group(self.short, self.short, self.group.completions[:1], self.group.weights[:1])
        self.backend.accumulate([first], Objective(top_k=100))
        gradient = 4 * sum(self.tune.trained(self.shape).values())
        return gradient + self.peak(lambda: self.backend.accumulate([self.group], Objective(top_k=100)))


def agree(measured, plan, phase, among_held=0.2, alone=0.3):
    """Within a fifth of all that is allocated, and within `alone` of what the phase itself allocates."""
    held = sum(plan.held.values())
    assert plan.phases[phase] == pytest.approx(held + measured, rel=among_held)
    assert plan.phases[phase] - held == pytest.approx(measured, rel=alone)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    return qwen3_vl(tmp_path_factory.mktemp("big"), **BIG)


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    return qwen3_vl(tmp_path_factory.mktemp("middle"), **MIDDLE)


def test_memory_of_a_model_of_100m_parameters(backend_name, big, monkeypatch):
    measured = Measured(backend_name, big, text=8, side=4, crop=4, n=2, length=6)
    assert sum(measured.shape.parameters.values()) > 1e8
    agree(measured.rollout(), measured.plan(False), "rollout", alone=0.5)
    for checkpointed in (False, True):
        agree(measured.accumulate(monkeypatch, checkpointed), measured.plan(checkpointed), "accumulate")


@pytest.mark.parametrize("adapters", [None, AdapterOptions()], ids=["full", "lora"])
def test_memory_of_long_rows(backend_name, middle, adapters, monkeypatch):
    """Activations are most of it here."""
    measured = Measured(backend_name, middle, text=80, side=12, crop=4, n=4, length=32, adapters=adapters)
    # MLX decides by itself in what order it computes, torch does not.
    alone = {"cpu": 0.1, "mlx": 0.3}[backend_name]
    for checkpointed in (False, True):
        agree(measured.accumulate(monkeypatch, checkpointed), measured.plan(checkpointed), "accumulate", alone=alone)


def test_half_precision_holds_cast_weights(backend_name, middle, monkeypatch):
    measured = Measured(backend_name, middle, text=60, side=12, crop=4, n=2, length=32, dtype="bfloat16")
    agree(measured.rollout(), measured.plan(False), "rollout")
    agree(measured.accumulate(monkeypatch, False), measured.plan(False), "accumulate")


def test_layers_are_computed_again_where_the_backend_does(backend_name, random_model):
    measured = Measured(backend_name, random_model, text=20, side=8, crop=4, n=3, length=7)
    forward = importlib.import_module(measured.module.__name__.replace("backend", "forward"))
    assert forward.CHECKPOINT_ABOVE == CHECKPOINT_ABOVE
    if backend_name == "mlx":
        found = forward.activation_bytes(measured.backend._model, measured.backend._batch("student", [measured.group]))
    else:
        layout = importlib.import_module("opd_torch.batch").lay_out
        import torch

        batch = layout([measured.group.student], [[one.tokens for one in measured.group.completions]], torch.device("cpu"))
        found = forward.activation_bytes(measured.backend._student, batch, 4)
    assert estimate(measured.shape, measured.work, measured.setting) == found


def test_a_step_is_cut_as_the_loop_cuts_it():
    from opd.rollout import microbatches

    work = Work(20, 3, 10, View(400, 20, 2), View(40, 20, 2), 700)
    cut = microbatches([(work.student.tokens, work.tokens)] * 20, 3, 700)
    assert [len(part) for part in cut] == [work.together] * (work.calls - 1) + [20 - work.together * (work.calls - 1)]
    assert work.limited(3).together == 3


def test_prompts_are_as_long_as_the_processor_makes_them(random_model):
    pytest.importorskip("transformers")
    from PIL import Image

    from opd.prompts import PromptEncoder

    recipe = load("tiny", [f"model.path={random_model}", "model.max_pixels=20000"])
    found = plan(recipe, devices.DEVICES["H200"], assumed=Assumed((200, 150), (31, 90), 20)).work
    encoder = PromptEncoder(random_model, max_pixels=20_000)
    for view, size in ((found.student, (200, 150)), (found.teacher, (31, 90))):
        encoded = encoder.encode([Image.new("RGB", size)], "x")
        assert view.visual == len(encoded.visual.index)
        assert view.patches == len(encoded.images["pixel_values"])
        assert view.tokens == 20 + view.visual


def test_the_largest_step_fits_and_one_more_group_does_not(folder):
    recipe = load("paper", [f"model.path={folder}"])
    found = plan(recipe, devices.DEVICES["H200"], assumed=Assumed((1024, 768)))
    groups = found.largest // found.work.group
    assert 1 < groups < recipe.rollout.prompts
    assert replace(found, work=found.work.limited(groups)).memory.peak <= found.usable
    assert replace(found, work=found.work.limited(groups + 1)).memory.peak > found.usable


def test_what_to_change_where_nothing_fits(folder):
    recipe = load("paper", [f"model.path={folder}"])
    found = plan(recipe, devices.DEVICES["RTX 4090"], assumed=Assumed((1024, 768)))
    assert found.largest == 0
    changes = found.smaller()
    assert changes["model.tune=qlora"] < changes["model.tune=lora"] < found.usable < changes["rollout.max_tokens=512"]
    lora = load("paper", [f"model.path={folder}", "model.tune=lora", "model.vision=false", "rollout.microbatch_tokens=1"])
    assert plan(lora, found.device, assumed=Assumed((1024, 768))).memory.peak == changes["model.tune=lora"]


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *(str(argument) for argument in arguments)], env={"COLUMNS": "80"})


def test_json_is_one_object(folder):
    result = run("paper", "--model", folder, "--device", "h200", "--image", "1024x768", "--completion-tokens", 200, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["device"]["name"] == "H200"
    assert found["assumed"]["prompt_tokens"] == 64 + 768
    assert found["assumed"]["completion_tokens"] == 200
    assert found["memory"]["peak"] == max(found["memory"]["phases"].values())
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"].values()))
    assert [one["name"] for one in found["devices"]] == ["H200", "M4 Max", "RTX 4090"]


@pytest.mark.parametrize("device", ["RTX 4090", "M4 Max"])
def test_tables_fit_into_80_columns(folder, device):
    result = run("paper", "--model", folder, "--device", device, "--image", "4000x3000")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines[1:]) <= 80
    assert "not even one prompt" in result.stdout
    for words in ("vision tower", "optimizer moments", "peak of accumulate", "rollout decode", "RTX 4090", "40% of peak TFLOP/s"):
        assert any(line.strip().startswith(words) or words in line for line in lines), words


def test_this_machine_is_measured_within_a_second():
    found = devices.this_machine()
    assert 1e9 < found.matmul["float32"] < 1e15
    assert 1e9 < found.bandwidth < 1e13


def test_seconds_are_of_the_slower_of_computing_and_moving():
    fast = devices.Device("x", {"float32": 1e12}, 1e9, 1e12, 1.0, "cpu", "")
    found = plan(load("tiny"), fast)
    stage, seconds = found.stages["rollout decode"], found.seconds["rollout decode"]
    assert seconds == pytest.approx(max(stage.operations / 0.4e12, stage.moved / 0.7e9))
    moved = replace(fast, bandwidth=1e6)
    assert replace(found, device=moved).seconds["rollout decode"] == pytest.approx(stage.moved / 0.7e6)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--device", "M4 Mox"], "--device 'M4 Mox': no such device; did you mean 'M4 Max'?"),
        ({}, ["--model", "nowhere"], "model 'nowhere': no such folder"),
        ({"model_type": "qwen9"}, [], "architecture 'qwen9' cannot be planned"),
        ({"vision_config": {}}, [], "no hidden_size, which the cost of a qwen3_vl depends on"),
        ({}, ["--image", "huge"], "--image huge: write it as WIDTHxHEIGHT"),
        ({}, ["--image", "9000x9"], "an image of 9000x9 pixels cannot be encoded"),
        ({}, ["--backend", "cudo"], "--backend 'cudo' cannot be planned; did you mean 'cuda'?"),
    ],
)
def test_a_mistake_is_one_line(folder, change, arguments, message):
    (folder / "config.json").write_text(json.dumps({**config(PUBLISHED["4B"]), **change}))
    result = run("paper", "--model", folder, "--device", "H200", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert message in said


def test_help_has_examples():
    assert len(re.findall(r"^ +opd plan", run("--help").stdout, flags=re.MULTILINE)) >= 3
