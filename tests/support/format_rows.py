"""A row of every format that other programs write, and how it becomes an example."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from opd.data.formats import BUILT_IN
from opd.data.formats.mapped import Mapped
from opd.data.formats.own import NOTHING_SAID, Said, read_row, with_names
from opd.data.formats.vision_opd import PAPER
from opd.data.picture_store import ImageFacts
from opd.data.pictures import Pictures
from opd.data.sources import Sources
from opd.errors import DataError
from opd.types import EncodedImage, Example

SENTENCE = "Only the part inside of the red frame matters."
ASKED = "Which fruit lies on the scale?"
FRUITS = ("pear", "fig", "plum", "kiwi")
QUESTION = f"{ASKED}\nA. pear\nB. fig\nC. plum\nD. kiwi"
ON_ONE_LINE = f"{ASKED} (A) pear (B) fig (C) plum (D) kiwi\nAnswer with the letter."
BOX = [104, 55, 191, 82]
PROBLEM = f"<image>\n{QUESTION}\n\n{SENTENCE}"


def picture(size: tuple[int, int] = (300, 200)) -> bytes:
    content = io.BytesIO()
    Image.linear_gradient("L").resize(size).save(content, "PNG")
    return content.getvalue()


BASE64 = base64.b64encode(picture()).decode()
URI = f"data:image/png;base64,{BASE64}"


def turns(*contents: Any, roles: tuple[str, str] = ("user", "assistant")) -> list[Any]:
    return [{"role": roles[place % 2], "content": said} for place, said in enumerate(contents)]


def llava(*values: str) -> list[Any]:
    return [
        {"from": ("human", "gpt")[place % 2], "value": said} for place, said in enumerate(values)
    ]


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


LETTERED = dict(zip("ABCD", FRUITS, strict=True))
CLEAN = {
    "problem": PROBLEM,
    "answer": "C",
    "images": ["framed.png"],
    "teacher_images": ["crop.png"],
    "original_images": ["full.png"],
    "bbox": BOX,
    "extra_info": {"question": QUESTION, "answer": "C"},
}
PARQUET = {
    "prompt": turns(PROBLEM),
    "images": [{"path": "framed.png"}],
    "bbox_images": [{"path": "crop.png"}],
    "reward_model": {"ground_truth": "C", "style": "rule"},
    "extra_info": {"question": QUESTION},
}
PARENT = {"problem": f"<image>\n{QUESTION}", "answer": "C", "images": ["full.png"], "bbox": BOX}
SWIFT = {
    "messages": turns(f"<image>{QUESTION}", "C"),
    "images": ["full.png"],
    "objects": {"ref": ["plum"], "bbox": [BOX]},
}
SWIFT_CROP = {
    "messages": turns(f"<image>{QUESTION}", "C"),
    "images": ["full.png"],
    "teacher_images": ["crop.png"],
    "teacher_prompt": f"<image>Look closely. {QUESTION}",
}
QUERY = {
    "query": f"<image>{QUESTION}",
    "response": "C",
    "images": "full.png",
    "objects": json.dumps({"bbox": [BOX], "bbox_type": "real"}),
}
PROMPT = {
    "prompt": turns([{"type": "image"}, text(QUESTION)]),
    "image": {"bytes": None, "path": "full.png"},
    "solution": "<think>It is round.</think> <answer> C </answer>",
}
BLOCKS = {
    "messages": turns([{"type": "image"}, text(QUESTION)], [text("C")]),
    "images": [{"bytes": BASE64, "path": None}],
}
OPENAI = {
    "messages": turns([text(QUESTION), {"type": "image_url", "image_url": {"url": URI}}], "C")
}
LLAVA = {
    "image": "full.png",
    "conversations": llava(f"<image>\n{QUESTION}", "<|box_start|>(346,275),(637,410)<|box_end|> C"),
}
CONVERTED = {
    "image": ["full.png", "full.png###[104, 55, 191, 82]"],
    "conversations": llava(
        f"<image>\n{QUESTION} Please provide the bounding box coordinate of the region that helps.",
        "[0.347, 0.35, 0.637, 0.44]",
        "<image>",
        "plum",
    ),
}
VISUAL_COT = {
    "image": "full.png",
    "question": QUESTION,
    "answer": "plum",
    "bboxs": [BOX],
    "width": 300,
    "height": 200,
}
TREE = {
    "image": BASE64,
    "question": ASKED,
    **LETTERED,
    "answer": "C",
    "target_instances": "[[104, 55, 191, 82]]",
}
V_ZERO = {
    "images": [{"bytes": BASE64, "path": None}],
    "teacher_images": [{"bytes": BASE64, "path": None}],
    "teacher_neg_images": [{"bytes": BASE64, "path": None}],
    "prompt": turns(f"<image>{QUESTION}"),
    "teacher_raw_prompt": turns(f"<image>This is a part. {QUESTION}"),
    "reward_model": {"ground_truth": "C"},
}
FOLDER = {
    "image": "full.png",
    "question": ASKED,
    "bbox": [[104, 55, 87, 27]],
    "options": ["plum", "pear", "fig", "kiwi"],
    "target_object": ["plum"],
}
V_TABLE = {
    "image": {"bytes": BASE64, "path": "x.jpg"},
    "text": ON_ONE_LINE,
    "label": "C",
    "question_id": "7",
    "category": "direct_attributes",
}
HR_BENCH = {
    "index": 5,
    "image": BASE64,
    "question": ASKED,
    **LETTERED,
    "answer": "C",
    "category": "single",
    "cycle_category": "2",
}
MME = {
    "bytes": BASE64,
    "index": "5",
    "question": ASKED,
    "multi-choice options": str([f"({letter}) {fruit}" for letter, fruit in LETTERED.items()]),
    "answer": "C",
}
MME_ORIGINAL = {
    "Question_id": "perception/5",
    "Image": "full.png",
    "Text": ASKED,
    "Answer choices": [f"({letter}) {fruit}" for letter, fruit in LETTERED.items()],
    "Ground truth": "C",
}
ZOOM = {"id": "5", "query": QUESTION, "response": "C", "image": BASE64, "crop_image": BASE64}
CV_BENCH = {
    "type": "2D",
    "task": "Count",
    "image": BASE64,
    "question": ASKED,
    "choices": list(FRUITS),
    "answer": "(C)",
    "prompt": ON_ONE_LINE,
}

ROWS: dict[str, dict[str, Any]] = {
    "vision-opd": CLEAN,
    "vision-opd-parquet": PARQUET,
    "zwz": PARENT,
    "ms-swift": SWIFT,
    "ms-swift-query": QUERY,
    "trl": PROMPT,
    "trl-messages": BLOCKS,
    "openai": OPENAI,
    "llava": LLAVA,
    "visual-cot": VISUAL_COT,
    "visual-cot-llava": CONVERTED,
    "treevgr": TREE,
    "v-zero": V_ZERO,
    "vstar": FOLDER,
    "vstar-table": V_TABLE,
    "hr-bench": HR_BENCH,
    "mme-realworld": MME,
    "mme-realworld-json": MME_ORIGINAL,
    "zoombench": ZOOM,
    "cv-bench": CV_BENCH,
}
FORMATS = {reader.key: reader for reader in [*BUILT_IN, PAPER] if isinstance(reader, Mapped)}
FRAMED_ONES = ("vision-opd-parquet", "vision-opd-paper")
WITH_CROP = (*FRAMED_ONES, "v-zero", "zoombench")
WITH_BOX = (
    "vision-opd",
    "zwz",
    "ms-swift",
    "ms-swift-query",
    "llava",
    "visual-cot",
    "visual-cot-llava",
    "treevgr",
    "vstar",
)


def example(
    folder: Path,
    reader: Any,
    row: Any,
    said: Said = NOTHING_SAID,
    facts: Callable[[EncodedImage], ImageFacts] | None = None,
) -> tuple[Example, list[str]]:
    """The example of one row, and the remarks about it. Raises DataError with the file's own
    names. `facts` is used instead of reading the pictures."""
    heard: list[str] = []
    path = folder / "data.jsonl"

    def own() -> Any:
        return reader.own(row) if isinstance(reader, Mapped) else row

    try:
        found = read_row(
            own,
            "data.jsonl:1",
            (path,),
            Sources(folder),
            reader.box_format,
            facts or Pictures(10**6, path),
            10**6,
            said=said,
            names=reader.names,
            remark=heard.append,
            evidence=False,
        )
    except DataError as error:
        raise DataError(with_names(str(error), reader.names)) from error
    return found, heard
