"""The leakage audit (protocol rule 8): what a fit and a score were given, against the split.

`audit_fit` runs before each fit, ridge included, `audit_trials` before test trials are scored. `same_pictures` finds
one picture under two identities: `audit_fit` asks it about the pictures of the fit, ``python -m data validate`` about
all of the store.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data.parcels import Parcels
from data.preprocess import Samples, Trials
from data.splits import Part, Split

_SHOWN = 3


def audit_fit(
    ids: Sequence[str],
    split: Split,
    train: dict[str, Samples],
    validation: dict[str, Samples],
    *,
    parcels: dict[str, Parcels],
    pictures: dict[int, str],
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
        The groups of voxels that the fit predicts, by subject; empty for a fit that has none, such as ridge.
    pictures
        Digest of the pixels, by global row, of the images that have any (`PooledStore.picture_digests`).

    Raises
    ------
    ValueError
        If an identity stands on rows of different parts (its repeats would straddle them), a sample's image is of
        another part, an identity is both learned from and chosen by, a picture of the fit stands under another
        identity in another part, or trials of other than training images, or of images unknown, gave the statistics of
        standardisation or the parcels. The message lists everything that leaks.
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
            leaks += _not_training(ids, split, f"{name}: {part} samples are standardised by", samples.standardised_by)
    for name, of_subject in parcels.items():
        if of_subject.kind == "functional" or of_subject.used_images is not None:
            leaks += _not_training(ids, split, f"{name}: parcels look at responses to", of_subject.used_images)
    if parcels:
        leaks += [f"{name}: parcels are of unknown origin" for name in train if name not in parcels]
    both = _identities(ids, train.values()) & _identities(ids, validation.values())
    if both:
        leaks.append(f"{len(both)} images are both learned from and chosen by, such as {min(both)!r}")
    of_fit = {row for given in (train, validation) for samples in given.values() for row in samples.image.tolist()}
    leaks += same_pictures(ids, split, pictures, among=of_fit)
    _report(leaks)


def audit_trials(split: Split, trials: Trials) -> None:
    """Check that test trials were standardised without looking at what they test.

    Raises
    ------
    ValueError
        If trials of other than training images standardised the first N sessions, trials of test images a later one,
        or the images are unknown.
    """
    leaks = _not_training(
        split.ids,
        split,
        f"{trials.subject}: trials of the first N sessions are standardised by",
        trials.standardised_by,
    )
    told = f"{trials.subject}: trials of later sessions are standardised by"
    if trials.later_standardised_by is None:
        leaks.append(f"{told} images of unknown origin")
    else:
        tested = trials.later_standardised_by[split.select(trials.later_standardised_by, "test")]
        leaks += [f"{told} {_named(split.ids, split, tested)}"] if len(tested) else []
    _report(leaks)


def same_pictures(
    ids: Sequence[str], split: Split, pictures: Mapping[int, str], *, among: set[int] | None = None
) -> list[str]:
    """Return, a line each, the pictures that are in several parts of the split.

    Parameters
    ----------
    ids
        Identity of every image, by global row.
    split
        The part of every image.
    pictures
        Digest of the pixels, by global row, of the images that have any.
    among
        The global rows of which one, at least, must show the picture (None: all).
    """
    rows_of: dict[str, list[int]] = {}
    for row, digest in pictures.items():
        rows_of.setdefault(digest, []).append(row)
    found = []
    for rows in rows_of.values():
        first_of = {str(split.parts[row]): row for row in reversed(rows)}
        if len(first_of) > 1 and (among is None or not among.isdisjoint(rows)):
            named = " and ".join(f"{ids[row]!r} ({split.parts[row]})" for row in sorted(first_of.values()))
            found.append(
                f"images {named} are one picture, so what is held out is learned from; import them under one identity"
            )
    return found


def _report(leaks: list[str]) -> None:
    if leaks:
        raise ValueError(f"leakage audit: {len(leaks)} found: " + "; ".join(leaks))


def _not_training(ids: Sequence[str], split: Split, told: str, used: np.ndarray | None) -> list[str]:
    """Return the leak, if any, that `told` names: images that were used and are unknown, or not all of training."""
    if used is None:
        return [f"{told} images of unknown origin"]
    held_out = used[~split.select(used, "train")]
    return [f"{told} {_named(ids, split, held_out)}"] if len(held_out) else []


def _identities(ids: Sequence[str], given: Iterable[Samples]) -> set[str]:
    return {ids[int(row)] for samples in given for row in samples.image}


def _named(ids: Sequence[str], split: Split, rows: np.ndarray) -> str:
    """Return how many images these are, and the first few with their parts."""
    rows = np.unique(rows)
    some = ", ".join(f"{ids[row]!r} ({split.parts[row]})" for row in rows[:_SHOWN])
    return f"{len(rows)} images of another part: {some}{', ...' if len(rows) > _SHOWN else ''}"
