"""Turns an example into the images that each policy sees: the student sees the whole images, the
teacher sees a view.

The table below holds every view by the name that `view.kind` of a recipe takes; a new view is a
file in this folder and a line in the table. A program adds a view by `register`, as
`examples/04_a_view.py` shows.
"""

from opd.views.controls import Full, WrongCrop
from opd.views.crop import Context, Crop
from opd.views.degrade import Degrade
from opd.views.given import Given
from opd.views.marked import Marked
from opd.views.piece import Piece, whole
from opd.views.several import Several
from opd.views.view import BUILT_IN, View, ViewOptions, register

__all__ = ["Piece", "View", "ViewOptions", "register", "whole"]

BUILT_IN.update(
    {
        "crop": Crop(),
        "given": Given(),
        "context": Context(),
        "several": Several(),
        "marked": Marked(),
        "degrade": Degrade(),
        "full": Full(),
        "wrong": WrongCrop(),
    }
)
