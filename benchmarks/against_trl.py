"""What does our training stage cost against TRL's `DistillationTrainer`?

    python -m benchmarks.against_trl [--prompt 384 --completion 64 --n 8 --crop 0] [--recompute]
                                     [--json] [--quick]

Both sides have the same weights, prompts and completions. The stage is student forward and
backward, teacher forward, divergence and the gradients of all parameters, without rollout and
optimizer. TRL runs its own `training_step` on given batches instead of generated ones, with beta
0.5, temperature 1 and the full vocabulary; ours runs with alpha 0.5 and without top_k. With
`--crop 0` the teacher reads the student's prompt, as in TRL; with `--crop C` a subclass gives the
teacher the crop's prompt.
  TRL, n rows   computes all n rows in one forward, as ours does
  TRL, 1 row    computes micro-batches of one row, which takes TRL's least memory; the side of
                ours to compare is "ours, split", which computes one completion at a time
`--recompute` turns on activation checkpointing on both sides (TRL's default; ours above an
estimate of 2 GiB).
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


def batch(
    prompt: Prompt, group: Group, members: range, image_token: int, device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """A micro-batch as TRL itself prepares it: every row holds the prompt and the image."""
    n = len(members)
    ids = torch.from_numpy(np.tile(prompt.tokens.astype(np.int64), (n, 1)))
    completions = torch.from_numpy(
        np.stack([group.completions[member].tokens for member in members]).astype(np.int64)
    )
    kinds = torch.cat([(ids == image_token).long(), torch.zeros_like(completions)], 1)
    arrays = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "num_items_in_batch": torch.tensor(float(group.tokens)),
        "pixel_values": torch.from_numpy(np.tile(prompt.images["pixel_values"], (n, 1))),
        "image_grid_thw": torch.from_numpy(np.tile(prompt.images["image_grid_thw"], (n, 1))).long(),
        "mm_token_type_ids": kinds,
    }
    return {name: value.to(device) for name, value in arrays.items()}


def trainer(
    student: Any, teacher: Any, tokenizer: Any, out: Path, recompute: bool, bf16: bool = False
) -> Any:
    """TRL's trainer, changed to take prepared batches and a prompt for the teacher."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Prepared(DistillationTrainer):  # type: ignore[misc]
        """Overrides two methods: one takes batches unchanged, the other gives the teacher the
        crop's prompt."""

        crop: dict[str, torch.Tensor] | None = None

        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs

        def _get_last_hidden_state(
            self, model: Any, input_ids: Any, attention_mask: Any, kept: int, **images: Any
        ) -> Any:
            if self.crop is not None and model is self.accelerator.unwrap_model(self.teacher_model):
                ids = torch.cat([self.crop["prompt_ids"], self.crop["completion_ids"]], 1)
                images = {name: self.crop[name] for name in images}
                return super()._get_last_hidden_state(
                    model, ids, torch.ones_like(ids), kept, **images
                )
            return super()._get_last_hidden_state(model, input_ids, attention_mask, kept, **images)

    config = DistillationConfig(
        output_dir=str(out),
        per_device_train_batch_size=1,
        gradient_checkpointing=recompute,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        disable_dropout=False,
        max_steps=1,
        **LOSS,
    )
    dataset = Dataset.from_dict({"prompt": ["a"]})
    made = Prepared(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    made.current_gradient_accumulation_steps = 1
    made._current_train_step_time = 0.0
    if recompute:
        made.model.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def side(
    made: Any, group: Group, rows: int, device: Any = "cpu"
) -> Callable[[], tuple[float, dict[str, Any]]]:
    """A function that runs TRL's training stage over the group, `rows` rows at a time."""
    image = made.model.config.image_token_id
    parts = [
        range(start, min(start + rows, len(group.completions)))
        for start in range(0, len(group.completions), rows)
    ]
    students = [batch(group.student, group, part, image, device) for part in parts]
    teachers = [
        None if group.teacher is group.student else batch(group.teacher, group, part, image, device)
        for part in parts
    ]

    def run() -> tuple[float, dict[str, Any]]:
        made.model.train()
        loss = 0.0
        for inputs, made.crop in zip(students, teachers, strict=True):
            loss += float(made.training_step(made.model, inputs, None))
        gradient = {
            name: parameter.grad
            for name, parameter in made.model.named_parameters()
            if parameter.grad is not None
        }
        made.model.zero_grad(set_to_none=True)
        return loss, gradient

    return run


def main() -> None:
    parser = measuring.arguments(__doc__)
    against_rows.shape_options(parser)
    parser.set_defaults(crop=0)
    parser.add_argument(
        "--recompute", action="store_true", help="activation checkpointing on both sides"
    )
    options = parser.parse_args()
    for name in ("trl", "accelerate", "datasets"):
        measuring.peer(name)
    import transformers

    with tempfile.TemporaryDirectory() as root:
        path, config, group = against_rows.case(options, Path(root) / "model")
        our_sides, ours = against_rows.of_torch(path, group)
        student, teacher = (
            transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
            for _ in range(2)
        )
        teacher.load_state_dict(
            {name: value.detach() for name, value in ours._teacher.module.state_dict().items()}
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        made = trainer(student, teacher, tokenizer, Path(root) / "out", options.recompute)
        sides = {
            "ours, group": our_sides["group"],
            "TRL, n rows": side(made, group, len(group.completions)),
            "TRL, 1 row": side(made, group, 1),
            "ours, split": our_sides["group, split"],
        }
        shape = against_rows.shape_of(options)
        if options.recompute:
            workload.on_device(ours, checkpoint_above=-1)
        rows = against_rows.compared(
            sides, options, "cpu", arithmetic.group(config, shape, options.recompute)
        )
        single, split = (
            next(row for row in rows if row["side"] == name)
            for name in ("TRL, 1 row", "ours, split")
        )
        about = {
            "device": ours.device,
            "shape": str(shape),
            "sizes": against_rows.sizes(config),
            "computed_again": options.recompute,
            "split_memory_ratio": single["bytes"] / split["bytes"],
        }
        measuring.report(
            options, "against_trl", rows, **about, versions=measuring.versions("trl", "accelerate")
        )


if __name__ == "__main__":
    main()
