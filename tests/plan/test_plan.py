"""`opd plan`: its arithmetic against transformers' own models and what our own code computes, and
what it prints."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from opd import registry
from opd.errors import RecipeError
from opd.memory import feature_bytes
from opd.models.adapters import part_of_model
from opd.models.shape import PARTS, Shape
from opd.plan import Assumed, devices, everywhere, plan, read_config, view
from opd.plan.measure import PARTS as MEASURED
from opd.plan.measure import measure, repeats
from opd.plan.work import Step, View, Work, stages
from opd.planner import Machine
from opd.prompts.encoder import PromptEncoder
from opd.run.recipe import load
from opd.types import AdapterOptions, ModelOptions
from opd_cli import main
from opd_cli.plan import report
from tests.support.random_models import FAMILIES, SOURCE

SMALL_TOWER = {
    "hidden_size": 1024,
    "depth": 24,
    "num_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


def text(hidden, mlp, layers, heads, kv_heads, **more):
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return {**sizes, "num_key_value_heads": kv_heads, **more}


INTERLEAVED = {"mrope_interleaved": True, "rope_type": "default", "type": "default"}
ROPE = {
    "qwen3_vl": {"rope_theta": 5e6, "rope_scaling": {**INTERLEAVED, "mrope_section": [24, 20, 20]}},
    "qwen2_5_vl": {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "qwen3_5": {
        "rope_parameters": {
            **INTERLEAVED,
            "mrope_section": [11, 11, 10],
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
    },
}
"""What published models say of rotary positions, without which MLX builds none."""


def published(kind, text, vision, tied=True, **more):
    return {
        "model_type": kind,
        "text_config": {**ROPE.get(kind, {}), **text},
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **more,
    }


PUBLISHED = {
    "Qwen3-VL-2B": published(
        "qwen3_vl",
        text(2048, 6144, 28, 16, 8, head_dim=128, vocab_size=151_936),
        {**SMALL_TOWER, "out_hidden_size": 2048},
    ),
    "Qwen3-VL-4B": published(
        "qwen3_vl",
        text(2560, 9728, 36, 32, 8, head_dim=128, vocab_size=151_936),
        {**SMALL_TOWER, "out_hidden_size": 2560},
    ),
    "Qwen3-VL-8B": published(
        "qwen3_vl",
        text(4096, 12_288, 36, 32, 8, head_dim=128, vocab_size=151_936),
        {
            **SMALL_TOWER,
            "hidden_size": 1152,
            "depth": 27,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
        },
        tied=False,
    ),
    "Qwen2.5-VL-3B": published(
        "qwen2_5_vl",
        text(2048, 11_008, 36, 16, 2, vocab_size=151_936),
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
        },
    ),
    "Qwen2.5-VL-7B": published(
        "qwen2_5_vl",
        text(3584, 18_944, 28, 28, 4, vocab_size=152_064),
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
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
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
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
"""Sizes in the config.json of published models; without deepstack_visual_indexes where there are
none."""
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


def shape_of(config, backend="cpu"):
    """The shape of a complete configuration, by a backend's empty model."""
    return Shape(config, registry.planner(backend).parameters(config))


FULL = ModelOptions(SOURCE)


def footprint(found):
    """What a backend holds roughly, on a GPU of its kind."""
    return registry.planner("cpu").footprint(FULL, found.config, here=False)


def shape(name):
    from transformers import AutoConfig

    return shape_of(AutoConfig.for_model(**PUBLISHED[name]).to_dict())


def write_published(folder, name):
    """A folder with a published Qwen3-VL's sizes, and its patches of 16 pixels."""
    written(folder, PUBLISHED[name])
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    sized = {
        **settings,
        "patch_size": 16,
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(sized))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Qwen3-VL-4B's sizes."""
    return write_published(tmp_path, "Qwen3-VL-4B")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A random model of each family."""
    pytest.importorskip("torch")
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model(name, backend_name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**PUBLISHED[name])
    with torch.device("meta"):
        model = getattr(
            transformers, f"{ARCHITECTURES[config.model_type]}ForConditionalGeneration"
        )(config)
    found = shape_of(read_config(written(tmp_path, PUBLISHED[name])), backend_name)
    assert found.shapes == {
        tensor: tuple(parameter.shape) for tensor, parameter in model.named_parameters()
    }
    counts = dict.fromkeys(PARTS.values(), 0)
    for tensor, parameter in model.named_parameters():
        counts[PARTS[part_of_model(tensor)]] += parameter.numel()
    assert found.parameters == counts
    assert (
        sum(found.trained(ModelOptions(tmp_path, tune_vision=False)).values())
        == counts["language"] + counts["head"]
    )


def test_adapters_have_the_parameters_that_backends_train(family, backend_name):
    pytest.importorskip("peft" if backend_name == "cpu" else "mlx_lm")
    found = shape_of(read_config(family), backend_name)
    language = {
        name.rpartition(".")[2] for name in found.linears if part_of_model(name) == "language"
    }
    every, named = (
        ModelOptions(family, adapters=AdapterOptions(targets=targets))
        for targets in ((), tuple(language))
    )
    assert found.trained(every) == found.trained(named)
    for targets in (("q_proj", "down_proj"), tuple(sorted(language))):
        adapters = AdapterOptions(rank=4, vision=True, projector=True, targets=targets)
        options = ModelOptions(family, tune_vision=False, adapters=adapters)
        backend = registry.load(backend_name, options)
        counts = found.trained(options)
        assert sum(counts.values()) == sum(
            value.size for value in backend.tensors("student").values()
        )


def group_of(found, seen, n, length, recompute=False, options=FULL):
    """Operations of one group's stages, of which both policies see the same."""
    work = Work(1, n, length, seen, seen, 10**9, 10**9)
    cost = stages(Step(found, options, work, footprint(found), 0), recompute)
    return {name: stage.operations for name, stage in cost.items()}


def test_operations_are_those_of_our_own_code(family):
    """Every product and every pair of tokens that one sees the other, counted as our own forward
    and backward run."""
    torch = pytest.importorskip("torch")
    from PIL import Image

    from benchmarks import measuring
    from opd_torch.batch import lay_out
    from opd_torch.forward import hidden_states

    found = shape_of(read_config(family))
    encoder = PromptEncoder(family)
    prompt = encoder.encode([Image.new("RGB", (112, 72))], "?")
    seen = view(encoder, found, (112, 72), len(encoder.encode([], "?")))
    model = registry.load("cpu", ModelOptions(family))._student
    batch = lay_out([prompt], [[np.arange(9, dtype=np.int32)] * 3], torch.device("cpu"))
    cost = group_of(found, seen, 3, 9, recompute=True)
    forward, backward = cost["student forward"], cost["student backward"]
    # The delta rule in chunks computes more than its recurrence, which is counted.
    most = 1.1 if found.config["model_type"] == "qwen3_5" else 1
    for run, planned in (
        (lambda: hidden_states(model, batch), forward),
        (lambda: hidden_states(model, batch).sum().backward(), forward + backward),
        (
            lambda: hidden_states(model, batch, True).sum().backward(),
            forward + backward + cost["recomputation"],
        ),
    ):
        assert planned <= measuring.flops(run) <= most * planned


@pytest.mark.parametrize("model", ["qwen3-vl-4b", "qwen3.5-4b"])
def test_operations_are_those_of_the_benchmarks(model):
    pytest.importorskip("torch")
    from benchmarks import arithmetic, workload

    config = workload.CONFIGS[model]()
    rows, columns = workload.grid(700)
    found, patches = shape_of(config.to_dict()), 4 * rows * columns
    seen = View(patches, len(found.tower) * patches**2, rows * columns, 700)
    cost = group_of(found, seen, 3, 33, recompute=True)
    both = cost["student forward"] + cost["student backward"]
    assert cost["student forward"] == arithmetic.trunk(config, 700, 33, 3)
    assert both == arithmetic.trunk(config, 700, 33, 3, backward=True)
    again = arithmetic.trunk(config, 700, 33, 3, backward=True, recompute=True)
    assert cost["recomputation"] == again - both


def test_frozen_weights_have_no_gradient():
    """Through them the gradient of their input alone; tokens mix as before."""
    found, seen = shape("Qwen3-VL-4B"), View(400, 24 * 400**2, 100, 164)
    adapters = AdapterOptions(rank=1, targets=("q_proj",))
    full, low = (
        group_of(found, seen, 2, 10, options=ModelOptions(SOURCE, tune_vision=False, adapters=one))
        for one in (None, adapters)
    )
    unread = found.text[-1].products - found.text[-1].cached
    weights = sum(one.products for one in found.text)
    products = 2.0 * (163 + 20) * weights - 2.0 * 163 * unread
    saved = full["student backward"] - low["student backward"]
    assert saved == pytest.approx(products, rel=1e-3)
    # Where all is trained the backward computes twice what the forward does, but for gradients of
    # patches.
    every = group_of(found, seen, 2, 10)
    patches = 2.0 * seen.patches * 3 * 16**2 * found.tower[0].width
    assert every["student backward"] == 2 * every["student forward"] - patches


@pytest.mark.parametrize(
    ("tokens", "teacher", "training"),
    [(128, (105, 20), (2340, 327)), (512, (130, 45), (2462, 449))],
)
def test_cost_of_one_group(tokens, teacher, training):
    """TFLOP of Qwen3-VL-4B with a prompt of 4096, a crop of 1024 and 8 completions, apart and
    shared, worked out by hand."""
    found, options = shape("Qwen3-VL-4B"), ModelOptions(SOURCE, "bfloat16")
    views = [
        View(patches, 24 * patches**2, patches // 4, patches // 4) for patches in (128**2, 64**2)
    ]
    shared = Work(1, 8, tokens, *views, 10**6)
    apart = replace(shared, completions=1)
    one, eight = (
        stages(Step(found, options, work, footprint(found), 0), True) for work in (apart, shared)
    )

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
    assert operations(eight, "head and divergence") == pytest.approx(
        4 * 2 * 8 * tokens * 151_936 * 2560 / 1e12, rel=1e-9
    )


def group(work):
    """As many tokens as `work` says, none of them a real one."""
    from opd.types import Completion, Group, Prompt, VisualTokens

    nothing = VisualTokens(
        np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4), np.float32)
    )
    prompts = [
        Prompt(np.zeros(view.tokens, np.int32), np.zeros((1, 1), np.int32), {}, "", nothing)
        for view in (work.student, work.teacher)
    ]
    one = Completion(np.zeros(work.tokens, np.int32), np.zeros(work.tokens, np.float32), False)
    return Group(*prompts, (one,) * work.completions, ())


@pytest.mark.parametrize(
    ("budget", "split"), [(700, 0), (132, 0), (131, 2), (122, 2), (121, 1), (1, 1)]
)
def test_a_step_is_cut_as_the_loop_cuts_it(budget, split):
    from opd.method import microbatch

    work = Work(20, 3, 10, View(400, 0, 100, 102), View(40, 0, 10, 12), budget, sample_budget=600)
    cut = microbatch.microbatches_of([group(work)] * 20, budget)
    assert [len(part) for part in cut] == [work.together] * (work.calls - 1) + [
        20 - work.together * (work.calls - 1)
    ]
    assert (
        work.split == split == microbatch.completions_at_once([group(work)] * len(cut[0]), budget)
    )
    rooms = microbatch.microbatches([(work.student.tokens, work.tokens)] * 20, 3, 600)
    assert work.sampled == len(rooms[0]) == 4
    assert (
        replace(work, budget=3 * work.group).together
        == replace(work, sample_budget=3 * work.sample).sampled
        == 3
    )
    assert replace(work, budget=work.longest + 2 * work.tokens).split == 2


@pytest.mark.parametrize("size", [(40, 40), (200, 150), (31, 90), (400, 64)])
def test_prompts_are_as_long_as_the_encoder_makes_them(family, size):
    from PIL import Image

    encoder, question = PromptEncoder(family), "What digit is on the red tile?"
    text = len(encoder.encode([], question))
    recipe = load("tiny", [f"model.path={family}"])
    planned = plan(recipe, devices.DEVICES["H200"], assumed=Assumed(size, (64, 48), text))
    kernels = [kernel for name, kernel in planned.shape.shapes.items() if len(kernel) > 3]
    found, values = planned.work, max(int(np.prod(kernel[1:])) for kernel in kernels)
    for seen, its, policy in (
        (found.student, size, "student"),
        (found.teacher, (64, 48), "teacher"),
    ):
        encoded = encoder.encode([Image.new("RGB", its, "red")], question, policy)
        assert seen.visual == len(encoded.visual.index)
        assert seen.tokens == len(encoded)
        assert encoded.images["pixel_values"].size == seen.patches * values


def test_bounds_on_pixels_count(random_model):
    recipe = load(
        "tiny",
        [f"model.path={random_model}", "model.max_pixels=20000", "model.teacher_min_pixels=10000"],
    )
    found = plan(recipe, devices.DEVICES["H200"], assumed=Assumed((200, 150), (31, 90), 20)).work
    assert 15_000 < found.student.patches * 8**2 <= 20_000
    assert found.teacher.patches * 8**2 >= 10_000


def test_windows_and_tiles_count_the_pairs_that_attend(tmp_path):
    pytest.importorskip("torch")
    # Windows of 2 x 2 merged patches in all blocks but the last; 6 x 4 patches, so the lower
    # windows are 2 x 4.
    folder = FAMILIES["qwen2_5_vl"](tmp_path / "windows")
    found, encoder = shape_of(read_config(folder)), PromptEncoder(folder)
    seen = view(encoder, found, (32, 48), 20)
    assert (seen.patches, seen.pairs) == (24, 2 * (16**2 + 8**2) + 24**2)
    folder = FAMILIES["smolvlm"](tmp_path / "tiles")
    found = shape_of(read_config(folder))
    seen = view(PromptEncoder(folder), found, (96, 96), 20)
    tiles = seen.patches // 16  # of 32 x 32 pixels, 4 x 4 patches
    assert tiles > 1
    assert seen.pairs == 2 * tiles * 16**2


def test_the_largest_step_fits_and_one_more_group_does_not(folder):
    recipe = load("paper", [f"model.path={folder}", "rollout.sample_tokens=1"])
    found = plan(recipe, devices.DEVICES["H200"], assumed=Assumed((1024, 768)))
    groups = found.largest // found.work.group
    assert 1 < groups < recipe.rollout.prompts
    assert found.sized(budget=groups * found.work.group).memory.peak <= found.usable
    assert found.sized(budget=(groups + 1) * found.work.group).memory.peak > found.usable


def test_kept_features_are_bounded_as_the_backends_bound_them(folder):
    recipe = load("lora", [f"model.path={folder}", "rollout.prompts=512"])
    small = replace(devices.DEVICES["RTX 4090"], memory=2 * 2**30)
    found = plan(recipe, small, assumed=Assumed((2048, 1536)))
    few = found.sized(prompts=4)
    said = report([few], "")["memory"]  # of 512 prompts it would search for the largest step long
    assert (
        said["kept_features_bound"]
        == said["held"]["kept image features"]
        == found.memory.held["kept image features"]
        == feature_bytes(small.memory)
        == 2**26
    )
    large = replace(found, device=devices.DEVICES["H200"])
    assert large.memory.held["kept image features"] > 2**26
    assert (
        replace(few, device=large.device).stages["student forward"].operations
        < few.stages["student forward"].operations
    )


def test_of_a_group_that_is_too_large_some_completions_fit(folder):
    recipe = load("lora", [f"model.path={folder}", "model.dtype=bfloat16"])
    wide = replace(devices.DEVICES["RTX 4090"], memory=18 * 2**30)
    found = plan(recipe, wide, assumed=Assumed((2048, 1536)))
    found = found.sized(tokens=4096)
    assert replace(found.work, budget=found.work.longest + found.work.tokens).split == 1
    assert found.work.longest < found.largest < found.work.group
    assert found.sized(budget=found.largest).memory.phases["accumulate"] <= found.usable


def test_what_to_change_where_nothing_fits(folder):
    recipe = load("paper", [f"model.path={folder}"])
    found = plan(recipe, devices.DEVICES["RTX 4090"], assumed=Assumed((1024, 768)))
    assert found.largest == 0
    changes = found.smaller()
    assert changes["model.tune=qlora"] < changes["model.tune=lora"] < found.usable
    # The weights alone are too large, so tokens are next to nothing of it.
    assert changes.get("rollout.max_tokens=512", found.least) > max(
        found.usable, 0.98 * found.least
    )
    peaks = []
    for tokens in (1, found.work.group):  # a completion at a time, or a group
        least = [f"rollout.microbatch_tokens={tokens}", "rollout.sample_tokens=1"]
        lora = load("paper", [f"model.path={folder}", "model.tune=lora", *least])
        peaks.append(plan(lora, found.device, assumed=Assumed((1024, 768))).memory.peak)
    assert changes["model.tune=lora"] == min(peaks)
    assert all(peak < found.least for peak in changes.values())


def test_only_families_that_bound_pixels_are_told_to(family):
    kind = read_config(family)["model_type"]
    found = plan(
        load("tiny", [f"model.path={family}"]), devices.DEVICES["H200"], assumed=Assumed((200, 150))
    )
    assert any("max_pixels" in change for change in found.smaller()) == (kind != "gemma3")


def run(*arguments):
    return CliRunner().invoke(
        main, ["plan", *(str(argument) for argument in arguments)], env={"COLUMNS": "80"}
    )


def test_json_is_one_object(folder):
    result = run(
        "paper",
        "--model",
        folder,
        "--device",
        "h200",
        "--image",
        "1024x768",
        "--completion-tokens",
        200,
        "--json",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["device"]["name"] == "H200"
    assert found["assumed"]["prompt_tokens"] == 64 + 2 + 768  # the image stands between two marks
    assert found["assumed"]["completion_tokens"] == 200
    assert found["memory"]["peak"] == max(found["memory"]["phases"].values())
    assert found["seconds"] == pytest.approx(
        sum(stage["seconds"] for stage in found["stages"].values())
    )
    assert [one["name"] for one in found["devices"]] == [
        "H200",
        *(name for name in devices.DEVICES if name != "H200"),
    ]
    assert found["hours"] == pytest.approx(found["steps"] * found["seconds"] / 3600)
    assert found["shorter"]["hours"] < found["hours"]
    assert set(found["memory"]["rough"]) < set(found["memory"]["parts"])
    assert found["measured"] is None


@pytest.mark.parametrize("device", ["RTX 4090", "M4 Max"])
def test_tables_fit_into_80_columns(folder, device):
    result = run("paper", "--model", folder, "--device", device, "--image", "4000x3000")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines[1:]) <= 80
    assert "not even one prompt" in result.stdout
    for words in (
        "vision tower",
        "optimizer moments",
        "peak of accumulate",
        "rollout decode",
        "RTX 4090",
        "40% of peak TFLOP/s",
    ):
        assert any(line.strip().startswith(words) or words in line for line in lines), words


def test_nothing_is_cut_from_the_tables_of_the_embedded_model():
    """Its seconds and hours have the most zeros."""
    result = run()
    assert result.exit_code == 0, result.output
    assert "from 16 GB" in result.stdout
    assert "…" not in result.stdout


def test_tables_of_every_family_fit_into_80_columns(family):
    result = run(
        "tiny",
        "--model",
        family,
        "--set",
        "rollout.microbatch_tokens=64",
        "--set",
        "model.tune=lora",
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines[1:]) <= 80
    assert re.search(r"[0-9] completions? at a time", result.stdout)
    assert [line for line in lines if line.startswith("taken: ")] == [
        (
            f"taken: {devices.HERE_MATMUL_SHARE:.0%} of peak TFLOP/s,"
            f" {devices.HERE_BANDWIDTH_SHARE:.0%} of peak GB/s (this machine)"
        ),
        "taken: 40% of peak TFLOP/s, 70% of peak GB/s (all others)",
    ]


def test_this_machine_is_measured_within_a_second(backend_name):
    found = devices.this_machine(registry.planner(backend_name).machine())
    assert 1e9 < found.matmul["float32"] < 1e15
    assert 1e9 < found.bandwidth < 1e13


def test_seconds_are_of_the_slower_of_computing_and_moving_and_of_the_passes_between():
    fast = devices.Device("x", {"float32": 1e12}, 1e9, 1e12, 1.0, "cpu", "", 0.4, 0.7)
    found = plan(load("tiny"), fast)
    stage, seconds = found.stages["rollout decode"], found.seconds["rollout decode"]
    assert seconds == pytest.approx(
        max(stage.operations / 0.4e12, stage.moved / 0.7e9) + stage.passed / 0.7e9
    )
    moved = replace(fast, bandwidth=1e6)
    assert replace(found, device=moved).seconds["rollout decode"] == pytest.approx(
        (stage.moved + stage.passed) / 0.7e6
    )


def test_passes_follow_what_is_kept_and_trained():
    found = plan(load("tiny"), devices.DEVICES["H200"])
    twice = found.sized(prompts=2 * found.work.prompts).stages
    for name, stage in found.stages.items():
        assert twice[name].passed == stage.passed * (
            1 if name in ("optimizer", "teacher's average") else 2
        )
    trained = sum(found.shape.trained(found.options).values())
    # two are read, one is written
    assert found.stages["teacher's average"].passed == 3 * 4 * trained
    assert found.stages["recomputation"].passed == 0
    frozen = replace(found, options=replace(found.options, tune_vision=False)).stages
    assert frozen["student backward"].passed < found.stages["student backward"].passed


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--device", "M4 Mox"], "--device 'M4 Mox': no such device; did you mean 'M4 Max'?"),
        ({}, ["--measure"], "--measure runs on this machine, not on a H200; leave out --device"),
        ({}, ["--model", "nowhere"], "model 'nowhere': no such folder"),
        (
            {"model_type": "llava"},
            [],
            "model_type 'llava' is not supported; supported: gemma3, idefics3, qwen2_5_vl, qwen3_5",
        ),
        ({"vision_config": 3}, [], "config.json cannot be used: "),
        ({}, ["--image", "huge"], "--image huge: write it as WIDTHxHEIGHT"),
        ({}, ["--image", "9000x9"], "images of 9000 x 9 pixels cannot be encoded"),
        ({}, ["--backend", "cudo"], "unknown backend 'cudo'; known: auto, mlx, cuda, cpu"),
        (
            {},
            ["--set", "model.tune=lora", "--set", "model.targets=['qproj']"],
            # in training's words
            "model.targets: the language model has no linear layer 'qproj'; did you mean 'q_proj'?",
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


GB = 10**9


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("M4 Max", None, 128),
        ("m4 max 64 GB", None, 64),
        ("M4 Max", 36, 36),
        ("A100 40GB", None, 42.95),
        ("RTX 3090", 48, 48),
    ],
)
def test_a_device_has_the_memory_that_is_named(name, memory, found):
    assert devices.device(name, None, memory).memory == found * GB


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Apple M3 Pro", "M3 Pro"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
    ],
)
def test_this_machines_own_device_is_recognised(name, known):
    found = devices.this_machine(Machine(name, 7e9, 0.5, True, None))
    assert (found.name, found.memory, found.usable) == (devices.HERE, 7e9, 0.5)
    assert (found.matmul, found.bandwidth) == (
        devices.DEVICES[known].matmul,
        devices.DEVICES[known].bandwidth,
    )
    assert name in found.source


def test_a_device_that_nobody_knows_is_measured():
    calls = []

    def product(rows, side, dtype):
        return lambda: calls.append((rows, dtype))

    found = devices.this_machine(
        Machine("NVIDIA GeForce RTX 4090 Laptop GPU", 7e9, 0.5, True, product)
    )
    assert {dtype for _, dtype in calls} == {"float32", "bfloat16"}
    assert found.source == "NVIDIA GeForce RTX 4090 Laptop GPU, measured in float32 and bfloat16"


def test_devices_of_a_backend_that_is_not_here_are_left_out(folder, monkeypatch):
    """Whatever else is planned; naming one says in one line what is missing."""
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "mlx" else object())
    found = everywhere(
        plan(load("paper", [f"model.path={folder}"]), devices.DEVICES["H200"]),
        list(devices.DEVICES.values()),
    )
    assert {one.backend for one in found} == {"cuda"}
    assert "backend 'mlx' needs mlx, which is not installed" in found[0].notes[-1]
    said = run("paper", "--model", folder, "--device", "M4 Max").stderr.splitlines()
    assert len(said) == 1
    assert "needs mlx, which is not installed" in said[0]


def test_what_shortens_a_run_most_trains_the_same(folder):
    found = plan(
        load("paper", [f"model.path={folder}"]),
        devices.DEVICES["H200"],
        assumed=Assumed((2048, 1536), None, None, 64),
    )
    name, hours = found.shorter()
    assert name.startswith("model.max_pixels=")
    assert hours < 0.7 * found.hours
    assert hours == min(one.hours for key, one in found.changes.items() if "tune" not in key)


def test_a_micro_batch_is_measured_beside_the_plan(family, backend_name):
    """With random weights, of whatever family; those of its folder are not read."""
    sizes = [
        "rollout.prompts=3",
        "rollout.completions=2",
        "rollout.max_tokens=4",
        "rollout.microbatch_tokens=1",
    ]
    recipe = load("tiny", [f"model.path={family}", *sizes])
    device = devices.this_machine(Machine("M1", 1e12, 1.0, False, None))
    found = measure(plan(recipe, device, backend_name, Assumed((64, 64), (32, 32))))
    assert found.seconds.keys() == found.planned_seconds.keys() == MEASURED.keys()
    assert all(
        seconds > 0 for seconds in (*found.seconds.values(), *found.planned_seconds.values())
    )
    assert found.planned_peak > 0
    if backend_name == "mlx":
        assert found.peak > 0


def test_measured_seconds_are_those_of_all_calls():
    """Of 20 prompts 4 are sampled together, and 3 are differentiated."""
    seen = View(400, 0, 100, 102)
    work = Work(20, 3, 10, seen, seen, budget=400, sample_budget=600)
    assert (work.sampled, work.together) == (4, 3)
    assert repeats(work, 6) == {"rollout": 5 / 2, "accumulate": 7 / 2, "apply": 1}
    assert set(repeats(work, 20).values()) == {1}


def test_what_is_too_large_is_not_measured(folder):
    found = plan(
        load("paper", [f"model.path={folder}"]), replace(devices.DEVICES["RTX 4090"]), "cpu"
    )
    with pytest.raises(RecipeError, match="GB are planned and"):
        measure(found)


def test_help_has_examples():
    assert len(re.findall(r"^ +opd plan", run("--help").stdout, flags=re.MULTILINE)) >= 3


def test_several_pictures_of_the_teacher_are_planned_as_one_of_their_pixels():
    found = plan(load("tiny", ["view.kind='several'"]), devices.DEVICES["H200"])
    seen = found.work.student.size, found.work.teacher.size
    assert seen == ((128, 128), (128, 128 + 48 * 48 // 128))
    assert "the teacher's 2 pictures of a row are planned as one of as many pixels" in found.notes
