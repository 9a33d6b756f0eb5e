"""What do rollout and training of a group cost against mlx-vlm's GRPO trainer?

    python -m benchmarks.against_mlx_vlm [--prompt 512 --completion 64 --n 8] [--json] [--quick]

The benchmark compares vision patches, prompt tokens, wall time and peak memory. mlx-vlm prefills
the prompt for every completion and trains on whole rows, one after the other; its reward here is
a dummy. Our code samples the n completions of a prompt together and trains student against
teacher on the group, so it also runs a teacher.

The two losses differ. The benchmark therefore compares a gradient that both sides can compute:
with the weights -advantage / (n R (s - t)) our objective "sampled" has exactly GRPO's gradient,
the sum of -advantage / (n R) grad log p(token). Before anything is measured, the gradients of all
parameters on the same completions are asserted to be equal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from benchmarks import against_rows, measuring
from opd.objective import Objective
from opd.types import Group, Sampling

SAMPLED = Objective(form="sampled", ratio_clip=None)


@contextmanager
def counting(module: Any) -> Iterator[dict[str, int]]:
    """Counts the patches that enter the vision tower and the rows that enter the first text layer,
    until the context ends."""
    from mlx_vlm.models.qwen3_vl.vision import PatchMerger

    merger, key = module.vision_tower.merger, module.language_model.model.layers[0].self_attn.k_proj
    counts = {"vision_patches": 0, "token_rows": 0}
    merge, linear = PatchMerger.__call__, nn.Linear.__call__

    def merged(self: Any, x: mx.array) -> Any:
        counts["vision_patches"] += x.size // x.shape[-1] if self is merger else 0
        return merge(self, x)

    def keyed(self: Any, x: mx.array) -> Any:
        counts["token_rows"] += x.size // x.shape[-1] if self is key else 0
        return linear(self, x)

    with (
        mock.patch.object(PatchMerger, "__call__", merged),
        mock.patch.object(nn.Linear, "__call__", keyed),
    ):
        yield counts


class Peer:
    """mlx-vlm's GRPO task on one group."""

    def __init__(self, path: Path, group: Group) -> None:
        from mlx_vlm.trainer.vlm.grpo.config import GRPOTrainingArgs
        from mlx_vlm.trainer.vlm.grpo.trainer import make_task
        from mlx_vlm.utils import load_model

        count, length = len(group.completions), len(group.completions[0])
        self.model = load_model(path)
        prompt = group.student
        images = {name: mx.array(value) for name, value in prompt.images.items()}
        ids = mx.array(prompt.tokens)
        self.row = {
            "inputs": {"input_ids": ids, "attention_mask": mx.ones_like(ids), **images},
            "prompt": "",
            "answer": None,
        }
        self.options = GRPOTrainingArgs(
            group_size=count,
            max_completion_length=length,
            max_seq_length=len(prompt) + length,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
        )
        # No token ends a completion, so both sides generate the same number of tokens.
        self.tokenizer = SimpleNamespace(
            eos_token_ids=[], encode=lambda *_, **__: [], decode=lambda *_: ""
        )
        task = make_task(self.model, self.options, self.tokenizer, reward_funcs=[reward])
        self.gradient = task.value_and_grad_factory(self.model, False)

    def rollout(self) -> Any:
        """Generates a group's completions and computes their advantages."""
        from mlx_vlm.trainer.vlm.grpo.trainer import prepare_rollout

        rollout = prepare_rollout(
            self.model, self.tokenizer, [self.row], self.options, [reward], None
        )
        mx.eval([sample["batch"]["input_ids"] for sample in rollout["samples"]])
        return rollout

    def given(self, group: Group, advantages: np.ndarray[Any, Any]) -> Any:
        """Prepares a rollout from the completions of `group` and their advantages [n]."""
        inputs = self.row["inputs"]
        samples = []
        for completion, advantage in zip(group.completions, advantages, strict=True):
            ids = mx.concatenate([inputs["input_ids"], mx.array(completion.tokens)])[None]
            batch = {**inputs, "input_ids": ids, "attention_mask": mx.ones_like(ids)}
            samples.append(
                {
                    "batch": batch,
                    "start": len(group.student) - 1,
                    "advantage": mx.array([advantage], mx.float32),
                }
            )
        return {"samples": samples, "reward_metrics": {}}

    def train(self, rollout: Any) -> tuple[float, dict[str, Any]]:
        """Returns the loss and the gradients by MLX name."""
        (loss, _), gradients = self.gradient(self.model, rollout)
        mx.eval(loss, gradients)
        return loss.item(), dict(tree_flatten(gradients))


def reward(completions: list[str], **_: Any) -> list[float]:
    """Rewards every other completion with 1, the rest with 0."""
    return [float(number % 2) for number in range(len(completions))]


def agree(backend: Any, peer: Peer, group: Group) -> measuring.Row:
    """Compares loss and gradient of both sides on the same completions, as the module says."""
    advantages = 1.0 - 0.3 * np.arange(len(group.completions))
    tokens = len(group.completions) * len(group.completions[0])
    statistics = backend.score([group], SAMPLED)
    weights = tuple(
        (-advantage / tokens / one.divergence).astype(np.float32)
        for advantage, one in zip(advantages, statistics[0], strict=True)
    )
    weighted = [replace(group, weights=weights)]
    loss = against_rows.loss_of(weighted, backend.accumulate(weighted, SAMPLED))
    ours, backend._gradient = (
        {name: np.array(value) for name, value in backend._gradient.items()},
        {},
    )
    theirs_loss, theirs = peer.train(peer.given(group, advantages))
    return measuring.same(
        (loss, theirs_loss),
        measuring.relative_error(ours, {name: np.array(value) for name, value in theirs.items()}),
    )


def main() -> None:
    parser = measuring.arguments(__doc__)
    against_rows.shape_options(parser)
    parser.set_defaults(prompt=512, completion=64, crop=128)
    options = parser.parse_args()
    measuring.peer("mlx_vlm")
    with tempfile.TemporaryDirectory() as root:
        path, config, group = against_rows.case(options, Path(root) / "model")
        _, backend = against_rows.of_mlx(path, group)
        peer = Peer(path, group)
        errors = agree(backend, peer, group)
        rng = np.random.default_rng(0)
        uniforms = rng.random(
            (1, len(group.completions), len(group.completions[0])), dtype=np.float32
        )
        sampling = Sampling(temperature=1.0, banned=(config.image_token_id, config.video_token_id))

        def rollout() -> Group:
            return replace(
                group, completions=tuple(backend.sample([group.student], uniforms, sampling)[0])
            )

        def train(sampled: Group) -> None:
            backend.accumulate([sampled], against_rows.FULL)
            backend._gradient = {}

        ours, theirs = rollout(), peer.rollout()
        sides = {
            "rollout": (rollout, peer.rollout),
            "training": (lambda: train(ours), lambda: peer.train(theirs)),
            "both": (lambda: train(rollout()), lambda: peer.train(peer.rollout())),
        }
        rows = [
            row
            for phase, pair in sides.items()
            for row in phase_rows(phase, pair, (backend._model.module, peer.model), options)
        ]
        shape = str(against_rows.shape_of(options))
        about = {
            "device": backend.device,
            "shape": shape,
            "sizes": against_rows.sizes(config),
            **errors,
        }
        measuring.report(
            options, "against_mlx_vlm", rows, **about, versions=measuring.versions("mlx", "mlx-vlm")
        )


def phase_rows(
    phase: str, pair: tuple[Any, Any], modules: tuple[Any, Any], options: Any
) -> list[measuring.Row]:
    """Measures one phase on both sides: our row, then mlx-vlm's."""
    rows: list[measuring.Row] = []
    for name, run, module in zip(("ours", "mlx-vlm"), pair, modules, strict=True):
        with counting(module) as counts:
            run()
        rows.append(
            {"phase": phase, "side": name, **counts, "bytes": measuring.peak_bytes(run, "mlx")}
        )
    if not options.no_wall:
        runs = dict(zip(("ours", "mlx-vlm"), pair, strict=True))
        for row, value in zip(
            rows,
            measuring.seconds(runs, 1 if options.quick else options.repeats).values(),
            strict=True,
        ):
            row["seconds"] = value
    for name in ("vision_patches", "token_rows"):
        rows[1][f"{name}_ratio"] = rows[1][name] / rows[0][name]
    rows[1] |= measuring.ratios(rows[0], rows[1])
    return rows


if __name__ == "__main__":
    main()
