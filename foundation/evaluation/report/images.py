"""The section on single images: the best, the median and the worst predicted, as pictures and voxel by voxel."""

from collections.abc import Sequence

import numpy as np

from foundation.evaluation.figures.gallery import measured_against_predicted
from foundation.evaluation.report.drawer import Drawer, image, panels
from foundation.evaluation.report.kept import Example, Shown
from foundation.evaluation.report.markup import Markup, element, together
from foundation.evaluation.report.page import Section
from foundation.evaluation.report.tables import details, table
from foundation.evaluation.table import number

_PICTURE_WIDTH = 160


def image_section(subjects: Sequence[Shown], leading: str, drawer: Drawer, *, with_pictures: bool) -> Section:
    """Return the pictures with their scatter plots."""
    blocks: list[Markup] = []
    for of in subjects:
        responses = np.concatenate([np.abs(e.measured) for e in of.examples])
        limit = float(np.ceil(2 * np.percentile(responses, 99)) / 2) or 1.0
        figures = [_example(of, example, drawer, limit=limit) for example in of.examples]
        blocks += [element("h3", of.subject), panels(*figures, small=True)]
    if with_pictures and any(e.jpeg is None for of in subjects for e in of.examples):
        blocks.append(
            element("p", "Where there is no picture, the store was made without pixels; the image's id stands.")
        )
    if not with_pictures:
        blocks.append(element("p", "Pictures were left out (--no-pictures); the images' ids stand for them."))
    rows = [[of.subject, e.which, e.name, number(e.r)] for of in subjects for e in of.examples]
    numbers = table(["subject", "", "image", "pattern r"], rows, caption="The images shown", n_leading=2, ruled=True)
    return Section(
        key="images",
        heading="Best, median and worst image",
        lead=f"The images whose patterns over voxels {leading} predicts best, middling and worst; each point is a "
        "voxel, and a perfect prediction would lie on the dotted line but for noise.",
        body=together([*blocks, details("The numbers", numbers)]),
    )


def _example(of: Shown, example: Example, drawer: Drawer, *, limit: float) -> Markup:
    caption = f"{example.which}: {_short(example.name)}, pattern r {number(example.r)}"
    scatter = drawer.image(
        f"image-{of.subject}-{example.which}",
        lambda path: measured_against_predicted(
            example.measured, example.predicted, path, families=of.families, limit=limit
        ),
        alt=f"Measured against predicted responses of {of.subject}'s voxels, {caption}.",
    )
    picture = None
    if example.jpeg is not None:
        alt = f"The {example.which} predicted image of {of.subject}, {_short(example.name)}"
        picture = image(example.jpeg, "jpeg", alt=alt, width=_PICTURE_WIDTH)
    return element("figure", element("figcaption", caption), picture, scatter, class_="example")


def _short(name: str) -> str:
    """Return a name that fits a caption; identities by digest are long."""
    return name if len(name) <= 40 else f"{name[:24]}…"
