"""How a data file is read: what a person says about it because the file does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from opd.data.boxes import BoxFormat
from opd.data.fields import FIELDS
from opd.errors import nearest
from opd.options import Options
from opd.paths import PathText


def _known_unit(unit: str) -> str:
    """Returns `unit`. Raises PydanticCustomError if it is no unit of boxes."""
    if unit and unit not in get_args(BoxFormat):
        said = {"known": nearest(unit, get_args(BoxFormat))}
        raise PydanticCustomError("unit", "no unit of boxes has this name; {known}", said)
    return unit


def _known_fields(columns: Mapping[str, str]) -> Mapping[str, str]:
    """Returns `columns`. Raises PydanticCustomError if a key is none of our fields."""
    for field in columns:
        if field not in FIELDS:
            said = {"field": field, "known": nearest(field, FIELDS)}
            raise PydanticCustomError("field", "no field is called '{field}'; {known}", said)
    return columns


class Reading(Options):
    """How a data file is read. Nothing here is needed for rows that opd recognises."""

    format: str = Field(
        "",
        description=(
            "The format of the rows, such as 'vision-opd', or 'opd' for opd's own; empty: the first"
            " 32 rows show it."
        ),
    )
    box_format: Annotated[str, AfterValidator(_known_unit)] = Field(
        "",
        description=(
            "The unit of all boxes, such as 'pixels', 'fraction' or 'per-mille-xywh'; empty: what"
            " the row or its format says, else pixels."
        ),
    )
    box_image: Literal["", "upright", "stored"] = Field(
        "",
        description=(
            "Boxes lie in the upright picture, or in the picture as it is 'stored', before its EXIF"
            " rotation; empty: what the row says, else upright."
        ),
    )
    images: PathText = Field(
        "",
        description=(
            "The folder or archive to which paths of pictures are relative; empty: the folder of"
            " the data file, and the archives in it."
        ),
    )
    columns: Annotated[dict[str, str], AfterValidator(_known_fields)] = Field(
        default_factory=dict,
        description=(
            "The columns that hold opd's fields where they have other names:"
            " data.columns.question=prompt."
        ),
    )
    question: str = Field("", description="The question of rows that have none.")
    split: str = Field(
        "",
        description=(
            "The split of a Hugging Face data set (empty: train), or of a folder with several."
        ),
    )
    revision: str = Field("", description="The revision of a Hugging Face data set; empty: main.")
    allow_download: bool = Field(
        False, description="Pictures at http and https addresses are downloaded, and kept."
    )


AS_IT_IS = Reading()
"""The default: the file says everything."""
