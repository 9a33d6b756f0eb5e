"""Token ids against the embedding: beyond the table, torch raises and MLX reads whatever stands
there."""

from __future__ import annotations

from collections.abc import Sequence

from opd.errors import ModelError
from opd.types import Group, Prompt


def check_ids(prompts: Sequence[Prompt], groups: Sequence[Group], rows: int) -> None:
    """Raises ModelError for a token of a prompt or completion that is none of an embedding's
    `rows`."""
    every = [
        *(prompt.tokens for prompt in prompts),
        *(policy.tokens for group in groups for policy in (group.student, group.teacher)),
        *(
            completion.tokens
            for group in groups
            for completion in group.completions
            if len(completion.tokens)
        ),
    ]
    for tokens in every:
        wrong = tokens[(tokens < 0) | (tokens >= rows)]
        if len(wrong):
            raise ModelError(
                f"token id {wrong[0]} is beyond the model's embedding, which has {rows} rows: the"
                " tokenizer is of another model"
            )
