"""`opd plan`: its arithmetic against transformers' own models and what our own code computes, and what it prints."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from opd import registry as backends
from opd.memory import feature_bytes
from opd.models.adapters import part
from opd.plan import Assumed, devices, on, plan, report, view
from opd.plan.families import read_config, read_shape, shape_of
from opd.plan.shape import PARTS, Tune
from opd.plan.work import Cost, View, Work, completions, prefix, stages, tower
from opd.prompts.encoder import PromptEncoder
from opd.run.recipe import load
from opd.types import AdapterOptions, ModelOptions
from opd_cli import main
from tests.random_models import FAMILIES, SOURCE

SMALL_TOWER = {
    "hidden_size": 1024,
    "depth": 24,
    "num_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}


def text(hidden, mlp, layers, heads, kv_heads, **more):
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "num_key_value_heads": kv_heads, **more}


def published(kind, text, vision, tied=True, **more):
    return {"model_type": kind, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **more}


PUBLISHED = {
    "Qwen3-VL-4B": published(
        "qwen3_vl", text(2560, 9728, 36, 32, 8, head_dim=128, vocab_size=151_936), {**SMALL_TOWER, "out_hidden_size": 2560}
    ),
    "Qwen3-VL-8B": published(
        "qwen3_vl",
        text(4096, 12_288, 36, 32, 8, head_dim=128, vocab_size=151_936),
        {**SMALL_TOWER, "hidden_size": 1152, "depth": 27, "intermediate_size": 4304, "out_hidden_size": 4096},
        tied=False,
    ),
    "Qwen2.5-VL-3B": published(
        "qwen2_5_vl",
        text(2048, 11_008, 36, 16, 2, vocab_size=151_936),
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
    ),
    "Qwen2.5-VL-7B": published(
        "qwen2_5_vl",
        text(3584, 18_944, 28, 28, 4, vocab_size=152_064),
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
        tied=False,
    ),
    "Qwen3.5-4B": published(
        "qwen3_5",
        text(2560, 9216, 32, 16, 4, head_dim=256, vocab_size=248_320),
        {**SMALL_TOWER, "deepstack_visual_indexes": None, "out_hidden_size": 2560},
    ),
    # As published: what the text leaves out are the defaults of its class.
    "gemma-3-4b": {
        "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "sliding_window": 1024},
        "vision_config": {**SIGLIP, "image_size": 896, "vision_use_head": False},
    },
    "Idefics3-8B": published(
        "idefics3",
        text(4096, 14_336, 32, 32, 8, model_type="llama", vocab_size=128_259),
        {**SIGLIP, "image_size": 364},
        tied=False,
        scale_factor=2,
    ),
    "SmolVLM-Instruct": published(
        "idefics3",
        text(2048, 8192, 24, 32, 32, model_type="llama", vocab_size=49_155),
        {**SIGLIP, "image_size": 384},
        tied=False,
        scale_factor=3,
    ),
}
"""Sizes in the config.json of published models; without deepstack_visual_indexes where there are none."""
PUBLISHED["Qwen3.5-4B"]["vision_config"].pop("deepstack_visual_indexes")

ARCHITECTURES = {
    "qwen3_vl": "Qwen3VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_5": "Qwen3_5",
    "gemma3": "Gemma3",
    "idefics3": "Idefics3",
}


def written(folder, config):
    """A model folder as it is before its weights are there."""
    for file in SOURCE.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shape(name):
    from transformers import AutoConfig

    return shape_of(AutoConfig.for_model(**PUBLISHED[name]).to_dict())


@pytest.fixture
def folder(tmp_path):
    """Qwen3-VL-4B's sizes."""
    written(tmp_path, PUBLISHED["Qwen3-VL-4B"])
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    sized = {**settings, "patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(sized))
    return tmp_path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A random model of each family."""
    pytest.importorskip("torch")
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**PUBLISHED[name])
    with torch.device("meta"):
        model = getattr(transformers, f"{ARCHITECTURES[config.model_type]}ForConditionalGeneration")(config)
    found = read_shape(written(tmp_path, PUBLISHED[name]))
    counts = dict.fromkeys(PARTS, 0)
    for tensor, parameter in model.named_parameters():
        counts[{"vision": "vision tower"}.get(part(tensor), part(tensor))] += parameter.numel()
    assert found.parameters == counts
    assert sum(Tune("full", vision=False).trained(found).values()) == counts["language"] + counts["head"]


def test_adapters_have_the_parameters_that_backends_train(family, backend_name):
    pytest.importorskip("peft" if backend_name == "cpu" else "mlx_lm")
    found = read_shape(family)
    language = {name for layer in found.layers for name in found.linears(layer)}
    assert Tune("lora").trained(found) == Tune("lora", targets=tuple(language)).trained(found)
    for targets in (("q_proj", "down_proj"), tuple(sorted(language))):
        options = AdapterOptions(rank=4, vision=True, projector=True, targets=targets)
        backend = backends.load(backend_name, ModelOptions(family, tune_vision=False, adapters=options))
        counts = Tune("lora", True, True, 4, targets).trained(found)
        assert sum(counts.values()) == sum(value.size for value in backend.tensors("student").values())


def of_prompt(found, seen, n, length):
    """What a group costs a policy."""
    return prefix(found, seen).plus(completions(found, seen.before, length, n)).plus(tower(found.vision, seen))


def test_operations_are_those_of_our_own_code(family):
    """Every product and every pair of tokens that one sees the other, counted as our own forward and backward run."""
    torch = pytest.importorskip("torch")
    from PIL import Image

    from benchmarks import measuring
    from opd_torch.batch import lay_out
    from opd_torch.forward import hidden_states

    found, config = read_shape(family), read_config(family)
    encoder = PromptEncoder(family)
    prompt = encoder.encode([Image.new("RGB", (112, 72))], "?")
    seen = view(encoder, found, config["vision_config"]["patch_size"], (112, 72), len(encoder.encode([], "?")), "student")
    model = backends.load("cpu", ModelOptions(family))._student
    batch = lay_out([prompt], [[np.arange(9, dtype=np.int32)] * 3], torch.device("cpu"))
    cost = of_prompt(found, seen, 3, 9)
    # The delta rule in chunks computes more than its recurrence, which is counted: see the next test.
    most = 1.1 if config["model_type"] == "qwen3_5" else 1
    for run, planned in (
        (lambda: hidden_states(model, batch), cost.forward),
        (lambda: hidden_states(model, batch).sum().backward(), cost.forward + cost.backward(True)),
        (lambda: hidden_states(model, batch, True).sum().backward(), cost.forward + cost.backward(True) + cost.again()),
    ):
        assert planned <= measuring.flops(run) <= most * planned


@pytest.mark.parametrize("model", ["qwen3-vl-4b", "qwen3.5-4b"])
def test_operations_are_those_of_the_benchmarks(model):
    pytest.importorskip("torch")
    from benchmarks import arithmetic, workload

    config = workload.CONFIGS[model]()
    rows, columns = workload.grid(700)
    seen = View(2 * rows, 2 * columns, 700 - rows * columns, 2)
    cost = of_prompt(shape_of(config.to_dict()), seen, 3, 33)
    assert cost.forward == arithmetic.trunk(config, 700, 33, 3)
    assert cost.forward + cost.backward(True) == arithmetic.trunk(config, 700, 33, 3, backward=True)
    assert cost.again() == arithmetic.trunk(config, 700, 33, 3, backward=True, again=True) - cost.forward - cost.backward(True)


def test_frozen_weights_have_no_gradient():
    """Through them the gradient of their input alone; tokens mix as before."""
    cost = Cost(products=100.0, mixing=10.0, first=7.0)
    assert cost.backward(True) == 2 * 110 - 7
    assert cost.backward(False) == 100 + 2 * 10 - 7


@pytest.mark.parametrize(("tokens", "teacher", "training"), [(128, (105, 20), (2340, 327)), (512, (130, 45), (2462, 449))])
def test_cost_of_one_group(tokens, teacher, training):
    """TFLOP of Qwen3-VL-4B with a prompt of 4096, a crop of 1024 and 8 completions, apart and shared, worked out by hand."""
    shared = Work(1, 8, tokens, View(128, 128, 0, 2), View(64, 64, 0, 2), 10**6)
    apart = replace(shared, completions=1)
    one, eight = (stages(shape("Qwen3-VL-4B"), Tune(), work, 2, True) for work in (apart, shared))

    def operations(found, *names):
        return sum(found[name].operations for name in names) / 1e12

    student = ("student forward", "student backward", "recomputation")
    assert operations(eight, "rollout prefill") == pytest.approx(72, rel=0.03)
    assert 8 * operations(one, "rollout prefill") == pytest.approx(575, rel=0.03)
    assert operations(eight, "teacher forward") == pytest.approx(teacher[1], rel=0.03)
    assert 8 * operations(one, "teacher forward") == pytest.approx(teacher[0], rel=0.03)
    # By hand every product was computed again, each layer's last too.
    assert operations(eight, *student) == pytest.approx(training[1], rel=0.06)
    assert 8 * operations(one, *student) == pytest.approx(training[0], rel=0.06)
    assert operations(eight, "head and divergence") == pytest.approx(4 * 2 * 8 * tokens * 151_936 * 2560 / 1e12, rel=1e-9)


def group(work):
    """As many tokens as `work` says, none of them a real one."""
    from opd.types import Completion, Group, Prompt, VisualTokens

    nothing = VisualTokens(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))
    prompts = [
        Prompt(np.zeros(view.tokens, np.int32), np.zeros((1, 1), np.int32), {}, "", nothing) for view in (work.student, work.teacher)
    ]
    one = Completion(np.zeros(work.tokens, np.int32), np.zeros(work.tokens, np.float32), False)
    return Group(*prompts, (one,) * work.completions, ())


@pytest.mark.parametrize(("budget", "split"), [(700, 0), (132, 0), (131, 2), (122, 2), (121, 1), (1, 1)])
def test_a_step_is_cut_as_the_loop_cuts_it(budget, split):
    from opd.method import microbatch

    work = Work(20, 3, 10, View(20, 20, 2, 2), View(4, 10, 2, 2), budget, room=600)
    cut = microbatch.microbatches_of([group(work)] * 20, budget)
    assert [len(part) for part in cut] == [work.together] * (work.calls - 1) + [20 - work.together * (work.calls - 1)]
    assert work.split == split == microbatch.completions_at_once([group(work)] * len(cut[0]), budget)
    rooms = microbatch.microbatches([(work.student.tokens, work.tokens)] * 20, 3, 600)
    assert work.sampled == len(rooms[0]) == 4
    assert work.limited(3).together == work.sampling(3).sampled == 3
    assert work.divided(2).split == 2


@pytest.mark.parametrize("size", [(40, 40), (200, 150), (31, 90), (400, 64)])
def test_prompts_are_as_long_as_the_encoder_makes_them(family, size):
    from PIL import Image

    encoder, question = PromptEncoder(family), "What digit is on the red tile?"
    text = len(encoder.encode([], question))
    recipe = load("tiny", [f"model.path={family}"])
    found = plan(recipe, devices.DEVICES["H200"], assumed=Assumed(size, (64, 48), text)).work
    for seen, its, policy in ((found.student, size, "student"), (found.teacher, (64, 48), "teacher")):
        encoded = encoder.encode([Image.new("RGB", its, "red")], question, policy)
        assert seen.visual == len(encoded.visual.index)
        assert seen.tokens == len(encoded)
        assert encoded.images["pixel_values"].size == seen.patches * read_shape(family).vision.values


def test_bounds_on_pixels_count(random_model):
    recipe = load("tiny", [f"model.path={random_model}", "model.max_pixels=20000", "model.teacher_min_pixels=10000"])
    found = plan(recipe, devices.DEVICES["H200"], assumed=Assumed((200, 150), (31, 90), 20)).work
    assert 15_000 < found.student.patches * 8**2 <= 20_000
    assert found.teacher.patches * 8**2 >= 10_000


def test_windows_and_tiles_count_the_pairs_that_attend():
    assert View(6, 4, 1, 2).pairs() == 24**2
    # Windows of 4 x 4, of which the lower are 2 x 4.
    assert View(6, 4, 1, 2).pairs(4) == 16**2 + 8**2
    assert View(6, 4, 1, 2, pieces=3).pairs() == 3 * 24**2


def test_the_largest_step_fits_and_one_more_group_does_not(folder):
    recipe = load("paper", [f"model.path={folder}", "rollout.sample_tokens=1"])
    found = plan(recipe, devices.DEVICES["H200"], assumed=Assumed((1024, 768)))
    groups = found.largest // found.work.group
    assert 1 < groups < recipe.rollout.prompts
    assert replace(found, work=found.work.limited(groups)).memory.peak <= found.usable
    assert replace(found, work=found.work.limited(groups + 1)).memory.peak > found.usable


def test_kept_features_are_bounded_as_the_backends_bound_them(folder):
    recipe = load("lora", [f"model.path={folder}", "rollout.prompts=512"])
    small = replace(devices.DEVICES["RTX 4090"], memory=2 * 2**30)
    found = plan(recipe, small, assumed=Assumed((2048, 1536)))
    said = report([found], "")["memory"]
    assert said["kept_features_bound"] == said["held"]["kept image features"] == feature_bytes(small.memory) == 2**26
    large = on(found, devices.DEVICES["H200"])
    assert large.memory.held["kept image features"] > 2**26
    few = replace(found, work=replace(found.work, prompts=4))
    assert replace(few, setting=large.setting).stages["student forward"].operations < few.stages["student forward"].operations


def test_of_a_group_that_is_too_large_some_completions_fit(folder):
    recipe = load("lora", [f"model.path={folder}", "model.dtype=bfloat16"])
    wide = replace(devices.DEVICES["RTX 4090"], memory=18 * 2**30)
    found = plan(recipe, wide, assumed=Assumed((2048, 1536)))
    found = replace(found, work=replace(found.work, tokens=4096))
    few = found.work.divided(1).split
    assert few == 1
    assert found.work.longest < found.largest < found.work.group
    assert replace(found, work=replace(found.work, budget=found.largest)).memory.phases["accumulate"] <= found.usable


def test_what_to_change_where_nothing_fits(folder):
    recipe = load("paper", [f"model.path={folder}"])
    found = plan(recipe, devices.DEVICES["RTX 4090"], assumed=Assumed((1024, 768)))
    assert found.largest == 0
    changes = found.smaller()
    assert changes["model.tune=qlora"] < changes["model.tune=lora"] < found.usable
    # The weights alone are too large, so tokens are next to nothing of it.
    assert changes.get("rollout.max_tokens=512", found.least) > max(found.usable, 0.98 * found.least)
    peaks = []
    for tokens in (1, found.work.group):  # a completion at a time, or a group
        least = [f"rollout.microbatch_tokens={tokens}", "rollout.sample_tokens=1"]
        lora = load("paper", [f"model.path={folder}", "model.tune=lora", *least])
        peaks.append(plan(lora, found.device, assumed=Assumed((1024, 768))).memory.peak)
    assert changes["model.tune=lora"] == min(peaks)
    assert all(peak < found.least for peak in changes.values())


def test_only_families_that_bound_pixels_are_told_to(family):
    kind = read_config(family)["model_type"]
    found = plan(load("tiny", [f"model.path={family}"]), devices.DEVICES["H200"], assumed=Assumed((200, 150)))
    assert any("max_pixels" in change for change in found.smaller()) == (kind != "gemma3")


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *(str(argument) for argument in arguments)], env={"COLUMNS": "80"})


def test_json_is_one_object(folder):
    result = run("paper", "--model", folder, "--device", "h200", "--image", "1024x768", "--completion-tokens", 200, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["device"]["name"] == "H200"
    assert found["assumed"]["prompt_tokens"] == 64 + 2 + 768  # the image stands between two marks
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


def test_tables_of_every_family_fit_into_80_columns(family):
    result = run("tiny", "--model", family, "--set", "rollout.microbatch_tokens=64", "--set", "model.tune=lora")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines[1:]) <= 80
    assert "completions at a time" in result.stdout
    assert [line for line in lines if line.startswith("taken: ")] == [
        f"taken: {devices.HERE_MATMUL_SHARE:.0%} of peak TFLOP/s, {devices.HERE_BANDWIDTH_SHARE:.0%} of peak GB/s (this machine)",
        "taken: 40% of peak TFLOP/s, 70% of peak GB/s (M4 Max, RTX 4090, H200)",
    ]


def test_this_machine_is_measured_within_a_second():
    found = devices.this_machine()
    assert 1e9 < found.matmul["float32"] < 1e15
    assert 1e9 < found.bandwidth < 1e13


def test_seconds_are_of_the_slower_of_computing_and_moving_and_of_the_passes_between():
    fast = devices.Device("x", {"float32": 1e12}, 1e9, 1e12, 1.0, "cpu", "", 0.4, 0.7)
    found = plan(load("tiny"), fast)
    stage, seconds = found.stages["rollout decode"], found.seconds["rollout decode"]
    assert seconds == pytest.approx(max(stage.operations / 0.4e12, stage.moved / 0.7e9) + stage.passed / 0.7e9)
    moved = replace(fast, bandwidth=1e6)
    assert replace(found, device=moved).seconds["rollout decode"] == pytest.approx((stage.moved + stage.passed) / 0.7e6)


def test_products_with_weights_in_4_bits_have_a_rate_of_their_own():
    found = plan(load("tiny", ["model.tune=qlora"]), devices.Device("x", {"float32": 1e12}, 1e15, 1e12, 1.0, "mlx", "", 1.0, 1.0))
    slow = replace(found, device=replace(found.device, packed=(1e9, 4e9)))
    work = found.work
    products = work.prompts * 2.0 * work.completions * work.tokens * found.shape.weights
    assert found.stages["rollout decode"].packed == products
    assert slow.seconds["rollout decode"] - found.seconds["rollout decode"] == pytest.approx(products / 1e9 - products / 1e12)
    backward = found.stages["student backward"]
    assert slow.seconds["student backward"] - found.seconds["student backward"] == pytest.approx(backward.packed * (1 / 4e9 - 1e-12))
    assert not any(stage.packed for stage in replace(found, tune=Tune("lora", False)).stages.values())


def test_passes_follow_what_is_kept_and_trained():
    found = plan(load("tiny"), devices.DEVICES["H200"])
    twice = replace(found, work=replace(found.work, prompts=2 * found.work.prompts)).stages
    for name, stage in found.stages.items():
        assert twice[name].passed == stage.passed * (1 if name in ("optimizer", "teacher's average") else 2)
    trained = sum(found.tune.trained(found.shape).values())
    assert found.stages["teacher's average"].passed == 3 * 4 * trained  # two are read, one is written
    assert found.stages["recomputation"].passed == 0
    frozen = replace(found, tune=Tune("full", vision=False)).stages
    assert frozen["student backward"].passed < found.stages["student backward"].passed


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--device", "M4 Mox"], "--device 'M4 Mox': no such device; did you mean 'M4 Max'?"),
        ({}, ["--model", "nowhere"], "model 'nowhere': no such folder"),
        ({"model_type": "llava"}, [], "model_type 'llava' is not supported; supported: gemma3, idefics3, qwen2_5_vl, qwen3_5"),
        ({"vision_config": 3}, [], "config.json cannot be used: "),
        ({}, ["--image", "huge"], "--image huge: write it as WIDTHxHEIGHT"),
        ({}, ["--image", "9000x9"], "images of 9000 x 9 pixels cannot be encoded"),
        ({}, ["--backend", "cudo"], "--backend 'cudo' cannot be planned; did you mean 'cuda'?"),
        (
            {},
            ["--set", "model.tune=lora", "--set", "model.targets=['qproj']"],
            "model.targets: the language model has no linear layer 'qproj'; did you mean 'q_proj'?",  # in training's words
        ),
    ],
)
def test_a_mistake_is_one_line(folder, change, arguments, message):
    (folder / "config.json").write_text(json.dumps({**PUBLISHED["Qwen3-VL-4B"], **change}))
    result = run("paper", "--model", folder, "--device", "H200", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert message in said


def test_help_has_examples():
    assert len(re.findall(r"^ +opd plan", run("--help").stdout, flags=re.MULTILINE)) >= 3
