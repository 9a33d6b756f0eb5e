"""Results as tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from opd.backend import State
    from opd.measure import Answered
    from opd.testing import Result

MANY_CUT = 0.05
"""Share of completions cut off at their longest from which a person is told; a good run has 1-2 %."""

ROWS = (("full_accuracy", "full image"), ("crop_accuracy", "evidence crop"), ("gap", "gap"), ("agreement", "agreement"))


def before_after(summary: Mapping[str, Any], folder: Path) -> None:
    """Accuracies in percent before and after a run, the share of the gap that was closed, and where everything is."""
    console = Console()
    if "before" in summary:
        before, after = summary["before"], summary["after"]
        table = _table(
            f"{_rows(before)}, {summary['steps']} steps, {summary['seconds']:.0f} s on {summary['device']}",
            "before",
            "after",
            "change",
        )
        for key, title in ROWS:
            if key in before:
                table.add_row(title, _percent(before, key), _percent(after, key), f"{100 * (after[key] - before[key]):+.1f}")
        console.print(table)
        if "gap_closed" in summary:
            console.print(f"gap closed: {_percent(summary, 'gap_closed')} %  (95 % intervals)", highlight=False)
    cut, drawn = summary["completions_truncated"], summary["completions"]
    if cut > MANY_CUT * drawn:
        console.print(f"{cut} of {drawn} completions were cut off at rollout.max_tokens", highlight=False)
    kind = "adapter" if (folder / "adapter").is_dir() else "model"
    console.print(f"{kind}: {folder / kind}\nmetrics: {folder / 'metrics.jsonl'}", highlight=False, soft_wrap=True)


def measured(result: Mapping[str, Any], model: str, device: str) -> None:
    """Accuracies in percent of one measurement of `model`."""
    table = _table("", "% [95 % interval]")
    for key, name in ROWS:
        if key in result:
            table.add_row(name, _percent(result, key))
    console = Console()
    console.print(Text(f"{model}: {_rows(result)}, on {device}", style="bold"), soft_wrap=True)
    console.print(table)


def answers(rows: Sequence[tuple[str, Answered]]) -> None:
    """Questions with the answers on the full image and on the crop; right ones green, wrong ones red where that is known."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("question", "answer", "on the full image", "on the crop"):
        table.add_column(heading, overflow="fold")
    for question, one in rows:
        table.add_row(Text(question), Text(one.answer or "-"), _judged(one.full, one.full_right), _judged(one.crop, one.crop_right))
    Console().print(table)


def backend_table(states: Mapping[str, State], automatic: str) -> None:
    """Every backend, and what is missing where it cannot run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("backend", "device", "missing"):
        table.add_column(heading, overflow="fold")
    for name, state in states.items():
        table.add_row(f"{name} (auto)" if name == automatic else name, state.device or "-", Text(state.missing))
    Console().print(table)


def check_table(name: str, device: str, checks: Sequence[Result]) -> None:
    """Every check with its error and bound."""
    passed = sum(check.passed for check in checks)
    table = Table(
        title=f"{name} on {device}: {passed} of {len(checks)} checks passed", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for heading in ("check", "error", "bound", ""):
        table.add_column(heading, justify="right" if heading in ("error", "bound") else "left")
    for check in checks:
        verdict = Text("passed", style="green") if check.passed else Text("FAILED", style="bold red")
        table.add_row(check.name, f"{check.error:.1e}", f"{check.bound:.0e}", verdict)
    Console().print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=Text(title) if title else None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in headings:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    return table


def _rows(result: Mapping[str, Any]) -> str:
    """How many examples, and how many of them could be judged where that is fewer."""
    judged = result["rows_with_answer"]
    return f"{result['rows']} examples" + ("" if judged == result["rows"] else f", {judged} of them with an answer")


def _judged(text: str, right: bool | None) -> Text:
    printable = "".join(letter if letter.isprintable() else " " for letter in text)  # an untrained model says anything
    return Text(printable.strip(), style="" if right is None else "green" if right else "red")


def _percent(values: Mapping[str, Any], key: str) -> str:
    low, high = values[f"{key}_interval"]
    return f"{100 * values[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
