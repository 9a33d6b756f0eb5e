"""Prints results as tables on stdout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from opd.errors import plural
from opd_cli.console import Terminal, cell

if TYPE_CHECKING:
    from opd.backend import State
    from opd.measure.gap import Answered
    from opd.testing.conformance import Result

MANY_CUT = 0.05
"""A note is printed if more than this share of completions was cut off at rollout.max_tokens; a
good run has 1 to 2 %."""

ROWS = (
    ("full_accuracy", "full image"),
    ("crop_accuracy", "evidence crop"),
    ("gap", "gap"),
    ("agreement", "agreement"),
)


def before_after(summary: Mapping[str, Any], folder: Path) -> None:
    """Prints accuracies in percent before and after a run, the share of the gap that was closed,
    and where the results are."""
    console = Terminal()
    if "before" in summary:
        before, after = summary["before"], summary["after"]
        if fell := _fell(summary):
            console.print(Text(fell, style="bold red"), soft_wrap=True)
        rows = _rows({**before, "rows_skipped": summary["rows_not_measured"]})
        title = (
            f"{rows}, {plural(summary['steps'], 'step')}, {summary['seconds']:.0f} s on"
            f" {summary['device']}"
        )
        # Printed before the table, which would wrap a title to its width.
        console.print(cell(title, "bold"), soft_wrap=True)
        table = _table("", "before", "after", "change")
        for key, title in ROWS:
            if key in before:
                # If the gap closes because the crop's accuracy falls, its change would look like
                # success.
                hidden = key == "gap" and fell and summary["full_change_interval"][0] <= 0
                change = "-" if hidden else f"{100 * (after[key] - before[key]):+.1f}"
                table.add_row(title, _percent(before, key), _percent(after, key), change)
        if table.row_count:
            console.print(table)
        if "gap_closed" in summary:
            console.print(
                f"gap closed: {_percent(summary, 'gap_closed')} %  (95 % intervals)",
                highlight=False,
            )
        elif "gap" in before:
            console.print(
                "gap closed: no gap was certain before training  (95 % intervals)", highlight=False
            )
        if alone := _full_alone(before):
            console.print(alone, highlight=False, soft_wrap=True)
    cut, drawn = summary["completions_truncated"], summary["completions"]
    if cut > MANY_CUT * drawn:
        console.print(
            f"{cut} of {plural(drawn, 'completion')} were cut off at rollout.max_tokens",
            highlight=False,
        )
    kind = "adapter" if (folder / "adapter").is_dir() else "model"
    console.print(f"{kind}: {folder / kind}", soft_wrap=True)
    console.print(f"metrics: {folder / 'metrics.jsonl'}", soft_wrap=True)


def _fell(summary: Mapping[str, Any]) -> str:
    """A line that says which accuracy fell significantly, and which one rose; empty if none
    fell."""
    if summary["verdict"] not in ("worse", "collapsed"):
        return ""
    changes: dict[str, list[str]] = {"fell": [], "rose": []}
    for name, view in (("full", "the full image"), ("crop", "the evidence crop")):
        if f"{name}_change_interval" not in summary:  # no row has a crop
            continue
        low, high = summary[f"{name}_change_interval"]
        before, after = (100 * summary[when][f"{name}_accuracy"] for when in ("before", "after"))
        if high < 0 or low > 0:
            changes["fell" if high < 0 else "rose"].append(
                f"on {view} from {before:.1f} to {after:.1f} %"
            )
    clauses = [f"{verb} {' and '.join(views)}" for verb, views in changes.items() if views]
    verdict = ""
    if summary["verdict"] == "collapsed":
        verdict = "the model collapsed: "
    elif not changes["rose"]:
        verdict = "the model got worse: "
    return f"{verdict}accuracy {', and '.join(clauses)}"


def measured(result: Mapping[str, Any], model: str, device: str) -> None:
    """Prints accuracies in percent of one measurement of `model`."""
    table = _table("", "% [95 % interval]")
    for key, name in ROWS:
        if key in result:
            table.add_row(name, _percent(result, key))
    console = Terminal()
    console.print(cell(f"{model}: {_rows(result)}, on {device}", "bold"), soft_wrap=True)
    if table.row_count:
        console.print(table)
    if alone := _full_alone(result):
        console.print(alone, highlight=False, soft_wrap=True)


def compared(result: Mapping[str, Any], model: str, device: str) -> None:
    """Prints what `model` answers on several views, as `opd.measure.compare.report` gives it, and
    the differences between them: of accuracy, or of certainty if no row has an answer."""
    console = Terminal()
    console.print(cell(f"{model}: {_rows(result)}, on {device}", "bold"), soft_wrap=True)
    views: Mapping[str, Mapping[str, Any]] = result["views"]
    judged = any("accuracy" in view for view in views.values())
    headings = ["% right [95 %]"] if judged else []
    table = _table("", *headings, "as full", "certainty", "tokens", "rows")
    for name, view in views.items():
        table.add_row(name, *_view_cells(view, judged))
    console.print(table)
    key, scale, digits = ("difference", 100, 1) if judged else ("certainty_difference", 1, 3)
    heading = "% right [95 % interval]" if judged else "nats/token [95 % interval]"
    pairs = _table("", heading, "rows")
    for pair in result["pairs"]:
        if key in pair:
            low, high = pair["interval" if judged else f"{key}_interval"]
            value, low, high = (f"{scale * end:+.{digits}f}" for end in (pair[key], low, high))
            rows = pair["rows_with_answer" if judged else "rows"]
            pairs.add_row(f"{pair['b']} - {pair['a']}", f"{value} [{low}, {high}]", f"{rows:,}")
    if pairs.row_count:
        console.print(pairs)
    if alone := result["full_alone"]:
        line = f"{plural(alone, 'example')} without another view: the full image alone was measured"
        console.print(line, highlight=False, soft_wrap=True)


def _view_cells(view: Mapping[str, Any], judged: bool) -> list[str]:
    """The cells of a view: accuracy if any row has an answer, agreement with the full image's
    answer, certainty, tokens of a prompt, and rows; "-" for what was not measured."""
    accuracy = _interval(view["accuracy"], view["interval"]) if "accuracy" in view else "-"
    return [
        *([accuracy] if judged else []),
        f"{100 * view['agreement']:.1f}" if "agreement" in view else "-",
        f"{view['certainty']:.3f}" if "certainty" in view else "-",
        f"{view['prompt_tokens']:,.0f}" if "prompt_tokens" in view else "-",
        f"{view['rows']:,}",
    ]


def answers(rows: Sequence[tuple[str, Answered]]) -> None:
    """Prints questions with the answers on the full image and on the crop; correct answers are
    green, wrong ones red."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("question", "answer", "on the full image", "on the crop"):
        table.add_column(heading, overflow="fold")
    for question, answered in rows:
        table.add_row(
            question,
            _reference(answered.answer),
            _judged(answered.full, answered.full_right),
            _judged("-" if answered.crop is None else answered.crop, answered.crop_right),
        )
    Terminal().print(table)


BUDGETS = {
    "checkpoint_above": ("activations of a backward", "model.recompute_above"),
    "prefill_tokens": ("prompt tokens read together", "rollout.sample_tokens"),
    "feature_bytes": ("image features of a frozen tower", ""),
    "uploaded_bytes": ("images between passes of a step", ""),
}
"""A device's budgets in words, with the key of the recipe that bounds them."""


def backend_table(states: Mapping[str, State], automatic: str) -> None:
    """Prints every backend with its device, or with what is missing, then what those that can run
    here hold on their device at most."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("backend", "device", "missing"):
        table.add_column(heading, overflow="fold")
    for name, state in states.items():
        table.add_row(
            f"{name} (auto)" if name == automatic else name, state.device or "-", state.missing
        )
    Terminal().print(table)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("backend", "budget", "", "key of the recipe"):
        table.add_column(heading, overflow="fold", justify="left" if heading else "right")
    for name, state in states.items():
        held = {budget: most for budget, most in state.budgets.items() if most}
        for number, (budget, most) in enumerate(held.items()):
            size = str(most) if budget.endswith("tokens") else f"{most / 2**30:.2f} GiB"
            what, key = BUDGETS.get(budget, (budget, ""))
            table.add_row("" if number else name, what, size, key)
    if table.row_count:
        Terminal().print(table)


def check_table(name: str, device: str, checks: Sequence[Result]) -> None:
    """Prints every check with error and bound."""
    passed = sum(check.passed for check in checks)
    table = Table(
        title=f"{name} on {device}: {passed} of {len(checks)} checks passed",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("check", "error", "bound", ""):
        table.add_column(heading, justify="right" if heading in ("error", "bound") else "left")
    for check in checks:
        verdict = (
            Text("passed", style="green") if check.passed else Text("FAILED", style="bold red")
        )
        table.add_row(check.name, f"{check.error:.1e}", f"{check.bound:.0e}", verdict)
    Terminal().print(table)


def planned(result: Mapping[str, Any]) -> None:
    """Prints parameters, memory, stages and devices of a plan, and the largest step that fits.

    `result` is the object that `opd plan --json` prints.
    """
    console = Terminal()
    say = partial(console.print, highlight=False, soft_wrap=True)
    _say_step(say, result)
    console.print(_parameters_table(result["parameters"]))
    console.print(_memory_table(result["memory"]))
    if result["memory"]["checkpointed"]:
        say("activations: each layer is recomputed in the backward pass")
        say()
    console.print(_stages_table(result))
    say(f"the whole run, {result['steps']} steps: {_number(result['hours'])} hours")
    if result["shorter"]:
        say(
            f"shortest with one change: {_number(result['shorter']['hours'])} hours with --set"
            f" {result['shorter']['change']}"
        )
    say()
    if result["measured"]:
        console.print(_measured_table(result["measured"]))
    console.print(_devices_table(result))
    _say_assumptions(say, result)
    say()
    _say_largest_step(say, result)


def _say_step(say: Callable[..., None], result: Mapping[str, Any]) -> None:
    """Prints the planned step: sizes of images and prompts, notes, and micro-batches."""
    device, batch, assumed = result["device"]["name"], result["microbatch"], result["assumed"]
    say(cell(f"{result['model']} on {device}, {result['backend']}, {result['dtype']}", "bold"))
    width, height = assumed["image"]
    crop_width, crop_height = assumed["crop"]
    crop_tokens = plural(assumed["crop_prompt_tokens"], "token")
    say(
        f"image {width}x{height}: prompt of {plural(assumed['prompt_tokens'], 'token')},"
        f" {assumed['text_tokens']} of them text"
    )
    say(f"crop {crop_width}x{crop_height}: prompt of {crop_tokens}")
    for note in result["notes"]:
        say(cell(note, "yellow"))
    say(
        f"step: {plural(assumed['prompts'], 'prompt')} x"
        f" {plural(assumed['completions'], 'completion')} of"
        f" {plural(assumed['completion_tokens'], 'token')}"
    )
    at_once = ""
    if batch["completions"] != assumed["completions"]:
        at_once = f", {plural(batch['completions'], 'completion')} at a time"
    say(
        f"micro-batches: {batch['count']} of {plural(batch['groups'], 'prompt')}{at_once},"
        f" {plural(batch['tokens'], 'token')} each"
    )
    say(f"sampled together: {plural(result['sampling']['groups'], 'prompt')}")
    say()


def _parameters_table(parameters: Mapping[str, Mapping[str, int]]) -> Table:
    """All and trained parameters, by part of the model."""
    table = _table("parameters", "all", "trained")
    for part, count in parameters.items():
        table.add_row(part, _count(count["all"]), _count(count["trained"]))
    every = sum(count["all"] for count in parameters.values())
    trained = sum(count["trained"] for count in parameters.values())
    table.add_row("sum", _count(every), _count(trained))
    return table


def _memory_table(memory: Mapping[str, Any]) -> Table:
    """Memory by part and by phase; a tilde marks a rough estimate."""
    table = _table("memory", "bytes", "")
    bound = {"kept image features": f"grows, to at most {_bytes(memory['kept_features_bound'])}"}
    for part, size in memory["held"].items():
        table.add_row(part, _bytes(size), bound.get(part, "always"))
    for part, size in memory["parts"].items():
        if part in memory["rough"]:
            table.add_row(part, f"~ {_bytes(size)}", "at times, roughly")
        else:
            table.add_row(part, _bytes(size), "at times")
    table.add_section()
    for phase, size in memory["phases"].items():
        table.add_row(f"peak of {phase}", _bytes(size), "")
    table.add_row("peak", _bytes(memory["peak"]), f"of {_bytes(memory['usable'])} usable")
    table.add_row("checkpoint on disk", _bytes(memory["disk"]), "")
    return table


def _stages_table(result: Mapping[str, Any]) -> Table:
    """Operations and seconds of a step, by stage."""
    table = _table(f"one step on {result['device']['name']}", "TFLOP", "seconds")
    for name, stage in result["stages"].items():
        table.add_row(name, _number(stage["operations"] / 1e12), _number(stage["seconds"]))
    operations = sum(stage["operations"] for stage in result["stages"].values())
    table.add_row("sum", _number(operations / 1e12), _number(result["seconds"]))
    return table


def _measured_table(measured: Mapping[str, Any]) -> Table:
    """Seconds and peak of one micro-batch, as planned and as measured on this machine."""
    table = _table("measured here", "planned", "measured")
    planned = measured["planned_seconds"]
    for verb, seconds in measured["seconds"].items():
        table.add_row(f"{verb}, s a step", _number(planned[verb]), _number(seconds))
    sums = sum(planned.values()), sum(measured["seconds"].values())
    table.add_row("sum, s a step", *map(_number, sums))
    table.add_row("peak", _bytes(measured["planned_peak"]), _bytes(measured["peak"]))
    return table


def _devices_table(result: Mapping[str, Any]) -> Table:
    """The plan on every known device."""
    table = _table("devices", "TFLOP/s", "GB/s", "GB", "s/step", "hours", "peak", "")
    table.columns[0].no_wrap = True
    for device in result["devices"]:
        table.add_row(
            device["name"],
            _number(device["matmul"][result["dtype"]] / 1e12),
            _number(device["bandwidth"] / 1e9),
            f"{device['memory'] / 1e9:.0f}",
            _number(device["seconds"]),
            _number(device["hours"]),
            _bytes(device["peak"]),
            _fits(device),
        )
    return table


def _say_assumptions(say: Callable[..., None], result: Mapping[str, Any]) -> None:
    """Prints the assumed shares of the devices' peaks, and the source of the device's numbers."""
    shares: dict[tuple[float, float], list[str]] = {}
    for device in result["devices"]:
        share = device["matmul_share"], device["bandwidth_share"]
        shares.setdefault(share, []).append(device["name"])
    for (matmul, bandwidth), names in shares.items():
        devices = ", ".join(names) if len(names) < 3 else "all others"
        say(f"taken: {matmul:.0%} of peak TFLOP/s, {bandwidth:.0%} of peak GB/s ({devices})")
    say("not counted: starting kernels, for which small models wait on a GPU")
    say(cell(f"{result['device']['name']}: {result['device']['source']}"))


def _say_largest_step(say: Callable[..., None], result: Mapping[str, Any]) -> None:
    """Prints the largest step that fits; if not even one prompt does, the changes that help."""
    device, usable = result["device"]["name"], result["memory"]["usable"]
    tokens, sample_tokens = result["microbatch"]["largest"], result["sampling"]["largest"]
    if tokens and sample_tokens:
        say(f"largest step that fits on {device}:")
        say(
            f"  --set rollout.microbatch_tokens={tokens}"
            f" --set rollout.sample_tokens={sample_tokens}"
        )
        return
    advice = "one change each, and its peak:" if result["smaller"] else "no single change helps"
    say(f"not even one prompt fits on {device}; {advice}")
    for change, peak in sorted(result["smaller"].items(), key=lambda pair: int(pair[1])):
        say(f"  {_bytes(peak):>8}  --set {change}" + ("  fits" if peak <= usable else ""))


def _fits(device: Mapping[str, Any]) -> Text:
    """Whether a step fits the device; if it is sold with several memories, the smallest that
    suffices."""
    sizes = [size for size in device["memories"] if device["peak"] <= size * device["usable"]]
    if not device["fits"]:
        return Text("too large", style="red")
    return Text(
        f"from {sizes[0] / 1e9:.0f} GB" if len(device["memories"]) > 1 else "fits", style="green"
    )


def _bytes(size: float) -> str:
    """A size in GB, or in MB below 0.1 GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _count(count: float) -> str:
    """A number of parameters in millions."""
    return f"{count / 1e6:,.2f} M"


def _number(value: float) -> str:
    """A number with three digits, with two below 0.1, or one below 0.001."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 0.001:
        return f"{value:#.3g}" if value >= 0.1 else f"{value:#.2g}"
    return f"{value:.0e}" if value else "0"


def _table(title: str, *headings: str) -> Table:
    """A table whose first column has no heading, and whose other columns hold numbers."""
    table = Table(
        title=cell(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    for heading in headings:
        table.add_column(cell(heading), justify="right", no_wrap=True)
    return table


def _rows(result: Mapping[str, Any]) -> str:
    """The number of examples in words, and how many of them have an answer or were skipped."""
    judged, skipped = result["rows_with_answer"], result.get("rows_skipped", 0)
    answers = "" if judged == result["rows"] else f", {judged} of them with an answer"
    return f"{plural(result['rows'], 'example')}{answers}" + (
        f", {skipped} skipped" if skipped else ""
    )


def _full_alone(result: Mapping[str, Any]) -> str:
    """A line about the rows that were measured on the full image alone; empty if there are none."""
    rows = result["rows"] - result.get("crop_rows", result["rows"])
    if not rows:
        return ""
    line = f"{plural(rows, 'example')} without evidence: the full image alone was measured"
    answers = "" if result["rows_with_answer"] else ", and there are no answers to compare with"
    return f"{line}{answers}"


def _reference(answer: str | Sequence[str] | None) -> str:
    """The reference answer or answers as one text."""
    return answer if isinstance(answer, str) else " | ".join(answer or ["-"])


def _judged(text: str, right: bool | None) -> Text:
    """An answer in green if it is right, in red if it is wrong; `right` None: neither."""
    return cell(text.strip(), "" if right is None else "green" if right else "red")


def _percent(values: Mapping[str, Any], key: str) -> str:
    """A share in percent with the interval."""
    return _interval(values[key], values[f"{key}_interval"])


def _interval(share: float, interval: Sequence[float]) -> str:
    """A share in percent with its interval."""
    low, high = interval
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
