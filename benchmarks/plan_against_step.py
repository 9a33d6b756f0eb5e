"""Are memory and time of a real step on this machine what `opd plan` says?

    OMP_NUM_THREADS=1 python -m benchmarks.plan_against_step [--only cpu-lora] [--json] [--quick]

The benchmark runs one step of two micro-batches of a random Qwen3-VL with half a billion parameters
in float32: on both backends, with full fine-tuning and with LoRA, and on MLX with LoRA over 4 bits.
Every side runs in a new process. Each verb of the backend runs once for the time and once for the
peak of all allocated bytes. The plan is made for the device `this machine`. A side takes up to
12 GB and some minutes. After each side the benchmark writes results/plan_against_step.json.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measuring, workload

RESULTS = Path(__file__).parent / "results"
SIDES = ("cpu-full", "cpu-lora", "mlx-full", "mlx-lora", "mlx-qlora")

MODEL = {
    "hidden": 1024,
    "layers": 24,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 64,
    "mlp": 3072,
    "vision_hidden": 512,
    "vision_layers": 8,
    "vision_heads": 8,
    "vision_mlp": 2048,
    "positions": 576,
}
QUICK = {
    **MODEL,
    "hidden": 256,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "mlp": 768,
    "vision_hidden": 128,
    "vision_layers": 3,
    "vision_heads": 2,
    "vision_mlp": 512,
}
VOCABULARY, QUICK_VOCABULARY = 150_000, 2_000
# (image, crop, completions, tokens per completion). On a CPU MLX's products with 4-bit weights are
# slow, so that side gets less work.
WORK = {"full": ((512, 384), (256, 192), 4, 48), "qlora": ((256, 192), (128, 96), 2, 16)}
QUICK_WORK = ((96, 96), (64, 64), 2, 8)

STAGES = {
    "rollout": ("rollout prefill", "rollout decode"),
    "accumulate": (
        "teacher forward",
        "student forward",
        "student backward",
        "recomputation",
        "head and divergence",
    ),
    "apply": ("optimizer",),
    "move_teacher": ("teacher's average",),
}
"""The plan's stages that each verb runs."""


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument(
        "--only",
        choices=SIDES,
        action="append",
        help="run this side only; may be repeated; the file's other rows stay",
    )
    options = parser.parse_args()
    vocabulary = QUICK_VOCABULARY if options.quick else VOCABULARY
    context = multiprocessing.get_context("spawn")
    path = RESULTS / "plan_against_step.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() and not options.quick else []
    rows: list[measuring.Row] = []
    about = {"device": measuring.device_name(), "versions": measuring.versions("mlx", "peft")}
    with tempfile.TemporaryDirectory() as out:
        folder = workload.folder(
            Path(out) / "model", vocabulary, **(QUICK if options.quick else MODEL)
        )
        for name in options.only or SIDES:
            print(name, file=sys.stderr)
            with context.Pool(1) as fresh:
                rows += fresh.apply(side, (name, folder, options.quick))
            if not options.quick:
                measured = {row["side"] for row in rows}
                every = sorted(
                    [*(row for row in before if row["side"] not in measured), *rows],
                    key=lambda row: SIDES.index(row["side"]),
                )
                RESULTS.mkdir(exist_ok=True)
                path.write_text(
                    json.dumps({"benchmark": "plan_against_step", **about, "rows": every}, indent=1)
                    + "\n"
                )
    measuring.report(options, "plan_against_step", rows, **about)


def side(name: str, folder: Path, quick: bool = False) -> list[measuring.Row]:
    """One row for each verb: planned and measured bytes and seconds, and planned over measured."""
    from opd import plan as planning
    from opd import registry
    from opd.plan import devices
    from opd.run.recipe import load

    backend_name, tune = name.split("-")
    image, crop, completions, tokens = QUICK_WORK if quick else WORK.get(tune, WORK["full"])
    keys = {
        "model.path": folder,
        "model.tune": tune,
        "model.vision": "true" if tune == "full" else "false",
        "rollout.prompts": 2,
        "rollout.completions": completions,
        "rollout.max_tokens": tokens,
        "rollout.microbatch_tokens": 1,
        "rollout.sample_tokens": 1,
        "objective.top_k": 100,
    }
    recipe = load("tiny", [f"{key}={value}" for key, value in keys.items()])
    device = devices.this_machine(registry.planner(backend_name).machine())
    assumed = planning.Assumed(image, crop, None, tokens)
    planned = planning.plan(recipe, device, backend_name, assumed)
    # A micro-batch holds one whole group.
    recipe = recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update={"microbatch_tokens": planned.work.group})
        }
    )
    planned = planning.plan(recipe, device, backend_name, assumed)
    # A run caches the image features of all rows of the data set; this step sees two images only.
    planned = planned.sized(rows=0)
    step = Step(recipe, backend_name, planned)
    seconds = {verb: clocked(run) for verb, run in step.verbs.items()}
    peaks = {verb: step.peak(run, backend_name) for verb, run in step.verbs.items()}
    phases = planned.memory.phases
    rows = []
    for verb, stages in STAGES.items():
        row = {
            "side": name,
            "verb": verb,
            "bytes": peaks[verb],
            "planned_bytes": phases.get(verb, ""),
            "seconds": seconds[verb],
        }
        row["planned_seconds"] = sum(planned.seconds[stage] for stage in stages)
        rows.append(row)
    total = {
        "side": name,
        "verb": "step",
        "bytes": max(peaks.values()),
        "planned_bytes": planned.memory.peak,
    }
    total |= {key: sum(row[key] for row in rows) for key in ("seconds", "planned_seconds")}
    rows.append(total)
    for row in rows:
        row["bytes_ratio"] = row["planned_bytes"] / row["bytes"] if row["planned_bytes"] else ""
        row["seconds_ratio"] = row["planned_seconds"] / row["seconds"]
    return rows


class Step:
    """The verbs of one step, with random images and random completions of full length."""

    def __init__(self, recipe: Any, backend_name: str, planned: Any) -> None:
        from PIL import Image

        from opd import registry
        from opd.prompts.encoder import PromptEncoder
        from opd.types import Completion, Group, Prompt, Sampling, Update

        self.mlx = backend_name == "mlx"
        self.before = self.active()
        work, rng = planned.work, np.random.default_rng(0)
        encoder = PromptEncoder(recipe.model.folder(weights=False), **recipe.model.pixels())
        # The question fills the number of text tokens that the plan assumes.
        question = "x" * (planned.work.student.text - len(encoder.encode([], "")))
        self.backend = registry.load(backend_name, recipe.model.options())

        def group() -> Group:
            prompts = []
            for size, policy in ((work.student.size, "student"), (work.teacher.size, "teacher")):
                image = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3)).astype(np.uint8))
                prompts.append(encoder.encode([image], question, policy))
            assert [len(prompt) for prompt in prompts] == [work.student.tokens, work.teacher.tokens]
            one = [
                Completion(
                    rng.integers(0, 250, work.tokens).astype(np.int32),
                    np.full(work.tokens, -8, np.float32),
                    False,
                )
                for _ in range(work.completions)
            ]
            weight = np.full(
                work.tokens, 1 / (work.prompts * work.completions * work.tokens), np.float32
            )
            return Group(prompts[0], prompts[1], tuple(one), (weight,) * work.completions)

        groups = [group() for _ in range(work.prompts)]
        uniforms = rng.random((1, work.completions, work.tokens), dtype=np.float32)
        backend, objective = self.backend, recipe.objective.objective(recipe.rollout.temperature)

        def sample(prompt: Prompt) -> None:
            """Samples as a step does: with the prompt's pass held for the gradient."""
            prefill = backend.prefill([prompt])
            backend.sample([prompt], uniforms, Sampling(banned=encoder.banned), prefill=prefill)

        self.verbs = {
            # No stop token is given, so all completions have full length.
            "rollout": lambda: [sample(one.student) for one in groups],
            "accumulate": lambda: [backend.accumulate([one], objective) for one in groups],
            "apply": lambda: backend.apply(Update(learning_rate=1e-6)),
            "move_teacher": lambda: backend.move_teacher(0.05),
        }
        self.verbs["move_teacher"]()  # until then MLX's teacher shares the student's arrays

    def peak(self, run: Any, backend_name: str) -> int:
        """The peak of allocated bytes while a verb runs."""
        return self.held() + measuring.peak_bytes(run, backend_name)

    def active(self) -> int:
        """The bytes of all MLX arrays of the process, and 0 on torch."""
        if not self.mlx:
            return 0
        import mlx.core as mx

        gc.collect()
        mx.synchronize()  # a stream lets go of arrays in a thread of its own
        return int(mx.get_active_memory())

    def held(self) -> int:
        """The bytes of this step that are allocated between two verbs."""
        if self.mlx:
            return self.active() - self.before
        models = (self.backend._student.module, self.backend._teacher.module)
        tensors = [*(one for model in models for one in (*model.parameters(), *model.buffers()))]
        tensors += [
            *self.backend._optimizer.first.values(),
            *self.backend._optimizer.second.values(),
            *self.backend._gradient.values(),
        ]
        return sum({one.data_ptr(): one.nbytes for one in tensors}.values())


def clocked(run: Any) -> float:
    """The processor seconds of `run`, which other users of the machine disturb less than the
    clock's."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
