"""The leakage audit (protocol rule 8): what a fit was given, against the split; and one picture under two identities.

`audit_fit` runs before each fit. `audit_pictures` reads every stored picture, so it runs once a store:
``python -m data validate`` includes it.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from data.parcels import Parcels
from data.preprocess import Samples
from data.schema import pixel_identity
from data.splits import Part, Split
from data.store import PooledStore

_SHOWN = 3


def audit_fit(
    ids: list[str],
    split: Split,
    train: dict[str, Samples],
    validation: dict[str, Samples],
    *,
    parcels: dict[str, Parcels] | None = None,
) -> None:
    """Check that nothing held out reaches a fit, within a subject and across subjects.

    Parameters
    ----------
    ids
        Identity of every image of the store, by global row.
    split
        The part of every image.
    train, validation
        What the fit learns from and what chooses among its states, by subject.
    parcels
        The groups of voxels that the fit predicts, by subject.

    Raises
    ------
    ValueError
        If an identity stands on rows of different parts (its repeats would straddle them), a sample's image is of
        another part, an identity is both learned from and chosen by, or trials of other than training images gave the
        statistics of standardisation or the parcels. The message lists everything that leaks.
    """
    if len(ids) != len(split.parts):
        raise ValueError(f"the split has {len(split.parts)} images but the store {len(ids)}; make the split anew")
    leaks: list[str] = []
    parts_of: dict[str, set[str]] = {}
    for identity, part in zip(ids, split.parts.tolist(), strict=True):
        parts_of.setdefault(identity, set()).add(part)
    for identity, parts in parts_of.items():
        if len(parts) > 1:
            leaks.append(f"image {identity!r} is in {' and '.join(sorted(parts))}")
    given_parts: list[tuple[Part, dict[str, Samples]]] = [("train", train), ("validation", validation)]
    for part, given in given_parts:
        for name, samples in given.items():
            strangers = samples.image[~split.select(samples.image, part)]
            if len(strangers):
                leaks.append(f"{name}: {part} samples show {_named(ids, split, strangers)}")
            if samples.standardised_by is not None:
                used = samples.standardised_by
                held_out = used[~split.select(used, "train")]
                if len(held_out):
                    leaks.append(f"{name}: {part} samples are standardised by {_named(ids, split, held_out)}")
    for name, of_subject in (parcels or {}).items():
        if of_subject.used_images is not None:
            held_out = of_subject.used_images[~split.select(of_subject.used_images, "train")]
            if len(held_out):
                leaks.append(f"{name}: parcels look at responses to {_named(ids, split, held_out)}")
    both = _identities(ids, train.values()) & _identities(ids, validation.values())
    if both:
        leaks.append(f"{len(both)} images are both learned from and chosen by, such as {min(both)!r}")
    if leaks:
        raise ValueError(f"leakage audit: {len(leaks)} found: " + "; ".join(leaks))


def audit_pictures(store: PooledStore, split: Split) -> None:
    """Check that no picture stands in two parts of the split under two identities; images without pixels pass.

    Raises
    ------
    ValueError
        If one does. The message lists all such pictures.
    """
    pictures: dict[int, str] = {}
    start = 0
    for name, n_images, shape in store.image_blocks():
        if shape is not None:
            for _, first, block in store.pixels(block=name):
                pictures |= {start + first + k: pixel_identity(picture) for k, picture in enumerate(block)}
        start += n_images
    if leaks := same_pictures(store.image_ids(), split, pictures):
        raise ValueError(f"leakage audit of {store.path}: {len(leaks)} found: " + "; ".join(leaks))


def same_pictures(ids: list[str], split: Split, pictures: Mapping[int, str]) -> list[str]:
    """Return, a line each, the pictures that are in several parts of the split.

    Parameters
    ----------
    ids
        Identity of every image, by global row.
    split
        The part of every image.
    pictures
        Digest of the pixels, by global row, of the images that have any.
    """
    rows_of: dict[str, list[int]] = {}
    for row, digest in pictures.items():
        rows_of.setdefault(digest, []).append(row)
    found = []
    for rows in rows_of.values():
        if len({str(split.parts[row]) for row in rows}) > 1:
            named = " and ".join(f"{ids[row]!r} ({split.parts[row]})" for row in rows[:_SHOWN])
            found.append(
                f"images {named} are one picture, so what is held out is learned from; import them under one identity"
            )
    return found


def _identities(ids: list[str], given: Iterable[Samples]) -> set[str]:
    return {ids[row] for samples in given for row in samples.image}


def _named(ids: list[str], split: Split, rows: np.ndarray) -> str:
    """Return how many images these are, and the first few with their parts."""
    rows = np.unique(rows)
    some = ", ".join(f"{ids[row]!r} ({split.parts[row]})" for row in rows[:_SHOWN])
    return f"{len(rows)} images of another part: {some}{', ...' if len(rows) > _SHOWN else ''}"
