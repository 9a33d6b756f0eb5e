"""Results as tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROWS = (("full_accuracy", "full image"), ("crop_accuracy", "evidence crop"), ("gap", "gap"), ("agreement", "agreement"))


def before_after(summary: Mapping[str, Any], folder: Path) -> None:
    """Accuracies before and after a run, the share of the gap that was closed, and where everything is."""
    console = Console()
    if "before" in summary:
        before, after = summary["before"], summary["after"]
        table = Table(
            title=f"{before['rows']} examples, {summary['steps']} steps, {summary['seconds']:.0f} s on {summary['device']}",
            title_justify="left",
        )
        for heading in ("", "before", "after", "change"):
            table.add_column(heading, justify="left" if not heading else "right")
        for key, title in ROWS:
            if key in before:
                table.add_row(title, _with_interval(before, key), _with_interval(after, key), f"{100 * (after[key] - before[key]):+.1f}")
        console.print(table)
        if "gap_closed" in summary:
            console.print(f"gap closed: {_with_interval(summary, 'gap_closed')} %  (95 % intervals, paired over examples)", highlight=False)
    console.print(f"model: {folder / 'model'}   metrics: {folder / 'metrics.jsonl'}", highlight=False, soft_wrap=True)


def _with_interval(values: Mapping[str, Any], key: str) -> str:
    low, high = values[f"{key}_interval"]
    return f"{100 * values[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
