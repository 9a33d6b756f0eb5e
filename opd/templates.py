"""The chat template that is trained: thinking off in the template itself, so that nobody who serves the model has to know an argument.

A model that thinks is trained on answers alone: its generation prompt closes the think block. Where the template takes `enable_thinking`,
it is set; where it always opens a block, the block is closed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

OFF = "{%- set enable_thinking = false %}"
OPEN, CLOSE = "<think>", "</think>\n\n"

JSON = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Files that may hold templates beside chat_template.jinja."""

Render = Callable[[str], str]
"""A template's generation prompt after a user's turn."""


def trained(template: str, render: Render) -> str:
    """The template whose generation prompt is trained; one that is that already, or knows no thinking, comes back as it is."""
    if "enable_thinking" in template and not template.startswith(OFF):
        template = OFF + template
    prompt = render(template)
    if not prompt.rstrip().endswith(OPEN):
        return template
    rest = ("\n" if prompt.endswith("\n") else "\n\n") + CLOSE
    # Jinja drops one newline at a template's end, which would not be the end any more.
    return f"{template.removesuffix(chr(10))}{{% if add_generation_prompt %}}{{{{ {json.dumps(rest)} }}}}{{% endif %}}"


def every(found: Any, render: Render) -> Any:
    """`trained` of a template, of several by name, or of the list of them that tokenizer_config.json may hold."""
    if isinstance(found, str):
        return trained(found, render)
    if isinstance(found, dict):
        return {name: trained(template, render) for name, template in found.items()}
    return [{**one, "template": trained(one["template"], render)} for one in found]


def rewrite(folder: Path, render: Render) -> None:
    """Replaces every chat template of a model folder by the one that is trained; a file that holds it already is left alone."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        text = own.read_text(encoding="utf-8")
        _replace(own, text, trained(text, render))
    for name in JSON:
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            if content.get("chat_template"):
                changed = {**content, "chat_template": every(content["chat_template"], render)}
                _replace(folder / name, content, changed, lambda value: json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _replace(file: Path, before: Any, after: Any, write: Callable[[Any], str] = str) -> None:
    if after != before:
        file.write_text(write(after), encoding="utf-8")
