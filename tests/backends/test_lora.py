"""Low-rank adapters on every backend, against peft's own forward, against each other, and on
disk."""

from __future__ import annotations

import gc
import importlib
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from opd import registry
from opd.errors import ModelError, RecipeError
from opd.models import peft_files
from opd.models.choice import ModelChoice
from opd.objective import Objective
from opd.testing.conformance import check, relative_error
from opd.types import AdapterOptions, ModelOptions, Sampling, Update
from opd_cli import main
from tests.conftest import BACKENDS, INSTALLED, twin_of
from tests.support.adapter_cases import (
    OPTIONS,
    language_layers,
    logprobs_of,
    loss_of,
    make_case,
    peft_model,
    write_adapter,
)
from tests.support.cases import watch
from tests.support.random_models import qwen3_vl

JSD = Objective(alpha=0.5, top_k=20)
VISION = {"model.visual.blocks.1.attn.qkv": (96, 32), "model.visual.merger.linear_fc2": (48, 128)}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return make_case(root, qwen3_vl(root / "model", seed=3))


def fresh(seed=0, layers=None, **options):
    model = ModelOptions(None, adapters=AdapterOptions(seed=seed, **options))
    return peft_files.initial_adapters(
        model, layers or {**language_layers(), **VISION, "lm_head": (350, 48)}
    )


def test_fresh_adapters_are_pefts():
    """A is uniform within 1 / sqrt(in), each of its own stream, and B is zero."""
    found = fresh(rank=64)
    assert {name.rpartition(".lora_")[0] for name in found} == set(language_layers())
    drawn = [
        value * np.sqrt(value.shape[1])
        for name, value in found.items()
        if name.endswith("A.weight")
    ]
    assert all(
        np.abs(value).max() <= 1 and abs(value.mean()) < 0.05 and abs(value.var() - 1 / 3) < 0.02
        for value in drawn
    )
    correlations = np.corrcoef([value.ravel()[:3000] for value in drawn])
    assert np.abs(correlations - np.eye(len(drawn))).max() < 0.1
    assert not any(value.any() for name, value in found.items() if name.endswith("B.weight"))
    again, other = fresh(rank=64), fresh(seed=1, rank=64)
    assert all(np.array_equal(value, again[name]) for name, value in found.items())
    assert not any(
        np.array_equal(value, other[name])
        for name, value in found.items()
        if name.endswith("A.weight")
    )


def test_what_gets_an_adapter():
    def layers(**options):
        return {name.rpartition(".lora_")[0] for name in fresh(**options)}

    language = set(language_layers())
    assert layers(targets=("q_proj",)) == {name for name in language if name.endswith("q_proj")}
    assert layers(vision=True) == language | {"model.visual.blocks.1.attn.qkv"}
    assert layers(projector=True) == language | {"model.visual.merger.linear_fc2"}
    with pytest.raises(
        RecipeError,
        match=(
            r"model\.targets: the language model has no linear layer 'qproj'; did you mean 'q_proj'"
        ),
    ):
        layers(targets=("qproj",))


@pytest.mark.parametrize(
    "options",
    [
        AdapterOptions(),
        AdapterOptions(rank=2, targets=("q_proj", "k_proj"), vision=True, projector=True, seed=5),
    ],
)
def test_every_backend_begins_alike(case, options):
    made = [
        registry.load(name, ModelOptions(case.folder, tune_vision=False, adapters=options))
        for name in INSTALLED
    ]
    for backend in made:
        student = backend.tensors("student")
        assert student.keys() == made[0].tensors("student").keys()
        assert all(
            np.array_equal(value, made[0].tensors("student")[name])
            for name, value in student.items()
        )
        assert all(
            np.array_equal(value, student[name])
            for name, value in backend.tensors("teacher").items()
        )
    assert (
        any(part in name for part in ("visual.blocks.2.mlp", "deepstack") for name in student)
        == options.vision
    )


def test_an_adapter_that_is_zero_changes_nothing(case, backend_name):
    plain = registry.load(backend_name, ModelOptions(case.folder))
    adapted = registry.load(
        backend_name, ModelOptions(case.folder, tune_vision=False, adapters=OPTIONS)
    )
    np.testing.assert_allclose(
        logprobs_of(adapted, case.groups, JSD), logprobs_of(plain, case.groups, JSD), atol=2e-6
    )


@pytest.mark.slow
def test_conformance(case, backend_name, tmp_path):
    """From an adapter that says something, so that both its sides have a gradient."""
    folder = write_adapter(tmp_path / "adapter", case.folder, {**language_layers(), **VISION})
    pairs = [(group.student, group.teacher) for group in case.groups]
    loaded = twin_of(backend_name).opened(case.options(adapter=folder))
    results = check(loaded.backend, pairs, (336,), (339, 340, 342, 343))
    assert [str(result) for result in results if not result.passed] == []


class PeftCase:
    """For `tests.support.torch_cases`: the policies as stock transformers under peft's own
    layers."""

    def __init__(self, case):
        self.case = case

    def stock(self, policy="student"):
        return peft_model(
            self.case.folder, self.case.adapter if policy == "student" else self.case.other
        )


@pytest.mark.parametrize("objective", [JSD, Objective(alpha=0.3, top_k=None, temperature=1.3)])
def test_loss_and_gradient_equal_pefts_on_separate_rows(case, backend_name, objective):
    torch_cases = pytest.importorskip("tests.support.torch_cases")
    dtype, value, gradient = (
        ("float64", 1e-7, 1e-6) if backend_name == "cpu" else ("float32", 1e-5, 1e-4)
    )
    backend = case.backend(backend_name, dtype)
    loss, gradients = torch_cases.plain_loss_and_gradients(PeftCase(case), case.groups, objective)
    assert abs(
        loss_of(case.groups, backend.accumulate(case.groups, objective)) - loss
    ) < value * abs(loss)
    expected = {
        name.removeprefix("base_model.model.").replace(".default.", "."): grad
        for name, grad in gradients.items()
    }
    assert min(np.abs(grad).max() for grad in expected.values()) > 0
    assert relative_error(backend.tensors("gradient"), expected) < gradient


@pytest.mark.skipif(len(INSTALLED) < 2, reason="needs both backends")
@pytest.mark.parametrize("vision", [False, True])
def test_parity(case, tmp_path, vision):
    """MLX against torch: gradients by name, losses of ten steps, and where the parameters end."""
    folder = write_adapter(
        tmp_path / "adapter", case.folder, {**language_layers(), **(VISION if vision else {})}
    )
    both = [registry.load(name, case.options(adapter=folder)) for name in ("cpu", "mlx")]
    for backend in both:
        backend.accumulate(case.groups, JSD)
    gradients = [backend.tensors("gradient") for backend in both]
    assert relative_error(gradients[1], gradients[0]) < 1e-4
    start, losses = both[0].tensors("student"), []
    for backend in both:
        backend.apply(Update(0.0))
        losses.append([])
        for _ in range(10):
            losses[-1].append(loss_of(case.groups, backend.accumulate(case.groups, JSD)))
            assert backend.apply(Update(3e-3, weight_decay=0.01)).taken
            backend.move_teacher(0.05)
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]
    for kind in ("student", "teacher"):
        moved, expected = (
            {name: value - start[name] for name, value in backend.tensors(kind).items()}
            for backend in both[::-1]
        )
        assert relative_error(moved, expected) < 0.02


@pytest.mark.parametrize("name", INSTALLED)
def test_checkpoints_cross(case, name, tmp_path):
    writer, reader = (
        case.backend(name),
        case.backend(INSTALLED[1 - INSTALLED.index(name)] if len(INSTALLED) > 1 else name),
    )
    writer.accumulate(case.groups, JSD)
    writer.apply(Update(1e-2))
    writer.save(tmp_path)
    reader.load(tmp_path)
    for kind in ("student", "teacher"):
        found, expected = reader.tensors(kind), writer.tensors(kind)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(value, expected[key]) for key, value in found.items())
    for backend in (writer, reader):
        backend.accumulate(case.groups, JSD)
        backend.apply(Update(1e-2))
    assert relative_error(reader.tensors("student"), writer.tensors("student")) < 1e-4


def test_a_frozen_head_has_no_gradient(kernel):
    """All else is the same to the bit."""
    rng = np.random.default_rng(0)
    hidden, heads, other = (
        rng.normal(size=(2, 9, 4)),
        rng.normal(size=(2, 37, 4)),
        rng.uniform(0.1, 1, size=9),
    )
    arrays = hidden[0], heads[0], hidden[1], heads[1], rng.integers(0, 37, 9), -other, other
    trained, frozen = (kernel(*arrays, JSD, chunk=4, train_head=train) for train in (True, False))
    assert trained.keys() - frozen.keys() == {"head_gradient"}
    assert all(np.array_equal(value, trained[name]) for name, value in frozen.items())


def test_the_head_of_a_lora_run_is_one_and_frozen(case, backend_name, monkeypatch):
    module = importlib.import_module(f"{BACKENDS[backend_name]}.gradient")
    seen, kernel = [], module.divergence_head

    def watched(*arguments, **options):
        result = kernel(*arguments, **options)
        seen.append((result.head_gradient, arguments[1] is arguments[3]))
        return result

    monkeypatch.setattr(module, "divergence_head", watched)
    case.backend(backend_name).accumulate(case.groups, JSD)
    assert seen == [(None, True)]


def test_the_policies_share_the_base_on_torch(case):
    pytest.importorskip("torch")
    from opd_torch.model import copy_model

    model = twin_of("cpu").opened(case.options("bfloat16")).model
    student, teacher = (dict(one.module.named_parameters()) for one in (model, copy_model(model)))
    own = {name for name, value in student.items() if value.data_ptr() != teacher[name].data_ptr()}
    assert own == {name for name in student if ".lora_" in name}
    assert {str(student[name].dtype) for name in student.keys() - own} == {"torch.bfloat16"}
    assert {str(student[name].dtype) for name in own} == {"torch.float32"}


def test_the_policies_share_the_base_on_mlx(case):
    """What is allocated beside the base in its compute dtype is four copies of the adapter
    (student, teacher, two moments)."""
    mx = pytest.importorskip("mlx.core")
    from opd_mlx.backend import MlxBackend
    from opd_mlx.device import this_device
    from opd_mlx.model import load_model

    gc.collect()  # of other tests
    mx.synchronize()  # a stream lets go of arrays in a thread of its own
    before, options = mx.get_active_memory(), case.options("bfloat16")
    model, student = load_model(options, this_device())
    backend = MlxBackend(options, model, student)
    backend.accumulate(case.groups, JSD)
    backend.apply(Update(1e-3))
    backend.move_teacher(0.5)
    gc.collect()
    mx.synchronize()
    held = mx.get_active_memory() - before
    base = 2 * sum(value.size for value in load_file(case.folder / "model.safetensors").values())
    adapter = 4 * sum(value.size for value in backend.tensors("student").values())
    features = model.feature_cache.nbytes
    assert (
        base + 4 * adapter <= held < 1.3 * (base + 4 * adapter + features) < 2 * base + 4 * adapter
    )


@pytest.mark.parametrize("vision", [False, True])
def test_a_frozen_towers_features_are_computed_once(
    case, backend_name, tmp_path, monkeypatch, vision
):
    """For rollout, both policies and scoring together; with an adapter in the tower, rollout and
    gradient share the student's alone."""
    folder = write_adapter(
        tmp_path / "adapter", case.folder, {**language_layers(), **(VISION if vision else {})}
    )
    counted = []
    name = f"{BACKENDS[backend_name]}.families.qwen3_vl.Qwen3VL.features"
    count = lambda _, __, prompts, *___: counted.extend(prompt.key for prompt in prompts)
    watch(monkeypatch, name, count)
    backend = registry.load(backend_name, case.options(adapter=folder))
    prompts = [group.student for group in case.groups]
    prefill = backend.prefill(prompts)
    backend.sample(prompts, np.full((3, 1, 2), 0.5, np.float32), Sampling(), prefill=prefill)
    backend.accumulate(case.groups, JSD, 0, prefill)
    backend.score(case.groups, JSD)
    assert len(set(counted)) == 3
    assert len(counted) == (12 if vision else 3)


def half_precision(source, folder):
    """The checkpoint in bfloat16."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = {
        name: value.to(torch.bfloat16)
        for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_ten_small_steps_move_a_bfloat16_model(case, backend_name, tmp_path, tune):
    """At lr 2e-6 a bfloat16 weight of 0.02, whose spacing is 1.2e-4, would never move: ten steps of
    Adam move its master by 2e-5."""
    folder = half_precision(case.folder, tmp_path / "half")
    lora = {"adapters": OPTIONS, "adapter": case.adapter}
    backend = registry.load(
        backend_name, ModelOptions(folder, "bfloat16", False, **(lora if tune == "lora" else {}))
    )
    start = backend.tensors("student")
    for _ in range(10):
        backend.accumulate(case.groups, JSD)
        assert backend.apply(Update(2e-6)).taken
        backend.move_teacher(0.5)
    moved, followed = (
        np.concatenate(
            [
                np.abs(value - start[name]).ravel()
                for name, value in backend.tensors(kind).items()
                if "embed" not in name
            ]
        )
        for kind in ("student", "teacher")
    )
    assert 1.2e-5 < np.median(moved) < 2.1e-5
    assert 0.8e-5 < np.median(followed) < np.median(moved)


def trained(case, name, **options):
    """A backend whose fresh adapters were trained until they say something."""
    backend = registry.load(name, case.options(adapter=None, **options))
    for _ in range(5):
        backend.accumulate(case.groups, JSD)
        backend.apply(Update(2e-2))
        backend.move_teacher(0.05)
    return backend


def logits(model, case):
    """Logits of all tokens of all groups, by a model of stock transformers in float64."""
    torch_cases = pytest.importorskip("tests.support.torch_cases")
    import torch

    with torch.no_grad():
        rows = [
            torch_cases.stock_logits(model, group.student, one.tokens).numpy()
            for group in case.groups
            for one in group.completions
        ]
    return np.concatenate(rows)


def transformers_model(folder):
    import torch
    import transformers

    model, found = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not any(
        found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    return model


@pytest.mark.parametrize("vision", [False, True])
def test_exports_load_elsewhere(case, backend_name, tmp_path, vision):
    """The adapter in peft, the merged model in transformers and mlx-vlm, both in every backend: all
    say what the trained one says."""
    pytest.importorskip("torch")
    options = AdapterOptions(rank=3, alpha=9.0, vision=vision, projector=vision)
    backend = trained(case, backend_name, adapters=options)
    backend.export(tmp_path / "adapter", "adapter")
    backend.export(tmp_path / "model", "model")
    merged = logits(transformers_model(tmp_path / "model"), case)
    np.testing.assert_allclose(
        logits(peft_model(case.folder, tmp_path / "adapter"), case), merged, atol=1e-4
    )
    assert np.abs(merged - logits(transformers_model(case.folder), case)).max() > 0.1
    tokens = np.concatenate([one.tokens for group in case.groups for one in group.completions])
    expected = merged[range(len(tokens)), tokens] - np.log(np.exp(merged).sum(-1))
    found = {"trained": backend}
    for name in INSTALLED:
        found[f"{name}, merged"] = registry.load(name, ModelOptions(tmp_path / "model"))
        found[f"{name}, adapter"] = registry.load(
            name, case.options(adapters=options, adapter=tmp_path / "adapter")
        )
        found[f"{name}, adapter merged"] = registry.load(
            name, ModelOptions(case.folder, adapter=tmp_path / "adapter")
        )
    for name, one in found.items():
        np.testing.assert_allclose(
            logprobs_of(one, case.groups, JSD), expected, atol=1e-4, err_msg=name
        )
    if "mlx" in INSTALLED:
        from mlx_vlm.utils import load_model

        from tests.support.mlx_cases import stock_logits

        model, group = load_model(tmp_path / "model"), case.groups[0]
        rows = [
            np.array(stock_logits(model, group.student, one.tokens)) for one in group.completions
        ]
        np.testing.assert_allclose(
            np.concatenate(rows), merged[: sum(map(len, group.completions))], atol=1e-4
        )


def test_export_merges_in_float32_and_keeps_the_stored_precision(case, backend_name, tmp_path):
    """Rounded once, at the end: to the bit what numpy's float64 gives, but for ties of float32."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    folder = half_precision(case.folder, tmp_path / "half")
    backend = registry.load(
        backend_name, ModelOptions(folder, "bfloat16", False, OPTIONS, case.adapter)
    )
    backend.export(tmp_path / "out", "model")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    tensors = backend.tensors("student")
    assert before.keys() == after.keys()
    for name, value in after.items():
        layer = name.removesuffix(".weight")
        assert value.dtype == torch.bfloat16
        expected = before[name].double()
        if f"{layer}.lora_A.weight" in tensors:
            b, a = (
                torch.from_numpy(tensors[f"{layer}.lora_{side}.weight"]).double() for side in "BA"
            )
            expected = expected + 3.0 * b @ a
        assert (value != expected.bfloat16()).double().mean() < 1e-3


def test_a_frozen_tower_keeps_what_was_merged_into_it(case, backend_name, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", case.folder, VISION)
    registry.load(
        backend_name, ModelOptions(case.folder, tune_vision=False, adapter=adapter)
    ).export(tmp_path / "out", "model")
    before, after = (
        load_file(path / "model.safetensors") for path in (case.folder, tmp_path / "out")
    )
    changed = {name for name, value in after.items() if not np.array_equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in VISION}


def config_with(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: config_with(folder, use_dora=True),
            "use_dora = true is not supported; only plain LoRA is",
        ),
        (
            lambda folder: config_with(folder, rank_pattern={"q_proj": 2}),
            'rank_pattern = {"q_proj": 2} is not supported',
        ),
        (lambda folder: config_with(folder, peft_type="IA3"), "describes no LoRA adapter"),
        (
            lambda folder: config_with(folder, r=5),
            "its tensors are not of rank 5, as adapter_config.json says",
        ),
        (lambda folder: config_with(folder, r=None), "r and lora_alpha are not both numbers"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"half"),
            "cannot be read as an adapter's tensors",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "cannot be read as an adapter's tensors",
        ),
        (
            lambda folder: write_adapter(
                folder, folder, {"model.language_model.layers.9.mlp.up_proj": (64, 48)}
            ),
            "no linear layer model",
        ),
        (
            lambda folder: write_adapter(
                folder, folder, {"model.language_model.layers.0.mlp.up_proj": (64, 40)}
            ),
            "is [64, 48] there",
        ),
    ],
)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_an_adapter_that_cannot_be_used(case, backend_name, tmp_path, change, message, tune):
    folder = write_adapter(tmp_path / "adapter", case.folder, language_layers())
    change(folder)
    with pytest.raises(ModelError) as error:
        registry.load(
            backend_name,
            ModelOptions(
                case.folder,
                adapters=peft_files.options_of(folder) if tune == "lora" else None,
                adapter=folder,
            ),
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def opd(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


def test_a_run_leaves_an_adapter_that_model_takes(backend_name, tmp_path):
    """From the embedded model, on from its adapter, and measured with the adapter merged; the base
    is found from the adapter alone."""
    fast = (
        "--set measure.count=4 --set rollout.prompts=2 --set rollout.max_tokens=4 "
        "--set run.checkpoint_every=1"
    ).split()
    lora = [
        *(
            "--set model.tune=lora --set model.vision=false --set model.rank=4 "
            f"--backend {backend_name}"
        ).split(),
        *fast,
    ]
    result = opd("train", *lora, "--steps", 2, "--out", tmp_path / "first")
    assert f"adapter: {tmp_path / 'first/adapter'}" in result.stdout
    assert not (tmp_path / "first/model").exists()
    first = peft_files.read(tmp_path / "first/adapter")
    assert first.rank == 4
    assert any(value.any() for name, value in first.tensors.items() if name.endswith("B.weight"))

    more = [*lora, "--set", "model.rank=8", "--set", "optimizer.learning_rate=1e-9"]
    opd("train", *more, "--model", tmp_path / "first", "--steps", 1, "--out", tmp_path / "second")
    second = peft_files.read(tmp_path / "second/adapter")
    assert second.rank == 4  # the adapter's own
    assert all(
        np.abs(value - first.tensors[name]).max() < 1e-7 for name, value in second.tensors.items()
    )

    before, after = (
        [
            json.loads(line)["full"]
            for line in (tmp_path / "second/answers.jsonl").read_text().splitlines()
            if when in line
        ]
        for when in ('"before"', '"after"')
    )
    assert before == after
    shutil.move(tmp_path / "second/adapter", tmp_path / "alone")
    config = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/elsewhere/opd/tiny/model"
    (tmp_path / "alone/adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path / "first", tmp_path / "alone"):
        answered = json.loads(
            opd("sample", "--model", path, "--backend", backend_name, "--count", 4, "--json").stdout
        )["answers"]
        assert [one["full"] for one in answered] == before


def test_an_adapter_without_its_base(case, tmp_path):
    folder = write_adapter(tmp_path / "adapter", tmp_path / "gone", language_layers())
    with pytest.raises(
        ModelError,
        match=r"adapter' is an adapter, and its base is not here: model '.*gone': no such folder",
    ):
        ModelChoice(path=str(folder)).options()


def test_the_seed_of_the_run_draws_the_adapters(case):
    options = [
        ModelChoice(path=str(case.folder), tune="lora", rank=2, vision=False).options(seed).adapters
        for seed in (0, 7)
    ]
    assert options == [AdapterOptions(rank=2, alpha=64.0, seed=seed) for seed in (0, 7)]
