"""Messages of content blocks: TRL and other conversational data sets of Hugging Face, and OpenAI.

    prompt or messages  turns with role and content, a text or a list of blocks; prompt may be the
                        question alone
    image or images     pictures, in the order of the blocks of type image (TRL)
    completion          the turns after the prompt, or the answer alone (TRL)
    solution            the answer, with or without <answer> tags (TRL)
    reward_model        {"ground_truth": the answer} (verl)

OpenAI's pictures stand in blocks: {"type": "image_url", "image_url": {"url": URL or data URI}}.
"""

from __future__ import annotations

from typing import Any

from opd.data.choices import with_options
from opd.data.fields import Row
from opd.data.formats.conversation import (
    ANSWERS,
    PICTURES,
    blocks_in,
    conversation,
    plain_answer,
)
from opd.data.formats.grounding import with_boxes_in_texts
from opd.data.formats.mapped import Mapped
from opd.data.formats.vision_opd import ground_truth


def _messages(row: Row) -> Row:
    return _row(row, "messages")


def _prompt(row: Row) -> Row:
    return _row(row, "prompt")


def _row(row: Row, field: str) -> Row:
    talk = conversation(field, row[field])
    own: dict[str, Any] = {**talk.own, **with_options(talk.question)}
    if row.get("image") is not None:
        own["image"] = row["image"]
    else:
        images = row.get("images")
        own["images"] = images if images is not None and images != [] else list(talk.pictures)
    answers = (_completed(row.get("completion")), row.get("solution"), row.get("answer"))
    answer = next((one for one in (*answers, ground_truth(row)) if one is not None), None)
    if answer is not None:
        own["answer"] = plain_answer(answer) if isinstance(answer, str) else answer
    return with_boxes_in_texts(own)


def _completed(completion: Any) -> Any:
    """The answer of a completion, which is a text or a list of turns."""
    if not isinstance(completion, list):
        return completion
    turns = [turn for turn in completion if isinstance(turn, dict)]
    said = [turn for turn in turns if turn.get("role") in ANSWERS]
    return conversation("completion", [{"role": "user", "content": ""}, *said]).answer


def _has_url(row: Row) -> bool:
    """Whether a picture of the messages is a URL in a block."""
    return any(
        block.get("type") in ("image_url", "input_image") for block in blocks_in(row["messages"])
    )


def _has_blocks(row: Row) -> bool:
    blocks = blocks_in(row["messages"])
    return any(block.get("type") in PICTURES for block in blocks) and not _has_url(row)


def _has_pictures(row: Row) -> bool:
    return row.get("image") is not None or bool(row.get("images"))


PROMPTS = Mapped(
    "TRL's prompts",
    ("prompt",),
    _prompt,
    key="trl",
    also=lambda row: _has_pictures(row) or any(blocks_in(row["prompt"])),
    names={"question": "prompt"},
)
BLOCKS = Mapped(
    "messages of content blocks, as in TRL",
    ("messages",),
    _messages,
    key="trl-messages",
    also=_has_blocks,
    names={"question": "messages", "answer": "messages"},
)
OPENAI = Mapped(
    "OpenAI's messages",
    ("messages",),
    _messages,
    key="openai",
    also=_has_url,
    names={"question": "messages", "answer": "messages", "images": "messages"},
)
