"""Turns an example into the images that each policy sees: the student sees the whole images, the
teacher sees a view.

The table below holds every view by the name that `view.kind` of a recipe takes; a new view is a
file in this folder and a line in the table. A program adds a view by `register`, as
`examples/04_a_view.py` shows.
"""

from opd.views.controls import Full, WrongCrop
from opd.views.crop import Crop
from opd.views.view import BUILT_IN, Piece, View, ViewOptions, register, whole

__all__ = ["Piece", "View", "ViewOptions", "register", "whole"]

BUILT_IN.update({"crop": Crop(), "full": Full(), "wrong": WrongCrop()})
