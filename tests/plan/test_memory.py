"""The memory of `opd plan` against what both backends allocate, for models of every family."""

from __future__ import annotations

import gc
import importlib
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from opd import registry
from opd.method import microbatch
from opd.models.shape import Shape
from opd.objective import Objective
from opd.plan import read_config, view
from opd.plan.memory import KEPT_FEATURES, memory
from opd.plan.work import Step, View, Work
from opd.prompts.encoder import PromptEncoder
from opd.types import AdapterOptions, Completion, Group, ModelOptions, Sampling, Update
from tests.plan.test_plan import PUBLISHED, SOURCE
from tests.support import random_models

LINEAR = random_models.LINEAR
TOWER = {"hidden_size": 128, "intermediate_size": 512}
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DELTA = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
MIDDLE = {
    "qwen2_5_vl": {"text": {**TEXT, "num_attention_heads": 8}, "vision": TOWER},
    "qwen3_5": {
        "text": {
            **TEXT,
            **DELTA,
            "head_dim": 64,
            "layer_types": [LINEAR, LINEAR, "full_attention"] * 2,
        },
        "vision": TOWER,
    },
    "gemma3": {
        "text": {
            **TEXT,
            "head_dim": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
        "vision": TOWER,
    },
    "smolvlm": {"text": {**TEXT, "head_dim": 64}, "vision": TOWER},
}
"""Six million parameters; activations of rows of some length are most of what a step takes."""

WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
BIG = {
    "qwen3_5": {
        "text": {
            **WIDE,
            "head_dim": 64,
            "layer_types": [LINEAR, LINEAR, LINEAR, "full_attention"] * 2,
            **DELTA,
        }
    },
    "gemma3": {
        "text": {**WIDE, "head_dim": 64, "layer_types": ["sliding_attention", "full_attention"] * 4}
    },
    "qwen2_5_vl": {"text": WIDE},
    "smolvlm": {"text": {**WIDE, "head_dim": 64}},
}
"""More than 100 million parameters, which are most of what a step takes."""

QWEN3_VL = {
    "hidden": 1024,
    "layers": 8,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 64,
    "mlp": 3072,
    "vision_hidden": 256,
    "vision_mlp": 1024,
}
SMALLER = {
    **QWEN3_VL,
    "hidden": 256,
    "layers": 6,
    "heads": 4,
    "kv_heads": 2,
    "mlp": 768,
    "vision_hidden": 128,
    "vision_mlp": 512,
}


class Measured:
    """One group on a backend of random weights, what it allocates, and the plan of the same."""

    def __init__(
        self, name, folder, question, image, crop, n, length, adapters=None, dtype="float32"
    ):
        encoder = self.planned(name, folder, question, image, crop, n, length, adapters, dtype)
        # Apart from the tested one, so that nothing a call left behind is counted.
        self.backend = registry.load(name, self.options)
        self.module = importlib.import_module(
            "opd_mlx.backend" if name == "mlx" else "opd_torch.backend"
        )
        self.backend.move_teacher(0.5)
        rng = np.random.default_rng(0)
        completion = [
            Completion(
                rng.integers(0, 250, length).astype(np.int32),
                np.full(length, -5, np.float32),
                False,
            )
            for _ in range(n)
        ]
        weights = tuple(np.full(length, 0.01, np.float32) for _ in range(n))

        def prompt(size, question):
            return encoder.encode(
                [Image.fromarray(rng.integers(0, 255, (*size[::-1], 3)).astype(np.uint8))], question
            )

        self.group = Group(
            prompt(image, question), prompt(crop, question), tuple(completion), weights
        )
        self.short = prompt((16, 16), "?")
        self.uniforms = np.full((1, n, length), 0.5, np.float32)

    def planned(self, name, folder, question, image, crop, n, length, adapters, dtype):
        """The plan's own numbers, and the encoder."""
        self.name = name
        config, planner = read_config(folder), registry.planner(name)
        self.shape = Shape(config, planner.parameters(config))
        self.options = ModelOptions(folder, dtype, adapters is None, adapters)
        encoder = PromptEncoder(folder)
        text = len(encoder.encode([], question))
        seen = [view(encoder, self.shape, size, text) for size in (image, crop)]
        one = Work(2, n, length, *seen, budget=0)
        self.work = replace(one, budget=one.group)  # two micro-batches of one group
        self.rough = planner.footprint(self.options, config, here=True)
        return encoder

    def plan(self, checkpointed):
        return memory(self.step(self.options), checkpointed)

    def step(self, options):
        return Step(self.shape, options, self.work, self.rough, 2**30)

    def peak(self, run):
        """Largest number of bytes allocated in a call above those before it."""
        gc.collect()  # else what an earlier test left is freed meanwhile, and the peak looks lower
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
        events = [
            event
            for event in profiler.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        return int(
            np.cumsum(
                [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
            ).max(initial=0)
        )

    def rollout(self):
        """With the prompts' pass held for the gradient, where the backend holds it."""
        prompts = [self.group.student]

        def run():
            prefill = self.backend.prefill(prompts)
            self.backend.sample(prompts, self.uniforms, Sampling(), prefill=prefill)

        return self.peak(run)

    def accumulate(self, checkpointed):
        """Above what is held: the second micro-batch, and the gradient of the first."""
        bound = 0 if checkpointed else 2**60
        self.backend = registry.load(self.name, replace(self.options, checkpoint_above=bound))
        self.backend.move_teacher(0.5)
        # Whatever the first micro-batch was, its gradient is as large; so it is a short one.
        first = Group(self.short, self.short, self.group.completions[:1], self.group.weights[:1])
        self.backend.accumulate([first], Objective(top_k=100))
        gradient = 4 * sum(self.shape.trained(self.options).values())
        return gradient + self.peak(
            lambda: self.backend.accumulate([self.group], Objective(top_k=100))
        )

    def apply(self):
        """Above what is held: the second step, since the first makes the moments."""
        for _ in range(2):
            self.backend.accumulate([self.group], Objective(top_k=100))
            found = self.peak(
                lambda: self.backend.apply(Update(1e-3, weight_decay=0.1, gradient_clip=1e-3))
            )
        moved = self.peak(lambda: self.backend.move_teacher(0.5))
        return 4 * sum(self.shape.trained(self.options).values()) + found, moved


def agree(measured, plan, phase, alone=0.1):
    """Within 8 % of all that is allocated, and within `alone` of what the phase itself
    allocates."""
    held = sum(plan.held.values())
    assert plan.phases[phase] == pytest.approx(held + measured, rel=0.08)
    assert plan.phases[phase] - held == pytest.approx(measured, rel=alone)


def model(family, sizes, folder):
    if family == "qwen3_vl":
        return random_models.qwen3_vl(folder, **sizes)
    pytest.importorskip("torch")
    return random_models.FAMILIES[family](folder, more=sizes)


@pytest.fixture(scope="module", params=["qwen3_vl", *MIDDLE])
def middle(request, tmp_path_factory):
    return model(
        request.param,
        {"qwen3_vl": SMALLER, **MIDDLE}[request.param],
        tmp_path_factory.mktemp(request.param),
    )


@pytest.fixture(scope="module", params=["qwen3_vl", *BIG])
def big(request, tmp_path_factory):
    return model(
        request.param,
        {"qwen3_vl": QWEN3_VL, **BIG}[request.param],
        tmp_path_factory.mktemp(request.param),
    )


QUESTION = "What is on it? " * 4


def test_memory_of_a_model_of_100m_parameters(backend_name, big):
    measured = Measured(backend_name, big, "?", (32, 32), (32, 32), n=2, length=6)
    assert sum(measured.shape.parameters.values()) > 8e7
    agree(measured.rollout(), measured.plan(False), "rollout", alone=0.2)
    agree(measured.accumulate(True), measured.plan(True), "accumulate", alone=0.05)


@pytest.mark.parametrize("adapters", [None, AdapterOptions()], ids=["full", "lora"])
def test_what_a_run_holds_from_step_to_step(backend_name, adapters, tmp_path):
    """Weights, the teacher and both moments, after a step and without a gradient."""
    folder, before = model("qwen3_vl", SMALLER, tmp_path), allocated(backend_name)
    sizes = {"n": 2, "length": 6, "adapters": adapters}
    measured = Measured(backend_name, folder, "?", (32, 32), (32, 32), **sizes)
    measured.backend.accumulate([measured.group], Objective(top_k=100))
    measured.backend.apply(Update(1e-3))
    held = sum(allocated(backend_name).values()) - sum(before.values())
    planned = dict(measured.plan(False).held)
    planned.pop(KEPT_FEATURES, None)  # a cache that grows
    assert sum(planned.values()) == pytest.approx(held, rel=0.05)


def allocated(backend_name):
    """Bytes of all arrays, by their address in torch."""
    gc.collect()
    if backend_name == "mlx":
        import mlx.core as mx

        return {0: mx.get_active_memory()}
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries' lazy objects
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    storages = [one.untyped_storage() for one in tensors if one.layout == torch.strided]
    return {one.data_ptr(): one.nbytes() for one in storages if one.device.type == "cpu"}


def test_memory_of_an_optimizer_step(backend_name, big):
    measured = Measured(backend_name, big, "?", (32, 32), (32, 32), n=2, length=6)
    applied, moved = measured.apply()
    agree(applied, measured.plan(True), "apply", alone=0.08)
    assert moved < 0.1 * applied


@pytest.mark.parametrize("adapters", [None, AdapterOptions()], ids=["full", "lora"])
def test_memory_of_long_rows(backend_name, middle, adapters):
    """Activations are most of it here."""
    measured = Measured(
        backend_name, middle, QUESTION, (96, 96), (32, 32), n=4, length=32, adapters=adapters
    )
    # MLX decides by itself in what order it computes, torch does not.
    alone = {"cpu": 0.08, "mlx": 0.2}[backend_name]
    agree(measured.rollout(), measured.plan(False), "rollout", alone)
    for checkpointed in (False, True):
        agree(
            measured.accumulate(checkpointed),
            measured.plan(checkpointed),
            "accumulate",
            alone=alone,
        )


@pytest.mark.parametrize("tied", [True, False])
def test_memory_of_tables(backend_name, tied, tmp_path):
    """A head's gradient takes in the rows that a tied embedding looked up; there is no second
    table, even for a moment."""
    folder = random_models.qwen3_vl(tmp_path, **SMALLER, vocabulary=50_000, tied=tied)
    measured = Measured(backend_name, folder, "?", (32, 32), (32, 32), n=2, length=6)
    agree(measured.accumulate(True), measured.plan(True), "accumulate", alone=0.05)


def test_half_precision_holds_cast_weights(backend_name, middle):
    measured = Measured(
        backend_name, middle, QUESTION, (96, 96), (32, 32), n=2, length=32, dtype="bfloat16"
    )
    agree(measured.rollout(), measured.plan(False), "rollout", alone=0.3)
    agree(measured.accumulate(False), measured.plan(False), "accumulate")


@pytest.mark.parametrize("adapters", [None, AdapterOptions()], ids=["full", "lora"])
def test_memory_of_a_large_vocabulary(backend_name, tmp_path, adapters):
    """Logits and the embedding's gradients are most of it here."""
    folder = random_models.qwen3_vl(tmp_path, **SMALLER, vocabulary=60_000)
    measured = Measured(
        backend_name, folder, QUESTION, (96, 96), (32, 32), n=4, length=32, adapters=adapters
    )
    agree(measured.accumulate(False), measured.plan(False), "accumulate", alone=0.08)


def test_a_pass_that_serves_no_prompt_is_freed_before_the_teacher_runs(
    backend_name, middle, monkeypatch
):
    """Nothing is planned for it."""
    measured = Measured(backend_name, middle, QUESTION, (32, 32), (32, 32), n=1, length=2)
    backend = measured.backend
    prefill = backend.prefill([measured.group.student, measured.short])
    held = prefill.read(prefill.prompts, backend._weights)
    if backend_name == "mlx":
        kept = weakref.ref(held.pending)
        holder, teacher = importlib.import_module("opd_mlx.gradient"), "_teacher_hidden"
    else:
        kept = weakref.ref(held.cache[0][0])
        holder, teacher = importlib.import_module("opd_torch.gradient"), "_hidden"
    del held
    run, seen = getattr(holder, teacher), []
    monkeypatch.setattr(holder, teacher, lambda *rest: seen.append(kept()) or run(*rest))
    microbatch.accumulate(backend, [measured.group], Objective(top_k=100), 10**6, None, prefill)
    assert seen == [None]


def test_memory_of_a_delta_net_over_many_segments(backend_name, tmp_path):
    """MLX holds nothing of what the rule computes there, and computes a segment at a time again."""
    measured = Measured(
        backend_name,
        model("qwen3_5", MIDDLE["qwen3_5"], tmp_path),
        QUESTION,
        (320, 320),
        (32, 32),
        n=2,
        length=32,
    )
    assert measured.work.student.before > 256
    agree(measured.rollout(), measured.plan(False), "rollout", alone=0.15)
    for checkpointed in (False, True):
        agree(
            measured.accumulate(checkpointed),
            measured.plan(checkpointed),
            "accumulate",
            alone=0.15,
        )


@pytest.mark.parametrize("image", [(112, 96), (320, 320)], ids=["short", "long"])
def test_layers_are_computed_again_where_the_backend_does(backend_name, middle, image):
    measured = Measured(backend_name, middle, QUESTION, image, (32, 32), n=3, length=7)
    tokens = [[one.tokens for one in measured.group.completions]]
    if backend_name == "mlx":
        from opd_mlx.batch import lay_out
        from opd_mlx.footprint import activation_bytes

        computes = measured.backend._model
        batch = lay_out([measured.group.student], tokens)
    else:
        import torch

        from opd_torch.batch import lay_out
        from opd_torch.footprint import activation_bytes

        computes = measured.backend._student
        batch = lay_out([measured.group.student], tokens, torch.device("cpu"))
    lengths = measured.work.lengths(1, measured.work.student, 3)
    assert measured.options.checkpoint_above == computes.device.checkpoint_above
    found = activation_bytes(computes, batch)
    held = measured.shape.held(lengths, measured.rough.layer)
    assert int(measured.rough.margin * held) == found
    for bound in (found, found - 1):
        options = replace(measured.options, checkpoint_above=bound)
        assert memory(measured.step(options)).checkpointed == (found > bound)


TAKEN = {
    "Qwen3-VL-2B": {"cpu": (2677.0, 1338.5), "cuda": (2677.0, 865.8), "mlx": (1948.0, 1057.0)},
    "Qwen3-VL-4B": {"cpu": (4565.4, 2282.7), "cuda": (4565.4, 1464.3), "mlx": (3360.5, 1814.6)},
    "Qwen3-VL-8B": {"cpu": (5798.6, 2899.3), "cuda": (5798.6, 1889.4), "mlx": (4115.4, 2198.4)},
}
"""MB that each backend took a backward to hold in float32 and in bfloat16 when it had rules of its
own for that; they decided early enough."""


@pytest.mark.parametrize("name", TAKEN)
def test_layers_are_recomputed_no_later_than_by_the_earlier_rules(name):
    """An image of 256 patches, a prompt of 127 tokens and 4 completions of 32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**PUBLISHED[name]).to_dict()
    seen = View(256, 24 * 256**2, 64, 128)
    rows = Work(1, 4, 32, seen, seen, 10**9).lengths(1, seen, 4)
    for backend, taken in TAKEN[name].items():
        planner = registry.planner(backend)
        shape = Shape(config, planner.parameters(config))
        for dtype, megabytes in zip(("float32", "bfloat16"), taken, strict=True):
            for adapters in (None, AdapterOptions()):
                options = ModelOptions(SOURCE, dtype, adapters is None, adapters)
                found = planner.footprint(options, config, here=False)
                held = found.margin * shape.held(rows, found.layer) / 1e6
                assert 0.95 * megabytes <= held <= 1.35 * megabytes, (backend, dtype, adapters)
