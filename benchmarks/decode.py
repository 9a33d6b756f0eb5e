"""Does a token step of the rollout read the weights and the prompts' keys and values only once?

    python -m benchmarks.decode [--prompt 512 --groups 2 --n 8] [--json] [--quick]

A token step should read the weights once for all groups, and a prompt's keys and values once for
all completions of that prompt. The benchmark counts the bytes of all operands of matrix products,
attention and copies in one token step (the second token of a rollout). An operand that is expanded
n times counts n times, because a kernel reads it n times. `weights` counts parameters, `prompt`
counts keys and values of the prompts. The completions' keys and values and the activations are
left out: they are equally large on both sides.

The other side is transformers' `generate` on all rows at once, where every row has a copy of the
prompt's keys and values; it samples the same distribution. The least is every weight of the
language model once, and the keys and values of every prompt once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import against_rows, measuring, workload
from opd.types import Prompt, Sampling

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "matmul", "linear")
COPIES = ("clone", "copy", "_to_copy", "cat")
TOKENS = 8
"""The length of a timed rollout, in tokens."""


class Read(TorchDispatchMode):
    """Counts the bytes that products and copies read while the mode is active.

    `weights` sums operands in the storage of `model`'s parameters. `prompt` sums operands of
    `width` by at least `long` rows, which are keys and values of a prompt.
    """

    def __init__(self, model: Any, long: int, width: int) -> None:
        super().__init__()
        self.weights = self.prompt = 0
        self._long, self._width = long, width
        self._storages = {
            parameter.untyped_storage().data_ptr() for parameter in model.parameters()
        }

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__.startswith(PRODUCTS + COPIES):
            leaves = tree_leaves((args, kwargs))
            for operand in (leaf for leaf in leaves if isinstance(leaf, torch.Tensor)):
                size = operand.numel() * operand.element_size()
                if operand.untyped_storage().data_ptr() in self._storages:
                    self.weights += size
                elif self._keys_or_values(operand):
                    self.prompt += size
        return function(*args, **(kwargs or {}))

    def _keys_or_values(self, operand: torch.Tensor) -> bool:
        long = max(operand.shape[-2:])
        return long >= self._long and sorted(operand.shape[-2:]) == sorted((self._width, long))


def of_a_step(run: Callable[[int], None], model: Any, long: int, width: int) -> tuple[int, int]:
    """Bytes (weights, prompt) that one token step reads: a rollout of three tokens minus one of
    two."""
    counts = []
    for tokens in (3, 2):
        with Read(model, long, width) as read:
            run(tokens)
        counts.append((read.weights, read.prompt))
    return counts[0][0] - counts[1][0], counts[0][1] - counts[1][1]


def ours(
    backend: Any, prompts: Sequence[Prompt], n: int, banned: Sequence[int]
) -> Callable[[int], None]:
    """Returns a function that samples n completions of a given length with our backend."""
    draws = np.random.default_rng(0).random((len(prompts), n, TOKENS), dtype=np.float32)
    return lambda tokens: (
        backend.sample(prompts, draws[:, :, :tokens], Sampling(1.0, (), tuple(banned))) and None
    )


def transformers_rows(model: Any, prompts: Sequence[Prompt], n: int) -> Callable[[int], None]:
    """Returns a function that does the same by `generate`, with all rows in one batch."""
    rows = [prompt for prompt in prompts for _ in range(n)]
    ids = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64))
    images = {
        name: torch.from_numpy(np.concatenate([row.images[name] for row in rows]))
        for name in rows[0].images
    }
    images["image_grid_thw"] = images["image_grid_thw"].long()
    kinds = (ids == model.config.image_token_id).long()

    def run(tokens: int) -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=kinds,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
                **images,
            )

    return run


def step_weights(model: Any) -> int:
    """Bytes of the float32 matrices that a token step must read: the language model's layers and
    the head."""
    text = model.config.text_config
    layers = (
        value.numel()
        for name, value in model.named_parameters()
        if ".language_model.layers." in name and value.ndim == 2
    )
    return 4 * (sum(layers) + text.vocab_size * text.hidden_size)


def keys_values(config: Any, groups: int, long: int) -> int:
    """Bytes of the float32 keys and values of `groups` prompts of `long` tokens."""
    text = config.text_config
    return 4 * 2 * groups * long * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def main() -> None:
    parser = measuring.arguments(__doc__)
    against_rows.shape_options(parser)
    parser.set_defaults(prompt=512)
    parser.add_argument("--groups", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        path, config, group = against_rows.case(options, Path(root) / "model")
        _, backend = against_rows.of_torch(path, group)
        import transformers

        stock = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        prompts = [
            workload.prompt(config, len(group.student), seed) for seed in range(options.groups)
        ]
        banned = (config.image_token_id, config.video_token_id)
        long = len(group.student) - 1
        least_weights, least = step_weights(stock), keys_values(config, options.groups, long)
        rows = []
        for n in (1, options.n):
            sides = {
                "ours": ours(backend, prompts, n, banned),
                "transformers": transformers_rows(stock, prompts, n),
            }
            models = {"ours": backend._student.module, "transformers": stock}
            for name, run in sides.items():
                weights, keys = of_a_step(run, models[name], long, config.text_config.head_dim)
                row = {
                    "side": f"{name}, n {n}",
                    "weights": weights,
                    "of least weights": weights / least_weights,
                    "prompt": keys,
                }
                rows.append({**row, "of least prompt": keys / least})
            if not options.no_wall:
                repeats = 1 if options.quick else options.repeats
                whole = measuring.seconds(
                    {name: (lambda run=run: run(TOKENS)) for name, run in sides.items()}, repeats
                )
                begun = measuring.seconds(
                    {name: (lambda run=run: run(1)) for name, run in sides.items()}, repeats
                )
                for row, name in zip(rows[-2:], sides, strict=True):
                    row["seconds a token"] = (whole[name] - begun[name]) / (TOKENS - 1)
            rows[-1]["prompt_ratio"] = rows[-1]["prompt"] / rows[-2]["prompt"]
            if not options.no_wall:
                rows[-1]["wall_ratio"] = rows[-1]["seconds a token"] / rows[-2]["seconds a token"]
        about = {
            "device": backend.device,
            "shape": f"P {long + 1}, {options.groups} groups",
            "sizes": against_rows.sizes(config),
        }
        measuring.report(options, "decode", rows, **about, versions=measuring.versions())


if __name__ == "__main__":
    main()
