"""Is every family the same model on both backends, and the same as transformers has it? Every figure is an error; none is a time.

    python -m benchmarks.parity [--family qwen3_vl --family ...] [--json] [--quick]

Tiny random checkpoints of the real architectures, prompts with images of several sizes, groups of unequal completions, a teacher that
differs from the student. Ours run in float32; the reference is stock transformers in float64, one plain row a completion.

prompts     largest difference of tokens and image arrays from the model's own processor
logprobs    relative error of the log-probabilities of the whole vocabulary, ||a - b|| / ||b||, both policies
loss        relative error of the step's divergence
gradient    largest relative error of a tensor: ||a - b|| / max(||b||, 1e-3 * global norm)
steps       ten steps of AdamW (rate 3e-5) and EMA on replayed completions: largest relative difference of a loss from torch's in float64
adapter     LoRA trained here, exported, under peft in float64: relative error of its logits from those of the merged export
export      trained, exported, loaded by transformers in float64: relative error of log-probabilities from what was trained

Writes results/parity.json. Needs torch, peft and mlx; runs from the repository's root, whose tests make the checkpoints.
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
from opd import registry as backends
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
"""Without a family file: torch alone."""

PICTURES = [[(64, 64)], [(200, 50)], [(97, 61)], [(40, 40), (120, 64)], [(64, 160), (24, 24), (90, 30)]]
"""Widths and heights of images whose prompts are compared."""

EVERY = 2**30
"""More than there are tokens in a vocabulary."""

Logits = list[NDArray[np.float64]]


def rows_of(name: str, root: Path) -> list[Row]:
    """One row a backend."""
    case = torch_cases.make_case(root, random_models.raise_norms(CHECKPOINTS[name](root / "model")))
    names = ("cpu",) if name in ROWS else ("cpu", "mlx")
    with torch_cases.delta_rule_in_float64():
        prompts = prompt_error(name, case)
        expected = [stock_logprobs(case.stock(policy), case.groups, policy) for policy in ("student", "teacher")]
        loss, gradients = torch_cases.plain_loss_and_gradients(case, case.groups, JSD)
        rows, losses = [], ten_steps(case.backend(), case.groups)
        for backend in names:
            one = loaded(case, backend)
            row: Row = {"family": name, "backend": "torch" if backend == "cpu" else backend, "prompts": prompts}
            row["logprobs"] = max(apart(found, true) for found, true in zip(logprobs(one, case.groups), expected, strict=True))
            row["loss"] = abs(torch_cases.loss_of(case.groups, one.accumulate(case.groups, JSD)) - loss) / abs(loss)
            found = one.tensors("gradient")  # none reaches the last layer of LLaVA's tower, which nothing reads
            true = {key: gradients.get(key, np.zeros_like(value)) for key, value in found.items()}
            row["gradient"] = measuring.relative_error(found, true)
            one = loaded(case, backend)
            row["steps"] = float(np.abs(np.array(ten_steps(one, case.groups)) / losses - 1).max())
            row["adapter"] = adapter_error(case, backend, root / f"{backend}-adapter")
            row["export"] = export_error(case, one, root / f"{backend}-export")
            rows.append(row)
    return rows


def loaded(case: Any, backend: str, **options: Any) -> Backend:
    """A backend of the case's model; without `options`, in its state, whose teacher differs."""
    one = backends.load(backend, ModelOptions(case.folder, "float32", **options))
    if not options:
        one.load(case.state)
    return one


def prompt_error(name: str, case: Any) -> float:
    """Largest difference from the model's own processor; infinite where tokens are not as many."""
    rng, worst = np.random.default_rng(0), 0.0
    for sizes in PICTURES:
        images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
        ours, theirs = case.encoder.encode(images, prompt_cases.QUESTION), prompt_cases.expected(name, case.folder, images)
        pairs = [(ours.tokens, theirs["input_ids"][0])]
        pairs += [(value, theirs[key][0] if value.ndim < theirs[key].ndim else theirs[key]) for key, value in ours.images.items()]
        for one, other in pairs:
            worst = max(worst, float(np.abs(one - other).max()) if one.shape == other.shape else np.inf)
    return worst


def stock_logits(model: Any, groups: Sequence[Group], policy: str = "student") -> Logits:
    """Logits [T, V] of every completion, each from a row of its own."""
    with torch.no_grad():
        return [
            torch_cases.stock_logits(model, getattr(group, policy), one.tokens).numpy() for group in groups for one in group.completions
        ]


def stock_logprobs(model: Any, groups: Sequence[Group], policy: str = "student") -> Logits:
    """The same, normalised."""
    return [torch.from_numpy(logits).log_softmax(-1).numpy() for logits in stock_logits(model, groups, policy)]


def logprobs(backend: Backend, groups: Sequence[Group]) -> list[Logits]:
    """Log-probabilities [T, V] of every completion under student and teacher."""
    scored = [one for row in backend.score(groups, JSD, top=EVERY) for one in row]
    return [[_in_order(getattr(one, f"{policy}_top")) for one in scored] for policy in ("student", "teacher")]


def _in_order(top: Any) -> NDArray[np.float64]:
    ordered = np.empty(top.tokens.shape, np.float64)
    np.put_along_axis(ordered, top.tokens.astype(np.int64), top.logprobs.astype(np.float64), -1)
    return ordered


def apart(found: Logits, true: Logits) -> float:
    """Relative error of all of them together."""
    ours, theirs = np.concatenate(found), np.concatenate(true)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def ten_steps(backend: Backend, groups: Sequence[Group]) -> list[float]:
    """Losses of ten steps on the same completions."""
    losses = []
    for _ in range(10):
        losses.append(torch_cases.loss_of(groups, backend.accumulate(groups, JSD)))
        assert backend.apply(Update(3e-5, weight_decay=0.01)).taken
        backend.move_teacher(0.05)
    return losses


def adapter_error(case: Any, backend: str, folder: Path) -> float:
    """Fresh adapters, trained until they say something; both ways out of the backend."""
    one = loaded(case, backend, tune_vision=False, adapters=LORA)
    for _ in range(3):
        one.accumulate(case.groups, JSD)
        assert one.apply(Update(2e-2)).taken
        one.move_teacher(0.05)
    one.export(folder / "adapter", "adapter")
    one.export(folder / "model", "model")
    merged, base = (stock_logits(stock(path), case.groups) for path in (folder / "model", case.folder))
    assert apart(base, merged) > 1e-2, "the adapters say nothing"
    return apart(stock_logits(under_peft(stock(case.folder), folder / "adapter").base_model.model, case.groups), merged)


def export_error(case: Any, trained: Backend, folder: Path) -> float:
    """What ten steps made of the model, in the backend and from its files."""
    trained.export(folder, "model")
    return apart(stock_logprobs(stock(folder), case.groups), logprobs(trained, case.groups)[0])


def stock(folder: Path) -> Any:
    """The folder's model as transformers has it, in float64."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--family", action="append", choices=list(CHECKPOINTS), help="may be repeated; all without it")
    options = parser.parse_args()
    for name in ("mlx", "peft"):
        measuring.peer(name)
    families = options.family or (["qwen3_vl"] if options.quick else list(CHECKPOINTS))
    rows = []
    for name in families:
        with tempfile.TemporaryDirectory() as root:
            rows += rows_of(name, Path(root))
    about = {"device": measuring.device_name(), "versions": measuring.versions("peft", "mlx", "mlx-vlm")}
    result = measuring.report(options, "parity", rows, **about)
    if len(families) == len(CHECKPOINTS):
        (RESULTS / "parity.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
