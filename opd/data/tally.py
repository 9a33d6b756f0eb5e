"""Counts rows by the kind of a fault or a doubt."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

TOLD = 5
"""Number of rows that are named of each kind, and of pairs of pictures."""

KINDS = 200
"""Largest number of kinds; rows of further kinds are counted together."""


@dataclass
class Tally:
    """Rows by kind: how many, and the first as "file:line: reason"."""

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    first: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, source: str, reason: str) -> None:
        """Counts the row `source`."""
        if kind not in self.counts and len(self.counts) >= KINDS:
            kind = "other reasons"
        self.counts[kind] += 1
        if len(self.first[kind]) < TOLD:
            self.first[kind].append(f"{source}: {reason}")

    def result(self) -> dict[str, dict[str, Any]]:
        """{kind: {"count", "first"}}, the most frequent kind first."""
        ordered = sorted(self.counts.items(), key=lambda entry: (-entry[1], entry[0]))
        return {kind: {"count": count, "first": self.first[kind]} for kind, count in ordered}
