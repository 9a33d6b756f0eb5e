# /// script
# requires-python = ">=3.11"
# dependencies = ["vision-opd[cuda]"]
# [tool.uv.sources]
# vision-opd = { path = ".." }
# ///
"""A view of one's own: the teacher sees the whole image, with all but the evidence darkened. It is
compared with the full image and with the crop; docs/views.md lists the views that are there.

python examples/04_a_view.py [PICTURE.png]
"""

import sys

import opd
from opd.measure.compare import compare, report
from opd.views import Piece, View, register
from opd.views.crop import hull, region
from opd.views.images import teacher_images


class Spotlight(View):
    """The whole image, with a quarter of its light outside the evidence."""

    def pieces(self, example, number, size, options, max_pixels):
        """One piece for each image: all of it, changed."""
        evidence = region(hull(example.boxes), *size, options.margin)

        def darken(image):
            dark = image.point(lambda value: value // 4)
            dark.paste(image.crop(evidence), evidence[:2])
            return dark

        return [Piece((0, 0, *size), size, darken)]


register("spotlight", Spotlight())
model, scenes = opd.open_model("tiny"), opd.read_data("tiny", count=50)
views = {kind: model.recipe.view.of(kind) for kind in ("spotlight", "crop")}
found = compare(model.backend, model.encoder, scenes, views, max_tokens=16, budget=65536)
for name, seen in report(found, scenes)["views"].items():
    right = round(seen["accuracy"] * seen["rows"])
    print(f"{name:9} {right} of {seen['rows']} right, {seen['prompt_tokens']:.0f} tokens")
if sys.argv[1:]:
    teacher_images(scenes[0], views["spotlight"])[0].save(sys.argv[1])
