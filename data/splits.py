"""Which image trains, which validates, which tests: by image, globally, for every subject alike.

A data set that prescribes a split (NSD: the 515 images that all subjects saw three times test, the other shared images
validate) has it as the images' role. Elsewhere a hash of the image's identity decides, so that adding data never moves
an image. For cross-validation another hash deals all images, prescribed or not, into folds (`fold_split`).
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, Shaped

from data.schema import json_digest
from data.store import PooledStore

Part = Literal["train", "validation", "test"]
RULE = "manybrains split 1"
FOLD_RULE = "manybrains folds 1"
TEST_SHARE = 0.15
VALIDATION_SHARE = 0.10


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part of every image of a store, by global row.

    `digest` names what is held out in the whole store, so it changes when others' images are added; what was made from
    some images is known by `digest_of` these.
    """

    ids: tuple[str, ...]
    parts: Shaped[np.ndarray, " image"]
    digest: str
    rule: str

    def select(self, image: Int[np.ndarray, " trial"], *parts: Part) -> np.ndarray:
        """Return where `image` is in one of `parts`, as (trial,) bool."""
        return np.isin(self.parts[image], parts)

    def digest_of(self, image: Int[np.ndarray, " trial"]) -> str:
        """Return the digest of the parts that these images are in, whatever else the store has."""
        shown = sorted((self.ids[row], str(self.parts[row])) for row in np.unique(image))
        return json_digest({"rule": RULE, "parts": shown})


def hash_part(identity: str) -> Part:
    """Return the part that an image's identity alone decides."""
    place = _place(RULE, identity)
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def hash_fold(identity: str, n_folds: int) -> int:
    """Return the fold, 0 to `n_folds` - 1, that an image's identity alone decides, independently of its part."""
    return int(_place(FOLD_RULE, identity) * n_folds)


def split_images(ids: list[str], roles: list[str]) -> Split:
    """Return the split of images with these identities and prescribed roles ("" where none is)."""
    parts: list[str] = [role or hash_part(identity) for identity, role in zip(ids, roles, strict=True)]
    rule = "design" if all(roles) else "hash" if not any(roles) else "design, else hash"
    return _split(ids, parts, rule)


def fold_split(split: Split, k: int, n_folds: int) -> Split:
    """Return the split of the same images that tests fold `k` of `n_folds`, counted from 0, and trains on the rest.

    Folds don't overlap and cover all images, whatever part the given split has them in. Of the images outside the
    fold, those that validate are the ones whose hash says so (`hash_part`), in every fold alike.

    Raises
    ------
    ValueError
        If there are fewer than two folds, or there is no fold `k`.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds is {n_folds}; cross-validation needs at least 2")
    if not 0 <= k < n_folds:
        raise ValueError(f"fold {k} doesn't exist; {n_folds} folds are counted from 0 to {n_folds - 1}")
    parts: list[str] = [_part_beside_fold(identity, k, n_folds) for identity in split.ids]
    return _split(list(split.ids), parts, f"fold {k} of {n_folds} by hash, {FOLD_RULE}")


def split_of(store: PooledStore) -> Split:
    """Return the split of a store's images."""
    return split_images(store.image_ids(), store.image_roles())


def _place(rule: str, identity: str) -> float:
    """A number from 0 to below 1 that a rule and an identity decide."""
    # Of 64 bits, the top 53 fit a float exactly; all 64 could round up to 1.
    return (int.from_bytes(hashlib.sha256(f"{rule} {identity}".encode()).digest()[:8], "big") >> 11) / 2**53


def _part_beside_fold(identity: str, k: int, n_folds: int) -> Part:
    if hash_fold(identity, n_folds) == k:
        return "test"
    return "validation" if hash_part(identity) == "validation" else "train"


def _split(ids: list[str], parts: list[str], rule: str) -> Split:
    held_out = sorted((identity, part) for identity, part in zip(ids, parts, strict=True) if part != "train")
    digest = json_digest({"rule": rule, "held_out": held_out})
    return Split(ids=tuple(ids), parts=np.array(parts, "U10"), digest=digest, rule=rule)
