"""What the phantom's pictures are made of: six types of scene and eight categories of objects.

An outline is an implicit function of place relative to the object's centre, in units of its radius (u to the right, v
downwards): negative inside, and near the border about the distance from it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Statistics of one scene type: a gradient from `top` to `bottom` (RGB in 0..1) and noise of spectrum 1 / f^slope.

    `angle_deg` is the preferred direction of the noise's wave vectors, 0 for vertical stripes.
    """

    name: str
    slope: float
    angle_deg: float
    anisotropy: float
    contrast: float
    top: tuple[float, float, float]
    bottom: tuple[float, float, float]
    sharpness: float


@dataclass(frozen=True, kw_only=True)
class Category:
    """Statistics of one object category; its texture is a band around `frequency` cycles per image.

    `scenes` are those that it belongs to, where it is more frequent.
    """

    name: str
    outline: Callable[[np.ndarray, np.ndarray], np.ndarray]
    colour: tuple[float, float, float]
    frequency: float
    angle_deg: float
    anisotropy: float
    contrast: float
    scenes: tuple[str, ...]


def _ellipse(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.hypot(u / half_width, v / half_height) - 1.0


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _person(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    head = _ellipse(u, v + 0.72, 0.26, 0.28)
    trunk = _ellipse(u, v + 0.05, 0.36, 0.52)
    legs = _box(np.abs(u) - 0.2, v - 0.6, 0.12, 0.4)
    return np.minimum(np.minimum(head, trunk), legs)


def _building(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    roof = np.maximum(np.abs(u) - v - 1.0, v + 0.05)
    return np.minimum(_box(u, v - 0.42, 0.72, 0.53), roof)


def _vehicle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    hull = np.minimum(_box(u, v - 0.1, 0.98, 0.26), _box(u + 0.1, v + 0.25, 0.55, 0.26))
    return np.minimum(hull, np.hypot(np.abs(u) - 0.55, v - 0.4) - 0.24)


def _plant(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.7 - 0.28 * np.cos(5.0 * np.arctan2(v, u))


def _animal(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    body = _ellipse(u - 0.1, v, 0.75, 0.42)
    head = np.hypot(u + 0.72, v + 0.3) - 0.28
    legs = _box(np.abs(u - 0.1) - 0.42, v - 0.5, 0.1, 0.35)
    return np.minimum(np.minimum(body, head), legs)


SCENES = (
    Scene(
        name="sky",
        slope=1.7,
        angle_deg=90.0,
        anisotropy=0.5,
        contrast=0.10,
        top=(0.38, 0.55, 0.82),
        bottom=(0.66, 0.74, 0.84),
        sharpness=4.0,
    ),
    Scene(
        name="forest",
        slope=0.8,
        angle_deg=0.0,
        anisotropy=0.8,
        contrast=0.17,
        top=(0.30, 0.42, 0.24),
        bottom=(0.30, 0.30, 0.18),
        sharpness=8.0,
    ),
    Scene(
        name="beach",
        slope=1.2,
        angle_deg=90.0,
        anisotropy=0.9,
        contrast=0.10,
        top=(0.52, 0.66, 0.80),
        bottom=(0.74, 0.66, 0.50),
        sharpness=40.0,
    ),
    Scene(
        name="city",
        slope=0.9,
        angle_deg=0.0,
        anisotropy=0.4,
        contrast=0.16,
        top=(0.56, 0.57, 0.60),
        bottom=(0.40, 0.39, 0.40),
        sharpness=20.0,
    ),
    Scene(
        name="room",
        slope=1.4,
        angle_deg=45.0,
        anisotropy=0.3,
        contrast=0.12,
        top=(0.70, 0.62, 0.52),
        bottom=(0.46, 0.36, 0.28),
        sharpness=40.0,
    ),
    Scene(
        name="water",
        slope=0.9,
        angle_deg=90.0,
        anisotropy=0.9,
        contrast=0.13,
        top=(0.36, 0.54, 0.58),
        bottom=(0.18, 0.36, 0.44),
        sharpness=6.0,
    ),
)
CATEGORIES = (
    Category(
        name="face",
        outline=lambda u, v: _ellipse(u, v, 0.7, 0.95),
        colour=(0.76, 0.56, 0.46),
        frequency=7.0,
        angle_deg=90.0,
        anisotropy=0.6,
        contrast=0.14,
        scenes=("room", "city"),
    ),
    Category(
        name="person",
        outline=_person,
        colour=(0.46, 0.40, 0.48),
        frequency=14.0,
        angle_deg=0.0,
        anisotropy=0.5,
        contrast=0.16,
        scenes=("beach", "city"),
    ),
    Category(
        name="building",
        outline=_building,
        colour=(0.60, 0.46, 0.40),
        frequency=18.0,
        angle_deg=90.0,
        anisotropy=0.9,
        contrast=0.22,
        scenes=("city", "forest"),
    ),
    Category(
        name="vehicle",
        outline=_vehicle,
        colour=(0.56, 0.24, 0.28),
        frequency=5.0,
        angle_deg=90.0,
        anisotropy=0.8,
        contrast=0.18,
        scenes=("city", "beach"),
    ),
    Category(
        name="plant",
        outline=_plant,
        colour=(0.30, 0.52, 0.24),
        frequency=24.0,
        angle_deg=45.0,
        anisotropy=0.6,
        contrast=0.20,
        scenes=("forest", "room"),
    ),
    Category(
        name="fruit",
        outline=lambda u, v: np.hypot(u, v) - 0.72,
        colour=(0.82, 0.56, 0.20),
        frequency=4.0,
        angle_deg=0.0,
        anisotropy=0.0,
        contrast=0.06,
        scenes=("room", "forest"),
    ),
    Category(
        name="animal",
        outline=_animal,
        colour=(0.50, 0.36, 0.22),
        frequency=11.0,
        angle_deg=135.0,
        anisotropy=0.2,
        contrast=0.26,
        scenes=("forest", "water"),
    ),
    Category(
        name="text",
        outline=lambda u, v: _box(u, v, 0.95, 0.5),
        colour=(0.84, 0.84, 0.80),
        frequency=28.0,
        angle_deg=0.0,
        anisotropy=0.9,
        contrast=0.34,
        scenes=("city", "room"),
    ),
)
SCENE_NAMES = tuple(scene.name for scene in SCENES)
CATEGORY_NAMES = tuple(category.name for category in CATEGORIES)
