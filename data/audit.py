"""The leakage audit that runs before each fit (protocol rule 8): what the fit was given, against the split."""

from collections.abc import Iterable

import numpy as np

from data.preprocess import Samples
from data.splits import Part, Split

_SHOWN = 3


def audit_fit(ids: list[str], split: Split, train: dict[str, Samples], validation: dict[str, Samples]) -> None:
    """Check that nothing held out reaches a fit, within a subject and across subjects.

    Parameters
    ----------
    ids
        Identity of every image of the store, by global row.
    split
        The part of every image.
    train, validation
        What the fit learns from and what chooses among its states, by subject.

    Raises
    ------
    ValueError
        If an identity stands on rows of different parts (its repeats would straddle them), a sample's image is of
        another part, an identity is both learned from and chosen by, or trials of other than training images gave the
        statistics of standardisation. The message lists everything that leaks.
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
    both = _identities(ids, train.values()) & _identities(ids, validation.values())
    if both:
        leaks.append(f"{len(both)} images are both learned from and chosen by, such as {min(both)!r}")
    if leaks:
        raise ValueError(f"leakage audit: {len(leaks)} found: " + "; ".join(leaks))


def _identities(ids: list[str], given: Iterable[Samples]) -> set[str]:
    return {ids[row] for samples in given for row in samples.image}


def _named(ids: list[str], split: Split, rows: np.ndarray) -> str:
    """Return how many images these are, and the first few with their parts."""
    rows = np.unique(rows)
    some = ", ".join(f"{ids[row]!r} ({split.parts[row]})" for row in rows[:_SHOWN])
    return f"{len(rows)} images of another part: {some}{', ...' if len(rows) > _SHOWN else ''}"
