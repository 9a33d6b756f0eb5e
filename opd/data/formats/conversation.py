"""Conversations: `role` and `content` as in ms-swift, TRL and OpenAI, or `from` and `value` as in
LLaVA.

A turn's content is a text, with `<image>` at the place of a picture, or a list of blocks:
{"type": "text", "text": ...}, {"type": "image"} with or without the picture itself, and
{"type": "image_url", "image_url": {"url": ...}}.

The first turn of the user is the question, and the first answer to it the reference answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from opd.data.fields import Row, show, wrong
from opd.errors import DataError
from opd.types import IMAGE_MARKER

USERS = ("user", "human")
ANSWERS = ("assistant", "gpt", "model")
SYSTEMS = ("system", "developer")

PICTURES = ("image", "image_url", "input_image")
"""Types of blocks that stand for a picture."""

PICTURE_FIELDS = ("image", "image_url", "url", "path", "base64", "bytes")
"""Fields of such a block that hold the picture."""

TEXTS = ("text", "input_text", "output_text")

SYSTEM_UNREAD = "a system message is not read"
TURNS_UNREAD = "of several turns, the first question and its answer are read"

_TAGGED = re.compile(r"(?:<think>.*?</think>)?\s*<answer>(.*?)</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Conversation:
    """The part of a conversation that is read: the question, the answers that follow it, the
    pictures that stand in blocks, and remarks about the unread part (`opd.data.remarks`)."""

    question: str
    answers: tuple[str, ...] = ()
    pictures: tuple[Any, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def answer(self) -> str | None:
        """The first answer; None if there is none, or if it is blank."""
        return self.answers[0] if self.answers and self.answers[0] else None

    @property
    def own(self) -> Row:
        """The question, the answer and the remarks as fields of our own."""
        fields: dict[str, Any] = {"question": self.question, "remarks": self.remarks}
        return fields if self.answer is None else {**fields, "answer": self.answer}


@dataclass(frozen=True)
class _Turn:
    role: str
    text: str
    pictures: tuple[Any, ...]


def conversation(field: str, value: Any) -> Conversation:
    """Reads the conversation in a field: a list of turns, its JSON, or the question
    alone. Raises DataError."""
    turns = list(_turns(field, value))
    asked = [place for place, turn in enumerate(turns) if turn.role in USERS]
    if not asked:
        raise DataError(f"field '{field}': no turn is the user's")
    question, following = turns[asked[0]], turns[asked[0] + 1 :]
    answers = tuple(plain_answer(turn.text) for turn in following if turn.role in ANSWERS)
    told = [
        remark
        for remark, holds in (
            (SYSTEM_UNREAD, any(turn.role in SYSTEMS and turn.text.strip() for turn in turns)),
            (TURNS_UNREAD, len(asked) > 1),
        )
        if holds
    ]
    return Conversation(
        without_leading_marker(question.text),
        answers,
        question.pictures,
        tuple(told),
    )


def blocks_in(value: Any) -> Iterator[Row]:
    """All blocks of all turns of a value that may be a conversation."""
    for turn in value if isinstance(value, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        for block in content if isinstance(content, list) else ():
            if isinstance(block, dict):
                yield block


def plain_answer(answer: str) -> str:
    """An answer without the tags of a reward function: the text inside of <answer>...</answer>."""
    tagged = _TAGGED.fullmatch(answer.strip())
    return tagged[1].strip() if tagged else answer.strip()


def without_leading_marker(question: str) -> str:
    """A question without its only `<image>` marker, if it stands at the beginning, where images
    stand anyway."""
    text = question.strip()
    if text.count(IMAGE_MARKER) == 1:
        text = text.removeprefix(IMAGE_MARKER)
    return text.strip()


def _turns(field: str, value: Any) -> Iterator[_Turn]:
    """The turns of a conversation, with the text of each."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(ValueError, RecursionError):  # a question may begin with a bracket
            value = json.loads(value)
    if isinstance(value, str):
        yield _Turn("user", value, ())
        return
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise wrong(field, value, "a list of turns")
    for turn in value:
        if not isinstance(turn, dict):
            raise wrong(field, turn, "a turn with role and content")
        role = turn["from"] if turn.get("role") is None and "from" in turn else turn.get("role")
        if role not in (*USERS, *ANSWERS, *SYSTEMS):
            raise DataError(f"field '{field}': a turn of {show(role)} is not read")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        yield _Turn(str(role), *_content(field, content))


def _content(field: str, content: Any) -> tuple[str, tuple[Any, ...]]:
    """The text of a turn's content, with a marker for each picture, and the pictures that stand in
    it."""
    if content is None or isinstance(content, str):
        return content or "", ()
    texts, pictures = [], []
    for block in content if isinstance(content, list) else [content]:
        if isinstance(block, str):
            texts.append(block)
            continue
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in TEXTS:
            texts.append(_text(field, block))
        elif kind in PICTURES:
            texts.append(IMAGE_MARKER)
            picture = next(
                (block[name] for name in PICTURE_FIELDS if block.get(name) is not None), None
            )
            pictures += [] if picture is None else [picture]
        else:
            raise DataError(f"field '{field}': a block {show(block)} is neither text nor image")
    return "".join(texts), tuple(pictures)


def _text(field: str, block: Row) -> str:
    text = block.get("text")
    if not isinstance(text, str):
        raise wrong(field, text, "the text of a block")
    return text
