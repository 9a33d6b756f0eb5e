# /// script
# requires-python = ">=3.11"
# dependencies = ["vision-opd[cuda]"]
# [tool.uv.sources]
# vision-opd = { path = ".." }
# ///
"""A view of one's own: the teacher sees the whole image, with all but the evidence darkened.

python examples/04_a_view.py [PICTURE.png]
"""

import sys

import numpy as np

import opd
from opd.data.answers import matches
from opd.types import Sampling
from opd.views import Piece, View, register, usable
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
draws = np.zeros((len(scenes), 1, 16), np.float32)  # greedy: no draw decides
for kind in ("full", "spotlight", "crop"):
    view = opd.recipe("tiny", view={"kind": kind}).view
    prompts = [usable.encode_teacher(model.encoder, scene, view) for scene in scenes]
    greedy = Sampling(0.0, model.encoder.stop, model.encoder.banned)
    answers = model.backend.sample(prompts, draws, greedy)
    said = [model.encoder.decode(completion.tokens) for (completion,) in answers]
    right = sum(map(matches, said, [scene.answer for scene in scenes]))
    print(f"{kind:9} {right} of {len(scenes)} right, {len(prompts[0])} tokens")
    if sys.argv[1:] and kind == "spotlight":
        teacher_images(scenes[0], view)[0].save(sys.argv[1])
