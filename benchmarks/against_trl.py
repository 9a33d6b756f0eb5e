"""What does our training stage cost against TRL's `DistillationTrainer`, on the same weights, prompts and completions?

    python -m benchmarks.against_trl [--prompt 384 --completion 64 --n 8 --crop 0] [--again] [--json] [--quick]

The stage: student forward and backward, teacher forward, divergence, gradients of all parameters; no rollout, no optimizer. TRL runs
its own `training_step` on batches that are given to it instead of generated: beta 0.5, temperature 1, full vocabulary, which is our
alpha 0.5 and no top_k. With `--crop 0` the teacher reads the student's prompt, as TRL has it; with `--crop C` a subclass gives the
teacher the crop's prompt.
  TRL, n rows   all n rows in one forward: as many rows of the group as ours computes in one
  TRL, 1 row    micro-batches of one row: TRL's least memory; against it stands ours with the completions split, one at a time
`--again` has both sides compute layers again in the backward (TRL's default; ours above an estimate of 2 GiB).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import against_rows, arithmetic, measuring, workload
from opd.types import Group, Prompt

LOSS = {"beta": 0.5, "temperature": 1.0}


def batch(prompt: Prompt, group: Group, members: range, image_token: int, device: Any = "cpu") -> dict[str, torch.Tensor]:
    """What TRL's own preparation gives a micro-batch: the prompt and its image once for every row."""
    n = len(members)
    ids = torch.from_numpy(np.tile(prompt.tokens.astype(np.int64), (n, 1)))
    completions = torch.from_numpy(np.stack([group.completions[member].tokens for member in members]).astype(np.int64))
    kinds = torch.cat([(ids == image_token).long(), torch.zeros_like(completions)], 1)
    found = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "num_items_in_batch": torch.tensor(float(group.tokens)),
        "pixel_values": torch.from_numpy(np.tile(prompt.images["pixel_values"], (n, 1))),
        "image_grid_thw": torch.from_numpy(np.tile(prompt.images["image_grid_thw"], (n, 1))).long(),
        "mm_token_type_ids": kinds,
    }
    return {name: value.to(device) for name, value in found.items()}


def trainer(student: Any, teacher: Any, tokenizer: Any, out: Path, again: bool, bf16: bool = False) -> Any:
    """TRL's trainer, which takes prepared batches and, with them, what the teacher reads."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Prepared(DistillationTrainer):  # type: ignore[misc]
        """Two overrides, no other change: batches come as they are, and the teacher's prompt may be another."""

        crop: dict[str, torch.Tensor] | None = None

        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs

        def _get_last_hidden_state(self, model: Any, input_ids: Any, attention_mask: Any, kept: int, **images: Any) -> Any:
            if self.crop is not None and model is self.accelerator.unwrap_model(self.teacher_model):
                ids = torch.cat([self.crop["prompt_ids"], self.crop["completion_ids"]], 1)
                images = {name: self.crop[name] for name in images}
                return super()._get_last_hidden_state(model, ids, torch.ones_like(ids), kept, **images)
            return super()._get_last_hidden_state(model, input_ids, attention_mask, kept, **images)

    config = DistillationConfig(
        output_dir=str(out), per_device_train_batch_size=1, gradient_checkpointing=again, bf16=bf16, use_cpu=not torch.cuda.is_available(),
        report_to=[], disable_tqdm=True, disable_dropout=False, max_steps=1, **LOSS,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": ["a"]})
    made = Prepared(model=student, teacher_model=teacher, args=config, train_dataset=dataset, processing_class=tokenizer)
    made.current_gradient_accumulation_steps = 1
    made._current_train_step_time = 0.0
    if again:
        made.model.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def side(made: Any, group: Group, rows: int, device: Any = "cpu") -> Callable[[], tuple[float, dict[str, Any]]]:
    """TRL's stage over the group, `rows` rows at a time."""
    image = made.model.config.image_token_id
    parts = [range(start, min(start + rows, len(group.completions))) for start in range(0, len(group.completions), rows)]
    students = [batch(group.student, group, part, image, device) for part in parts]
    teachers = [None if group.teacher is group.student else batch(group.teacher, group, part, image, device) for part in parts]

    def run() -> tuple[float, dict[str, Any]]:
        made.model.train()
        loss = 0.0
        for inputs, made.crop in zip(students, teachers, strict=True):
            loss += float(made.training_step(made.model, inputs, None))
        found = {name: parameter.grad for name, parameter in made.model.named_parameters() if parameter.grad is not None}
        made.model.zero_grad(set_to_none=True)
        return loss, found

    return run


def main() -> None:
    parser = measuring.arguments(__doc__)
    against_rows.shape_options(parser)
    parser.set_defaults(crop=0)
    parser.add_argument("--again", action="store_true", help="both sides compute layers again in the backward")
    options = parser.parse_args()
    for name in ("trl", "accelerate", "datasets"):
        measuring.peer(name)
    import transformers

    with tempfile.TemporaryDirectory() as root:
        path, config, group = against_rows.case(options, Path(root) / "model")
        found, ours = against_rows.of_torch(path, group)
        student, teacher = (transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32) for _ in range(2))
        teacher.load_state_dict({name: value.detach() for name, value in ours._teacher.module.state_dict().items()})
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        made = trainer(student, teacher, tokenizer, Path(root) / "out", options.again)
        sides = {
            "ours, group": found["group"],
            "TRL, n rows": side(made, group, len(group.completions)),
            "TRL, 1 row": side(made, group, 1),
            "ours, split": found["group, split"],
        }
        shape = against_rows.shape_of(options)
        if options.again:
            workload.on_device(ours, checkpoint_above=-1)
        rows = against_rows.compared(sides, options, "cpu", arithmetic.group(config, shape, options.again))
        single, split = (next(row for row in rows if row["side"] == name) for name in ("TRL, 1 row", "ours, split"))
        about = {"device": ours.device, "shape": str(shape), "sizes": against_rows.sizes(config), "computed_again": options.again,
                 "split_memory_ratio": single["bytes"] / split["bytes"]}  # fmt: skip
        measuring.report(options, "against_trl", rows, **about, versions=measuring.versions("trl", "accelerate"))


if __name__ == "__main__":
    main()
