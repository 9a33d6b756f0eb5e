"""Suites for measuring, read as data: pictures, questions, options and answers, without boxes.

HR-Bench        image (base64), question, A ... D, answer, category, cycle_category; MMBench's
                tables have the same columns
MME-RealWorld   bytes (base64), question, "multi-choice options" (a list of "(A) ..."), answer;
                in the original JSON: Image (a path), Text, "Answer choices", "Ground truth"
ZoomBench       image, crop_image (what the teacher sees), query, response
CV-Bench        image, question, choices, answer ("(B)"), prompt (both with the options)
"""

from __future__ import annotations

from opd.data.choices import listed_texts, with_options
from opd.data.fields import Row
from opd.data.formats.mapped import Mapped, with_lettered_options


def _hr_bench(row: Row) -> Row:
    return {"image": row["image"], "id": row.get("index"), **with_lettered_options(row)}


def _mme_real_world(row: Row) -> Row:
    choices = listed_texts("multi-choice options", row["multi-choice options"])
    own = {"image": row["bytes"], "question": row["question"], "choices": choices}
    return {**own, "id": row.get("index")}


def _mme_original(row: Row) -> Row:
    return {
        "id": row.get("Question_id"),
        "image": row["Image"],
        "question": row["Text"],
        "choices": listed_texts("Answer choices", row["Answer choices"]),
        "answer": row["Ground truth"],
    }


def _zoom_bench(row: Row) -> Row:
    own = {"image": row["image"], "teacher_image": row.get("crop_image")}
    return {**own, **with_options(row["query"]), "answer": row["response"]}


def _cv_bench(row: Row) -> Row:
    choices = listed_texts("choices", row["choices"])
    return {"image": row["image"], "question": row["question"], "choices": choices}


HR_BENCH = Mapped(
    "options in columns A, B, ..., as in HR-Bench",
    ("image", "question", "A", "B", "answer"),
    _hr_bench,
    key="hr-bench",
    also=lambda row: row.get("target_instances") is None,
    names={"choices": "A"},
)
MME_REAL_WORLD = Mapped(
    "MME-RealWorld",
    ("bytes", "question", "multi-choice options"),
    _mme_real_world,
    key="mme-realworld",
    names={"image": "bytes", "choices": "multi-choice options"},
)
MME_ORIGINAL = Mapped(
    "MME-RealWorld's JSON",
    ("Image", "Text", "Answer choices", "Ground truth"),
    _mme_original,
    key="mme-realworld-json",
    names={
        "image": "Image",
        "question": "Text",
        "choices": "Answer choices",
        "answer": "Ground truth",
        "id": "Question_id",
    },
)
ZOOM_BENCH = Mapped(
    "query and response, as in ZoomBench",
    ("image", "query", "response"),
    _zoom_bench,
    key="zoombench",
    names={"question": "query", "answer": "response", "teacher_image": "crop_image"},
)
CV_BENCH = Mapped(
    "CV-Bench",
    ("image", "question", "choices", "prompt"),
    _cv_bench,
    key="cv-bench",
)
