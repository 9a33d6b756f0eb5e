"""The chat template that is trained: thinking off in the template itself, so that nobody who serves
the model has to know an argument.

A model that thinks is trained on answers alone: its generation prompt closes the think block. Where
the template takes `enable_thinking`, it is set; where it always opens a block, the block is closed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.errors import ModelError, one_line
from opd.models.files import read_json
from opd.paths import read_file

OFF = "{%- set enable_thinking = false %}"
OPEN, CLOSE = "<think>", "</think>\n\n"

JSON = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Files that may hold templates beside chat_template.jinja."""

JINJA, OTHERS = "chat_template.jinja", "additional_chat_templates"
"""The default template's own file, and the folder of those that have another name."""

Render = Callable[[str], str]
"""A template's generation prompt after a user's turn."""


def trained(template: str, render: Render) -> str:
    """The template whose generation prompt is trained; one that is that already, or knows no
    thinking, comes back as it is."""
    if "enable_thinking" in template and not template.startswith(OFF):
        template = OFF + template
    prompt = render(template)
    if not prompt.rstrip().endswith(OPEN):
        return template
    rest = ("\n" if prompt.endswith("\n") else "\n\n") + CLOSE
    # Jinja drops one newline at a template's end, which would not be the end any more.
    return (
        f"{template.removesuffix(chr(10))}{{% if add_generation_prompt %}}{{{{ {json.dumps(rest)}"
        " }}{% endif %}"
    )


def chosen(folder: Path, tokenizer: Any) -> str:
    """The template that the model's own processor takes; where it has none, its tokenizer's. Raises
    ModelError.

    transformers itself resolves the files: a processor prefers processor_config.json, then
    chat_template.json, then chat_template.jinja; a tokenizer chat_template.jinja, then its own
    file.
    """
    from transformers.processing_utils import ProcessorMixin

    older = folder / "chat_template.json"
    if older.is_file() and "chat_template" not in read_json(older):
        raise ModelError(f"{older} has no chat_template")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # transformers leaves a file open
            held = ProcessorMixin.get_processor_dict(folder, local_files_only=True)[0].get(
                "chat_template"
            )
    except Exception as error:
        # For broken files transformers raises OSError, ValueError, TypeError and AttributeError.
        raise ModelError(
            f"{folder}: its chat template cannot be read: {one_line(error)}"
        ) from error
    held = tokenizer.chat_template if held is None else held
    if held is None:
        raise ModelError(
            f"{folder}: the tokenizer has no chat template: neither processor nor tokenizer has a"
            " chat template of its own (chat_template.jinja, or chat_template in"
            " tokenizer_config.json or chat_template.json)"
        )
    template = _named(held).get("default") if isinstance(held, dict | list) else held
    if not isinstance(template, str):
        raise ModelError(
            f"{folder}: none of its chat templates is named 'default', which is the one that is"
            " used"
        )
    return template


def rewrite(folder: Path, template: str, render: Render) -> None:
    """Puts the trained `template` into every place of a model folder where any program looks for
    one.

    Programs differ in which place they prefer. Templates of other names, for tools perhaps, stay,
    with thinking off. A file that has the right template already is left alone.
    """
    own, others = folder / JINJA, sorted((folder / OTHERS).glob("*.jinja"))
    for file in others:
        text = read_file(file).decode("utf-8")
        _replace(file, text, template if file.stem == "default" else trained(text, render))
    read = False
    for name in JSON:
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        if content.get("chat_template"):
            changed = {
                **content,
                "chat_template": _with(content["chat_template"], template, render),
            }
            _replace(
                folder / name,
                content,
                changed,
                lambda value: json.dumps(value, indent=2, ensure_ascii=False) + "\n",
            )
            # A tokenizer that has several by name would lose them to a file with one.
            read |= name != "tokenizer_config.json" or not isinstance(content["chat_template"], str)
    if own.is_file() or not read:
        _replace(own, own.read_text(encoding="utf-8") if own.is_file() else None, template)


def _with(held: Any, template: str, render: Render) -> Any:
    """What a file holds, its default template replaced."""
    if not isinstance(held, dict | list):
        return template
    changed = {
        name: template if name == "default" else trained(text, render)
        for name, text in _named(held).items()
    }
    return (
        changed
        if isinstance(held, dict)
        else [{"name": name, "template": text} for name, text in changed.items()]
    )


def _named(held: dict[str, Any] | list[Any]) -> dict[str, str]:
    """Templates by name, of which a file may hold a list."""
    pairs = (
        held.items()
        if isinstance(held, dict)
        else [(one.get("name"), one.get("template")) for one in held if isinstance(one, dict)]
    )
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _replace(file: Path, before: Any, after: Any, write: Callable[[Any], str] = str) -> None:
    if after != before:
        file.write_text(write(after), encoding="utf-8")
