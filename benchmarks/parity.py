"""Does every family compute the same on both backends as in transformers? All figures are errors.

    python -m benchmarks.parity [--family qwen3_vl --family ...] [--json] [--quick]

The benchmark takes tiny random checkpoints of the real architectures, prompts with images of
several sizes, groups of completions of unequal length, and a teacher that differs from the
student. Our code runs in float32; the reference is stock transformers in float64, with one plain
row per completion.

prompts     the largest difference of tokens and image arrays from those of the model's processor
logprobs    the relative error ||a - b|| / ||b|| of the whole vocabulary's log-probabilities, under
            both policies
loss        the relative error of the step's divergence
gradient    the largest relative error of a tensor: ||a - b|| / max(||b||, 1e-3 * global norm)
steps       ten steps of AdamW (rate 3e-5) and EMA on replayed completions: the largest relative
            difference of a loss from the torch backend's in float64
adapter     LoRA trained and exported here, loaded by peft in float64: the relative error of the
            logits from those of the merged export
export      a trained model, exported and loaded by transformers in float64: the relative error of
            the log-probabilities from those of the trained backend

It writes results/parity.json. It needs torch, peft and mlx, and runs from the repository's root,
because `tests.support` makes the checkpoints.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from benchmarks import measuring
from benchmarks.measuring import Row
from opd import registry
from opd.backend import Backend
from opd.objective import Objective
from opd.types import AdapterOptions, Group, ModelOptions, Update
from tests.support import prompt_cases, random_models, torch_cases
from tests.support.adapter_cases import under_peft

RESULTS = Path(__file__).parent / "results"
JSD = Objective(alpha=0.5, top_k=20)
LORA = AdapterOptions(rank=4, alpha=8.0)
CHECKPOINTS = {**random_models.FAMILIES, "llava": random_models.llava}
ROWS = ("llava",)
"""Checkpoints without a family file, which run row by row and on torch only."""

PICTURES = [
    [(64, 64)],
    [(200, 50)],
    [(97, 61)],
    [(40, 40), (120, 64)],
    [(64, 160), (24, 24), (90, 30)],
]
"""The images of the compared prompts: (width, height) of each."""

EVERY = 2**30
"""A `top` above every vocabulary's size, so that `score` returns all tokens."""

Logits = list[NDArray[np.float64]]


def rows_of(name: str, root: Path) -> list[Row]:
    """Measures the checkpoint `name`: one row for each backend."""
    case = torch_cases.make_case(root, random_models.raise_norms(CHECKPOINTS[name](root / "model")))
    names = ("cpu",) if name in ROWS else ("cpu", "mlx")
    with torch_cases.delta_rule_in_float64():
        prompts = prompt_error(name, case)
        expected = [
            stock_logprobs(case.stock(policy), case.groups, policy)
            for policy in ("student", "teacher")
        ]
        loss, gradients = torch_cases.plain_loss_and_gradients(case, case.groups, JSD)
        rows, losses = [], ten_steps(case.backend(), case.groups)
        for backend in names:
            untrained = loaded(case, backend)
            row: Row = {
                "family": name,
                "backend": "torch" if backend == "cpu" else backend,
                "prompts": prompts,
            }
            row["logprobs"] = max(
                relative_difference(ours, true)
                for ours, true in zip(logprobs(untrained, case.groups), expected, strict=True)
            )
            statistics = untrained.accumulate(case.groups, JSD)
            row["loss"] = abs(torch_cases.loss_of(case.groups, statistics) - loss) / abs(loss)
            gradient = untrained.tensors("gradient")
            # Nothing reads the last layer of LLaVA's tower, so the reference has no gradient there.
            true_gradient = {
                key: gradients.get(key, np.zeros_like(value)) for key, value in gradient.items()
            }
            row["gradient"] = measuring.relative_error(gradient, true_gradient)
            trained = loaded(case, backend)
            row["steps"] = float(
                np.abs(np.array(ten_steps(trained, case.groups)) / losses - 1).max()
            )
            row["adapter"] = adapter_error(case, backend, root / f"{backend}-adapter")
            row["export"] = export_error(case, trained, root / f"{backend}-export")
            rows.append(row)
    return rows


def loaded(case: Any, backend: str, **options: Any) -> Backend:
    """Loads the case's model on a backend; without `options` also the case's state, whose teacher
    differs from the student."""
    model = registry.load(backend, ModelOptions(case.folder, "float32", **options))
    if not options:
        model.load(case.state)
    return model


def prompt_error(name: str, case: Any) -> float:
    """The largest difference from the model's own processor; infinite where shapes differ."""
    rng, worst = np.random.default_rng(0), 0.0
    for sizes in PICTURES:
        images = [
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            for width, height in sizes
        ]
        ours = case.encoder.encode(images, prompt_cases.QUESTION)
        theirs = prompt_cases.expected(name, case.folder, images)
        pairs = [(ours.tokens, theirs["input_ids"][0])]
        for key, value in ours.images.items():
            pairs.append((value, theirs[key][0] if value.ndim < theirs[key].ndim else theirs[key]))
        for a, b in pairs:
            worst = max(worst, float(np.abs(a - b).max()) if a.shape == b.shape else np.inf)
    return worst


def stock_logits(model: Any, groups: Sequence[Group], policy: str = "student") -> Logits:
    """Stock transformers' logits [T, V] of every completion, with one row per completion."""
    with torch.no_grad():
        return [
            torch_cases.stock_logits(model, getattr(group, policy), completion.tokens).numpy()
            for group in groups
            for completion in group.completions
        ]


def stock_logprobs(model: Any, groups: Sequence[Group], policy: str = "student") -> Logits:
    """Stock transformers' log-probabilities [T, V] of every completion."""
    return [
        torch.from_numpy(logits).log_softmax(-1).numpy()
        for logits in stock_logits(model, groups, policy)
    ]


def logprobs(backend: Backend, groups: Sequence[Group]) -> list[Logits]:
    """Our log-probabilities [T, V] of every completion, under the student and the teacher."""
    scored = [tokens for group in backend.score(groups, JSD, top=EVERY) for tokens in group]
    return [
        [_in_order(getattr(tokens, f"{policy}_top")) for tokens in scored]
        for policy in ("student", "teacher")
    ]


def _in_order(top: Any) -> NDArray[np.float64]:
    """Sorts the log-probabilities of all tokens by token id."""
    ordered = np.empty(top.tokens.shape, np.float64)
    np.put_along_axis(ordered, top.tokens.astype(np.int64), top.logprobs.astype(np.float64), -1)
    return ordered


def relative_difference(ours: Logits, true: Logits) -> float:
    """||ours - true|| / ||true|| over all completions together."""
    a, b = np.concatenate(ours), np.concatenate(true)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def ten_steps(backend: Backend, groups: Sequence[Group]) -> list[float]:
    """The losses of ten steps on the same completions."""
    losses = []
    for _ in range(10):
        losses.append(torch_cases.loss_of(groups, backend.accumulate(groups, JSD)))
        assert backend.apply(Update(3e-5, weight_decay=0.01)).taken
        backend.move_teacher(0.05)
    return losses


def adapter_error(case: Any, backend: str, folder: Path) -> float:
    """Trains new adapters, exports them as an adapter and merged, and compares the two exports."""
    adapted = loaded(case, backend, tune_vision=False, adapters=LORA)
    for _ in range(3):
        adapted.accumulate(case.groups, JSD)
        assert adapted.apply(Update(2e-2)).taken
        adapted.move_teacher(0.05)
    adapted.export(folder / "adapter", "adapter")
    adapted.export(folder / "model", "model")
    merged, base = (
        stock_logits(stock(path), case.groups) for path in (folder / "model", case.folder)
    )
    assert relative_difference(base, merged) > 1e-2, "the adapters say nothing"
    return relative_difference(
        stock_logits(
            under_peft(stock(case.folder), folder / "adapter").base_model.model, case.groups
        ),
        merged,
    )


def export_error(case: Any, trained: Backend, folder: Path) -> float:
    """Compares the trained model in the backend with the model in the backend's export."""
    trained.export(folder, "model")
    return relative_difference(
        stock_logprobs(stock(folder), case.groups), logprobs(trained, case.groups)[0]
    )


def stock(folder: Path) -> Any:
    """Loads a folder's model with stock transformers, in float64."""
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument(
        "--family",
        action="append",
        choices=list(CHECKPOINTS),
        help="may be repeated; all without it",
    )
    options = parser.parse_args()
    for name in ("mlx", "peft"):
        measuring.peer(name)
    families = options.family or (["qwen3_vl"] if options.quick else list(CHECKPOINTS))
    rows = []
    for name in families:
        with tempfile.TemporaryDirectory() as root:
            rows += rows_of(name, Path(root))
    about = {
        "device": measuring.device_name(),
        "versions": measuring.versions("peft", "mlx", "mlx-vlm"),
    }
    result = measuring.report(options, "parity", rows, **about)
    if len(families) == len(CHECKPOINTS):
        (RESULTS / "parity.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
