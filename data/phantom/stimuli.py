"""Which images a phantom's subjects see: invented ones, or photographs from a folder.

The table of what is in the photographs is `labels.csv` in their folder: columns
`file,scene,category,x,y,size,visible_area`, one row an object (places and sizes in fractions of the cropped image's
side, see `data.phantom.images`). An image without objects has one row with an empty category.
"""

import csv
import logging
from collections import defaultdict
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from data.phantom.catalogue import CATEGORY_NAMES, SCENE_NAMES
from data.phantom.design import ImageCounts
from data.phantom.images import IMAGE_SIZE, ImageLabels, Objects, draw_images
from data.schema import pixel_identity

LABEL_TABLE = "labels.csv"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_COLUMNS = ("file", "scene", "category", "x", "y", "size", "visible_area")
# Streams of random numbers under the phantom's seed; the third number is the subject's, 0 for what is shared.
_SHARED, _OWN, _CHOICE = 100, 101, 102

Pictures: TypeAlias = tuple[UInt8[np.ndarray, "image 128 128 3"], ImageLabels | None]

_log = logging.getLogger(__name__)


class InventedStimuli:
    """Procedural pictures, as many as it takes: no subject's own image is another's."""

    category_names = CATEGORY_NAMES
    n_content = len(CATEGORY_NAMES) + len(SCENE_NAMES)

    def __init__(self, counts: ImageCounts, *, seed: int) -> None:
        self._counts = counts
        self._seed = seed

    def shared(self) -> Pictures:
        """Test images, then validation images."""
        return draw_images(self._counts.shared, rng=np.random.default_rng([self._seed, _SHARED, 0]))

    def own(self, number: int) -> Pictures:
        """Train images of subject `number`."""
        return draw_images(self._counts.own, rng=np.random.default_rng([self._seed, _OWN, number]))


class PhotographStimuli:
    """A stock of photographs, divided at random. Where it is too small, subjects have train images in common."""

    def __init__(self, stock: Pictures, counts: ImageCounts, *, n_subjects: int, seed: int) -> None:
        self._pixels, self._labels = stock
        self._counts = counts
        self._seed = seed
        order = np.random.default_rng([seed, _CHOICE, 0]).permutation(len(self._pixels))
        self._shared, self._pool = order[: counts.shared], order[counts.shared :]
        self._private = len(self._pool) >= n_subjects * counts.own
        self.category_names = () if self._labels is None else self._labels.category_names
        self.n_content = 0 if self._labels is None else len(self.category_names) + len(self._labels.scene_names)
        if not self._private:
            _log.warning(
                "%d photographs don't give each of %d subjects %d train images of their own; they have some in common",
                len(order),
                n_subjects,
                counts.own,
            )
        if self._labels is None:
            _log.warning("no %s beside the photographs: only early voxels (V1 to V3) are simulated", LABEL_TABLE)

    def shared(self) -> Pictures:
        """Test images, then validation images."""
        return self._taken(self._shared)

    def own(self, number: int) -> Pictures:
        """Train images of subject `number`."""
        n = self._counts.own
        if self._private:
            return self._taken(self._pool[(number - 1) * n : number * n])
        return self._taken(np.random.default_rng([self._seed, _CHOICE, number]).permutation(self._pool)[:n])

    def _taken(self, rows: np.ndarray) -> Pictures:
        return self._pixels[rows], None if self._labels is None else self._labels.select(rows)


def read_photographs(directory: Path) -> Pictures:
    """Read a folder's photographs by name, cropped to the central square and resized; copies of a picture count once.

    Raises
    ------
    ValueError
        If the folder is missing or holds no photographs, one can't be read, or the table of labels doesn't fit.
    """
    if not directory.is_dir():
        raise ValueError(f"image folder {directory} does not exist; give a folder of {', '.join(_SUFFIXES)} files")
    names, pictures, seen = [], [], set()
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() not in _SUFFIXES:
            continue
        picture = _read_square(path)
        identity = pixel_identity(picture)
        if identity not in seen:
            seen.add(identity)
            names.append(path.name)
            pictures.append(picture)
    if not names:
        raise ValueError(f"no photographs in {directory}; give a folder of {', '.join(_SUFFIXES)} files")
    table = directory / LABEL_TABLE
    return np.stack(pictures), _read_labels(table, names) if table.exists() else None


def _read_square(path: Path) -> UInt8[np.ndarray, "128 128 3"]:
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} can't be read as an image ({error}); remove it from the folder") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=box))


def _read_labels(table: Path, names: list[str]) -> ImageLabels:
    with table.open(newline="") as lines:
        reader = csv.DictReader(lines)
        missing = set(_COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{table} lacks the columns {sorted(missing)}; it needs {', '.join(_COLUMNS)}")
        rows = defaultdict(list)
        for row in reader:
            rows[row["file"]].append(row)
    unlabelled = [name for name in names if name not in rows]
    if unlabelled:
        raise ValueError(
            f"{table} has no row for {len(unlabelled)} photographs, the first {unlabelled[0]!r}; "
            "add rows (an empty category where there is no object) or remove the table"
        )
    scene_names = tuple(sorted({rows[name][0]["scene"] for name in names}))
    entries = [(place, row) for place, name in enumerate(names) for row in rows[name] if row["category"]]
    category_names = tuple(sorted({row["category"] for _, row in entries}))
    try:
        numbers = np.array([[float(row[key]) for key in _COLUMNS[3:]] for _, row in entries]).reshape(-1, 4)
    except ValueError as error:
        raise ValueError(f"{table}: x, y, size and visible_area must be numbers ({error})") from error
    objects = Objects(
        image=np.array([place for place, _ in entries], np.int64),
        category=np.array([category_names.index(row["category"]) for _, row in entries], np.int64),
        x=numbers[:, 0],
        y=numbers[:, 1],
        size=numbers[:, 2],
    )
    return ImageLabels(
        scene_names=scene_names,
        category_names=category_names,
        scene=np.array([scene_names.index(rows[name][0]["scene"]) for name in names], np.int64),
        objects=objects,
        visible_area=numbers[:, 3],
    )
