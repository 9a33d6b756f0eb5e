from __future__ import annotations

import gc
import importlib
import os
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from opd.data import formats
from opd.types import Box, Example
from opd.views import view
from tests.support import plugins

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BACKENDS = {"cpu": "opd_torch", "mlx": "opd_mlx"}
INSTALLED = [name for name in BACKENDS if find_spec({"cpu": "torch", "mlx": "mlx"}[name])]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Garbage collections pass over all that was there before the module's tests: with the
    libraries' objects each takes half a second. Modules only add, so a collection is short."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Libraries report as leaked what no collection at the end of the process frees."""
    gc.unfreeze()


@pytest.fixture(params=INSTALLED)
def backend_name(request):
    """Every backend that is installed here, by the name that `--backend` takes."""
    return request.param


@pytest.fixture
def twin(backend_name):
    """What tests need of one backend beside its verbs: `tests.support.torch_cases`, or MLX's."""
    return twin_of(backend_name)


def twin_of(name: str) -> ModuleType:
    """The cases of the backend `name`."""
    return importlib.import_module(f"tests.support.{BACKENDS[name].removeprefix('opd_')}_cases")


@pytest.fixture
def kernel(backend_name):
    """The backend's divergence kernel on numpy arrays: keyword arguments as in `divergence_head`,
    results as numpy."""
    module = importlib.import_module(f"{BACKENDS[backend_name]}.objective")
    if backend_name == "mlx":
        import mlx.core as mx

        def device(value, dtype):
            return mx.array(np.asarray(value, dtype))

    else:
        import torch

        def device(value, dtype):
            return torch.tensor(np.asarray(value, dtype))

    def run(
        student, student_head, teacher, teacher_head, tokens, sampler, weights, objective, **options
    ):
        floats = [
            device(value, np.float32) for value in (student, student_head, teacher, teacher_head)
        ]
        result = module.divergence_head(
            *floats,
            device(tokens, np.int64),
            device(sampler, np.float32),
            device(weights, np.float32),
            objective,
            **options,
        )
        found = {name: value for name, value in vars(result).items() if value is not None}
        for policy in ("student", "teacher"):
            if f"{policy}_top" in found:
                found[f"{policy}_top_tokens"], found[f"{policy}_top_logprobs"] = found.pop(
                    f"{policy}_top"
                )
        return {
            name: value.numpy() if hasattr(value, "numpy") else np.array(value)
            for name, value in found.items()
        }

    return run


def coloured(count: int = 12) -> list[Example]:
    """Examples for the toy backend: a coloured square on black, and a box around the square."""
    rng = np.random.default_rng(0)
    examples = []
    for index in range(count):
        pixels = np.zeros((32, 48, 3), np.uint8)
        pixels[4:28, 8:40] = rng.integers(0, 255, size=3)
        question = "what colour"[: 4 + index % 7]
        examples.append(
            Example(
                f"toy-{index}",
                (Image.fromarray(pixels),),
                question,
                (Box(8, 4, 40, 28),),
                answer="abc",
                source=f"toy:{index}",
            )
        )
    return examples


@pytest.fixture
def installed(tmp_path_factory, monkeypatch):
    """Installs functions as backends, as other people's are: `--backend NAME` calls them."""

    def install(**backends):
        folder = tmp_path_factory.mktemp("site")
        plugins.install(folder, **backends)
        monkeypatch.syspath_prepend(folder)

    return install


@pytest.fixture
def registers():
    """Views and formats that a test registers are forgotten after it."""
    tables = view.REGISTERED, formats.REGISTERED
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.fixture
def examples():
    return coloured()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """A random Qwen3-VL of real architecture, in Hugging Face layout."""
    from tests.support.random_models import qwen3_vl

    return qwen3_vl(tmp_path_factory.mktemp("random"))
