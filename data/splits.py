"""Which image trains, which validates, which tests: by image, globally, for every subject alike.

A data set that prescribes a split (NSD: the 515 images that all subjects saw three times test, the other shared images
validate) has it as the images' role. Elsewhere a hash of the image's identity decides, so that adding data never moves
an image.
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
    place = int.from_bytes(hashlib.sha256(f"{RULE} {identity}".encode()).digest()[:8], "big") / 2**64
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def split_images(ids: list[str], roles: list[str]) -> Split:
    """Return the split of images with these identities and prescribed roles ("" where none is)."""
    parts = [role or hash_part(identity) for identity, role in zip(ids, roles, strict=True)]
    rule = "design" if all(roles) else "hash" if not any(roles) else "design, else hash"
    held_out = sorted((identity, part) for identity, part in zip(ids, parts, strict=True) if part != "train")
    digest = json_digest({"rule": rule, "held_out": held_out})
    return Split(ids=tuple(ids), parts=np.array(parts, "U10"), digest=digest, rule=rule)


def split_of(store: PooledStore) -> Split:
    """Return the split of a store's images."""
    return split_images(store.image_ids(), store.image_roles())
