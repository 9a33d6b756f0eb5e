"""The chat template that is trained and exported. Reasoning models are trained with thinking off;
exported chat templates already switch it off.

If a template takes `enable_thinking`, it is set to false; if a template always opens a think block,
the block is closed in the generation prompt.
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
"""JSON files that may hold chat templates."""

JINJA, OTHERS = "chat_template.jinja", "additional_chat_templates"
"""The file of the default template, and the folder of templates with other names."""

Render = Callable[[str], str]
"""Renders a template: the text of one user's turn, with the generation prompt."""


def trained(template: str, render: Render) -> str:
    """The template with thinking off; unchanged if the template has no thinking, or has it off
    already."""
    if "enable_thinking" in template and not template.startswith(OFF):
        template = OFF + template
    prompt = render(template)
    if not prompt.rstrip().endswith(OPEN):
        return template
    rest = ("\n" if prompt.endswith("\n") else "\n\n") + CLOSE
    # Jinja drops the newline that ends a template; appended text would bring it back.
    return (
        f"{template.removesuffix(chr(10))}{{% if add_generation_prompt %}}{{{{ {json.dumps(rest)}"
        " }}{% endif %}"
    )


def chosen(folder: Path, tokenizer: Any) -> str:
    """The default chat template of a model folder: the processor's, or the tokenizer's if the
    processor has none. Raises ModelError.

    transformers resolves the files: a processor prefers processor_config.json, then
    chat_template.json, then chat_template.jinja; a tokenizer prefers chat_template.jinja, then
    tokenizer_config.json.
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
    """Writes the trained `template` into every file of a model folder that holds a default
    template, since programs prefer different files.

    Templates with other names, such as those for tools, are kept, with thinking off. A file that
    already holds the right template is not written.
    """
    default, others = folder / JINJA, sorted((folder / OTHERS).glob("*.jinja"))
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
            # If a tokenizer has several templates by name, chat_template.jinja would hide them.
            read |= name != "tokenizer_config.json" or not isinstance(content["chat_template"], str)
    if default.is_file() or not read:
        before = default.read_text(encoding="utf-8") if default.is_file() else None
        _replace(default, before, template)


def _with(held: Any, template: str, render: Render) -> Any:
    """`held`, a file's one template or several by name, with the default template replaced."""
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
    """Templates by name; a file holds them as an object or as a list."""
    pairs = (
        held.items()
        if isinstance(held, dict)
        else [(one.get("name"), one.get("template")) for one in held if isinstance(one, dict)]
    )
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _replace(file: Path, before: Any, after: Any, write: Callable[[Any], str] = str) -> None:
    """Writes `after` into the file unless it equals `before`, the present content."""
    if after != before:
        file.write_text(write(after), encoding="utf-8")
