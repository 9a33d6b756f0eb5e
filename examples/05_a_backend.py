# /// script
# requires-python = ">=3.11"
# dependencies = ["vision-opd"]
# [tool.uv.sources]
# vision-opd = { path = ".." }
# ///
"""A backend of one's own, and how the conformance suite finds what is wrong with it.

python examples/05_a_backend.py
"""

from dataclasses import replace

from opd.testing.conformance import check
from opd.testing.toy import ToyBackend, ToyEncoder
from opd.tiny import Scenes
from opd.types import Update, UpdateResult
from opd.views import usable
from opd.views.view import ViewOptions


class Unclipped(ToyBackend):
    """The numpy backend, whose optimizer forgets to clip the gradient."""

    def apply(self, update: Update) -> UpdateResult:
        """Takes the step without the bound on the gradient's norm."""
        return super().apply(replace(update, gradient_clip=None))


encoder = ToyEncoder()
scenes = Scenes("fresh", 4)
pairs = [usable.encode(encoder, scene, ViewOptions()) for scene in scenes]
for backend in (ToyBackend, Unclipped):
    results = check(backend, pairs, encoder.stop, encoder.banned)
    print(
        f"{backend.__name__}: {sum(one.passed for one in results)} of {len(results)} checks passed"
    )
    for one in results:
        if not one.passed:
            print(f"  {one}")
