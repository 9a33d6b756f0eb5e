"""Checks that token ids have a row in the embedding: for an id beyond the table, torch raises an
error of its own, and MLX reads foreign memory."""

from __future__ import annotations

from collections.abc import Sequence

from opd.errors import ModelError
from opd.types import Completion, Group, Prompt


def check_ids(prompts: Sequence[Prompt | Completion], groups: Sequence[Group], rows: int) -> None:
    """Raises ModelError if a prompt or completion, alone or of a group, has a token id outside of
    0..`rows` - 1, where `rows` counts the rows of the embedding."""
    sequences = [*prompts]
    for group in groups:
        sequences += [group.student, group.teacher, *group.completions]
    for sequence in sequences:
        tokens = sequence.tokens
        wrong = tokens[(tokens < 0) | (tokens >= rows)]
        if len(wrong):
            raise ModelError(
                f"token id {wrong[0]} is beyond the model's embedding, which has {rows} rows: the"
                " tokenizer is of another model"
            )
