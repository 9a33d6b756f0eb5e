"""V-Zero's Parquet rows.

images, teacher_images      the full picture, and the teacher's crop; bytes or paths
prompt, teacher_raw_prompt  messages: what each is asked
reward_model                {"ground_truth": the answer}
teacher_neg_images, teacher_neg_raw_prompt
                            a crop of something else, which is not read
"""

from __future__ import annotations

from opd.data.choices import with_options
from opd.data.fields import Row
from opd.data.formats.conversation import conversation
from opd.data.formats.mapped import Mapped
from opd.data.formats.vision_opd import ground_truth


def _row(row: Row) -> Row:
    student = conversation("prompt", row["prompt"])
    teacher = conversation("teacher_raw_prompt", row["teacher_raw_prompt"])
    own = {
        **student.own,
        **with_options(student.question),
        "images": row["images"],
        "teacher_images": row["teacher_images"],
        "answer": ground_truth(row),
    }
    if teacher.question != student.question:
        own["teacher_question"] = teacher.question
    return own


V_ZERO = Mapped(
    "V-Zero",
    ("images", "teacher_images", "prompt", "teacher_raw_prompt"),
    _row,
    key="v-zero",
    names={
        "question": "prompt",
        "teacher_question": "teacher_raw_prompt",
        "answer": "reward_model",
    },
)
