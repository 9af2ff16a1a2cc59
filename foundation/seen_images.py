"""Whether a backbone was trained on images that it is to be tested on, where these are another store's."""

from typing import Any

import numpy as np

from data.splits import split_of
from data.store import PooledStore


def check_images(store: PooledStore, subject: str, backbone: dict[str, Any], *, label: str) -> str:
    """Refuse test images of `subject` that the backbone was trained on; return how that was made sure of.

    A store has one split, the same for all its subjects; of another store that must be looked at.

    Raises
    ------
    ValueError
        If the backbone was trained on one of them.
    """
    if str(store.path) == str(backbone["store"]):
        return "one split"
    try:
        trained = PooledStore.open(backbone["store"])
        learned = [trained.subject(name) for name in backbone["subject_digests"]]
    except (OSError, ValueError):
        return f"not checked: {backbone['store']} isn't there as it was"
    pictures = [of.picture_digests() for of in (trained, store)]
    names = pictures if all(pictures) else [dict(enumerate(of.image_ids())) for of in (trained, store)]
    split, seen = split_of(trained), set()
    for of_subject in learned:
        rows = np.unique(of_subject.image[~split.select(of_subject.image, "test")])
        seen |= {names[0][row] for row in rows.tolist() if row in names[0]}
    shown = store.subject(subject).image
    tested = np.unique(shown[split_of(store).select(shown, "test")])
    both = [row for row in tested.tolist() if names[1].get(row) in seen]
    if both:
        example = store.image_ids()[both[0]]
        raise ValueError(
            f"backbone {label} was trained on {len(both)} test images of {subject}, such as {example}; take one that "
            f"was trained with the split of {store.path}"
        )
    return "no test image among the backbone's"
