"""The lengths of one step, and how it is cut into what runs together.

A group is a prompt with its completions. A prompt's last token runs with the completions, whose
first token it predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from opd.planner import Lengths, Rows


class View(NamedTuple):
    """An image as a policy sees it: `patches`, which make `visual` of the prompt's `tokens`, and
    pairs of patches that attend to each other in all layers of the tower together; cut into
    `pieces` for the tower."""

    patches: int
    pairs: int
    visual: int
    tokens: int
    pieces: int = 1

    @property
    def before(self) -> int:
        """Tokens that run as the prompt: all but the last."""
        return self.tokens - 1


@dataclass(frozen=True)
class Work:
    """A step: `prompts` groups of `completions` completions of `tokens` tokens each.

    Micro-batches that are differentiated have `budget` padded tokens, those that are sampled have
    `room`. `rows` of the data differ; 0: no more than the step's own.
    """

    prompts: int
    completions: int
    tokens: int
    student: View
    teacher: View
    budget: int
    room: int = 0
    rows: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longer prompt."""
        return max(self.student.tokens, self.teacher.tokens)

    @property
    def group(self) -> int:
        """Padded tokens of one group where it is differentiated."""
        return self.longest + self.completions * self.tokens

    @property
    def sample(self) -> int:
        """Padded tokens of one group where it is sampled."""
        return self.student.tokens + self.completions * self.tokens

    @property
    def together(self) -> int:
        """Groups of a micro-batch; a group above the budget is alone."""
        return min(self.prompts, max(1, self.budget // self.group))

    @property
    def split(self) -> int:
        """Completions of a group that run at a time; 0: all (`opd.method.microbatch`)."""
        few = max(1, (self.budget - self.longest) // self.tokens)
        return few if self.together == 1 and few < self.completions else 0

    @property
    def calls(self) -> int:
        """Micro-batches of a step."""
        return math.ceil(self.prompts / self.together)

    @property
    def sampled(self) -> int:
        """Groups that are sampled together."""
        return min(self.prompts, max(1, self.room // self.sample))

    def lengths(self, groups: int, view: View) -> Lengths:
        """Rows that run together of so many groups, where a policy sees `view`."""
        patches = Rows("patches", groups * view.pieces, view.patches // view.pieces)
        count = groups * (self.split or self.completions)
        new = Rows("completions", count, self.tokens, view.before)
        return Lengths(patches, Rows("prompts", groups, view.before), new)
