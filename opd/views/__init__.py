"""An example becomes what each policy sees: the student the whole images, the teacher a view.

The table below holds every view by the name that `view.kind` of a recipe has; a new one is a file
here and a line there. A program adds its own by `register`, as `examples/04_a_view.py` shows.
"""

from opd.views.controls import Full, WrongCrop
from opd.views.crop import Crop
from opd.views.view import BUILT_IN, Piece, View, ViewOptions, register, whole

__all__ = ["Piece", "View", "ViewOptions", "register", "whole"]

BUILT_IN.update({"crop": Crop(), "full": Full(), "wrong": WrongCrop()})
