"""Procedural pictures for the phantom: 1/f grounds with occluding, textured objects, and the table of what is in them.

A ground is one of six scene types: Gaussian noise with a power-law spectrum of the scene's own slope and orientation,
over a gradient in the scene's colours. Up to three objects of eight categories lie on it, later ones in front. A
category has a shape, a texture and a colour, each overlapping with the others', so that no single statistic gives it
away. Places and sizes are fractions of the image's side, x to the right and y downwards from the top left corner.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from scipy import fft

from data.phantom.catalogue import CATEGORIES, CATEGORY_NAMES, SCENE_NAMES, SCENES

IMAGE_SIZE = 128
MAX_OBJECTS = 3
_BATCH = 64
_OBJECT_COUNT_PROBABILITY = (0.06, 0.40, 0.36, 0.18)
_N_TEXTURES = 8


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects of a set of images, one a row, back to front within an image.

    Attributes
    ----------
    image : row of the image in the set.
    category : index into the categories' names.
    x, y : centre, in fractions of the image's side.
    size : radius, in fractions of the image's side.
    """

    image: Int[np.ndarray, " object"]
    category: Int[np.ndarray, " object"]
    x: Float[np.ndarray, " object"]
    y: Float[np.ndarray, " object"]
    size: Float[np.ndarray, " object"]


@dataclass(frozen=True, kw_only=True)
class ImageLabels:
    """What is in a set of images.

    Attributes
    ----------
    scene : index into `scene_names`, per image.
    objects : the objects, image by image.
    visible_area : fraction of the image that each object still covers after occlusion.
    """

    scene_names: tuple[str, ...]
    category_names: tuple[str, ...]
    scene: Int[np.ndarray, " image"]
    objects: Objects
    visible_area: Float[np.ndarray, " object"]

    def select(self, rows: Int[np.ndarray, " chosen"]) -> "ImageLabels":
        """Labels of the images `rows`, in that order; `objects.image` then counts within the choice."""
        of_image = [np.flatnonzero(self.objects.image == row) for row in rows]
        chosen = np.concatenate([np.zeros(0, np.int64), *of_image])
        objects = Objects(
            image=np.repeat(np.arange(len(rows)), [len(found) for found in of_image]),
            category=self.objects.category[chosen],
            x=self.objects.x[chosen],
            y=self.objects.y[chosen],
            size=self.objects.size[chosen],
        )
        return ImageLabels(
            scene_names=self.scene_names,
            category_names=self.category_names,
            scene=self.scene[rows],
            objects=objects,
            visible_area=self.visible_area[chosen],
        )


def join_labels(parts: list[ImageLabels]) -> ImageLabels:
    """Labels of several sets of images, one after the other."""
    starts = np.cumsum([0] + [len(part.scene) for part in parts])
    columns = {f.name: np.concatenate([getattr(part.objects, f.name) for part in parts]) for f in fields(Objects)}
    shifted = [part.objects.image + start for part, start in zip(parts, starts[:-1], strict=True)]
    return replace(
        parts[0],
        scene=np.concatenate([part.scene for part in parts]),
        objects=Objects(**columns | {"image": np.concatenate(shifted)}),
        visible_area=np.concatenate([part.visible_area for part in parts]),
    )


def draw_images(n_images: int, *, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "image 128 128 3"], ImageLabels]:
    """Invent and render `n_images` pictures.

    Returns
    -------
    pixels, labels : the pictures and the table of what is in them.
    """
    scene = rng.integers(len(SCENES), size=n_images)
    return render(scene, draw_objects(scene, rng=rng), rng=rng)


def draw_objects(scene: Int[np.ndarray, " image"], *, rng: np.random.Generator) -> Objects:
    """Draw 0 to 3 objects an image; a category is three times as likely in the scenes that it belongs to."""
    count = rng.choice(len(_OBJECT_COUNT_PROBABILITY), size=len(scene), p=_OBJECT_COUNT_PROBABILITY)
    image = np.repeat(np.arange(len(scene)), count)
    affinity = np.array([[3.0 if name in category.scenes else 1.0 for category in CATEGORIES] for name in SCENE_NAMES])
    cumulative = np.cumsum(affinity / affinity.sum(axis=1, keepdims=True), axis=1)
    category = (rng.random((len(image), 1)) > cumulative[scene[image]][:, :-1]).sum(axis=1)
    return Objects(
        image=image,
        category=category,
        x=rng.uniform(0.14, 0.86, len(image)),
        y=rng.uniform(0.14, 0.86, len(image)),
        size=rng.uniform(0.11, 0.27, len(image)),
    )


def render(
    scene: Int[np.ndarray, " image"], objects: Objects, *, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "image 128 128 3"], ImageLabels]:
    """Paint scenes and objects; grounds, textures and shades of colour come from `rng`.

    The number of random draws doesn't depend on the objects' places, so that one seed paints the same objects elsewhere
    on the same grounds.
    """
    textures = _textures(rng)
    pixels = np.empty((len(scene), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    visible_area = np.zeros(len(objects.image))
    for start in range(0, len(scene), _BATCH):
        canvas = _grounds(scene[start : start + _BATCH], rng)
        owner = np.full(canvas.shape[:3], -1, np.int64)
        first, last = np.searchsorted(objects.image, [start, start + _BATCH])
        for row in range(first, last):
            place = objects.image[row] - start
            _paint(canvas[place], owner[place], row, objects, textures, rng)
        covered = np.bincount(owner[owner >= 0] - first, minlength=last - first)
        visible_area[first:last] = covered / IMAGE_SIZE**2
        pixels[start : start + _BATCH] = np.clip(canvas * 255.0 + 0.5, 0, 255)
    labels = ImageLabels(
        scene_names=SCENE_NAMES,
        category_names=CATEGORY_NAMES,
        scene=np.asarray(scene),
        objects=objects,
        visible_area=visible_area,
    )
    return pixels, labels


def _spectrum_axes() -> tuple[np.ndarray, np.ndarray]:
    """Radius (cycles per image) and angle of each coefficient of a real transform."""
    fy = np.fft.fftfreq(IMAGE_SIZE, 1 / IMAGE_SIZE)[:, None]
    fx = np.fft.rfftfreq(IMAGE_SIZE, 1 / IMAGE_SIZE)[None, :]
    return np.hypot(fy, fx), np.arctan2(fy, fx)


def _oriented(angle: np.ndarray, preferred_deg: float, strength: float) -> np.ndarray:
    return (1 - strength) + strength * np.cos(angle - np.deg2rad(preferred_deg)) ** 8


def _noise(amplitude: np.ndarray, n: int, rng: np.random.Generator) -> Float32[np.ndarray, "noise 128 128"]:
    """Gaussian fields of zero mean and unit variance with the given amplitude spectrum."""
    shape = (n, IMAGE_SIZE, IMAGE_SIZE // 2 + 1)
    draw = rng.standard_normal((*shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    field = np.asarray(fft.irfft2(draw * amplitude.astype(np.float32), workers=2))
    field -= field.mean(axis=(1, 2), keepdims=True)
    return field / field.std(axis=(1, 2), keepdims=True)


def _grounds(scene: np.ndarray, rng: np.random.Generator) -> Float32[np.ndarray, "image 128 128 3"]:
    radius, angle = _spectrum_axes()
    radius[0, 0] = np.inf
    height = np.linspace(0, 1, IMAGE_SIZE, dtype=np.float32)
    canvas = np.empty((len(scene), IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    for index in np.unique(scene):
        kind = SCENES[index]
        where = np.flatnonzero(scene == index)
        n = len(where)
        fine = _noise(radius**-kind.slope * _oriented(angle, kind.angle_deg, kind.anisotropy), n, rng)
        horizon = rng.uniform(0.3, 0.7, (n, 1)).astype(np.float32)
        below = 1 / (1 + np.exp(-kind.sharpness * (height - horizon)))
        tint = rng.normal(0, 0.06, (n, 2, 3)) + rng.normal(0, 0.07, (n, 1, 1))
        top, bottom = (np.array([kind.top, kind.bottom]) + tint).astype(np.float32).transpose(1, 0, 2)
        colour = top[:, None] + below[..., None] * (bottom - top)[:, None]
        contrast = kind.contrast * rng.uniform(0.6, 1.4, (n, 1, 1)).astype(np.float32)
        channel_gain = (1 + rng.normal(0, 0.15, (n, 1, 1, 3))).astype(np.float32)
        canvas[where] = colour[:, :, None] + (contrast * fine)[..., None] * channel_gain
    return canvas


def _textures(rng: np.random.Generator) -> Float32[np.ndarray, "category texture 128 128"]:
    """Band-pass noise of each category, a few of each, that wraps around."""
    radius, angle = _spectrum_axes()
    bank = []
    for category in CATEGORIES:
        band = np.exp(-0.5 * (np.log(np.maximum(radius, 0.1) / category.frequency) / 0.35) ** 2)
        bank.append(_noise(band * _oriented(angle, category.angle_deg, category.anisotropy), _N_TEXTURES, rng))
    return np.stack(bank)


def _paint(
    canvas: Float32[np.ndarray, "128 128 3"],
    owner: Int[np.ndarray, "128 128"],
    row: int,
    objects: Objects,
    textures: Float32[np.ndarray, "category texture 128 128"],
    rng: np.random.Generator,
) -> None:
    """Paint object `row` onto `canvas` in place and enter it in `owner`, the topmost object of each pixel."""
    kind = CATEGORIES[objects.category[row]]
    texture = textures[objects.category[row], rng.integers(_N_TEXTURES)]
    shift_y, shift_x = rng.integers(IMAGE_SIZE, size=2)
    tilt, shade_angle = rng.normal(0, 0.15), rng.uniform(0, 2 * np.pi)
    colour = np.array(kind.colour) + rng.normal(0, 0.07, 3) + rng.normal(0, 0.08)
    contrast = kind.contrast * rng.uniform(0.7, 1.3)

    radius = objects.size[row] * IMAGE_SIZE
    centre_x, centre_y = objects.x[row] * IMAGE_SIZE - 0.5, objects.y[row] * IMAGE_SIZE - 0.5
    reach = 1.15 * radius + 2
    xs = np.arange(max(0, int(centre_x - reach)), min(IMAGE_SIZE, int(centre_x + reach) + 1))
    ys = np.arange(max(0, int(centre_y - reach)), min(IMAGE_SIZE, int(centre_y + reach) + 1))
    if not len(xs) or not len(ys):
        return
    dx = ((xs - centre_x) / radius).astype(np.float32)[None, :]
    dy = ((ys - centre_y) / radius).astype(np.float32)[:, None]
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    distance = kind.outline(cos * dx + sin * dy, cos * dy - sin * dx) * radius
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]

    shading = 1 + 0.25 * (np.float32(np.cos(shade_angle)) * dx + np.float32(np.sin(shade_angle)) * dy)
    # The texture travels with the object, so that moving an object moves its texture too.
    at_x = (xs - round(centre_x) + shift_x) % IMAGE_SIZE
    at_y = (ys - round(centre_y) + shift_y) % IMAGE_SIZE
    relief = np.float32(contrast) * texture[np.ix_(at_y, at_x)]
    surface = colour.astype(np.float32) * shading[..., None] + relief[..., None]
    box = np.ix_(ys, xs)
    canvas[box] += alpha * (surface - canvas[box])
    owner[box] = np.where(alpha[..., 0] > 0.5, row, owner[box])
