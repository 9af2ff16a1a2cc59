"""The images of a store, in blocks: what counts, and writing a block that counts once its subject's part does."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int, UInt8

from data.schema import ROLES, digest_of
from data.sources import ImageSource
from data.store.zarr_arrays import (
    array_at,
    attribute,
    complete_members,
    create_array,
    get,
    group_at,
    put,
    resume_or_begin,
    shard_rows,
)

Progress = Callable[[int], None]
"""Told the bytes as they are written."""


def encode_ids(ids: Sequence[str]) -> UInt8[np.ndarray, "image byte"]:
    """Return identities as padded UTF-8."""
    encoded = [i.encode() for i in ids]
    width = max(map(len, encoded))
    return np.frombuffer(b"".join(e.ljust(width, b"\0") for e in encoded), np.uint8).reshape(len(ids), width)


def decode_ids(array: UInt8[np.ndarray, "image byte"]) -> list[str]:
    """Return the identities that an array of ids holds."""
    return [row.tobytes().rstrip(b"\0").decode() for row in array]


def image_blocks(root: zarr.Group) -> list[tuple[str, zarr.Group]]:
    """Return the blocks that count: complete, and if a subject's import brought them, that is complete too."""
    found = []
    for name, group in complete_members(root, "images"):
        part = attribute(group, "part")
        if part is None or (part in root and attribute(group_at(root, part), "image_block") == name):
            found.append((name, group))
    return found


def image_ids(root: zarr.Group) -> list[str]:
    """Return the identity of every image, by global row."""
    return [i for _, group in image_blocks(root) for i in decode_ids(get(group, "id"))]


def image_roles(root: zarr.Group) -> list[str]:
    """Return the split that the data set prescribes for every image ("" where it prescribes none)."""
    roles: list[str] = []
    for _, group in image_blocks(root):
        names = attribute(group, "role_names")
        roles += [names[code] for code in get(group, "role")]
    return roles


def write_images(
    root: zarr.Group, images: ImageSource, *, part: str | None, progress: Progress
) -> tuple[Int[np.ndarray, " image"], str | None]:
    """Write the images that aren't there yet as a block, which counts once `part` does.

    Returns the global row of each image, and the block's name if there is one.
    """
    known = {identity: row for row, identity in enumerate(image_ids(root))}
    new = np.array([i for i, identity in enumerate(images.ids) if identity not in known], np.int64)
    block = f"{len(image_blocks(root)):04d}" if len(new) else None
    if block is not None:
        _write_block(root, block, images, new, part=part, progress=progress)
        known |= {images.ids[i]: len(known) + k for k, i in enumerate(new)}
    return np.array([known[identity] for identity in images.ids], np.int32), block


def _write_block(
    root: zarr.Group, name: str, images: ImageSource, new: np.ndarray, *, part: str | None, progress: Progress
) -> None:
    ids = encode_ids([images.ids[i] for i in new])
    roles = np.array([ROLES.index(images.roles[i]) for i in new], np.uint8)
    digest = digest_of(ids)
    plan = digest_of(digest, roles, str(part), str(images.shape), str(images.read is None))
    group = resume_or_begin(root.require_group("images"), name, plan=plan)
    if attribute(group, "complete"):  # all but the subject's commit was done before the interruption
        progress(len(new) * 3 * int(np.prod(images.shape or 0)))
        return
    put(group, "id", ids)
    put(group, "role", roles)
    if images.read is not None and images.shape is not None:
        _write_pixels(group, images, new, progress)
    shape = list(images.shape) if images.read is not None and images.shape is not None else None
    attrs: dict[str, Any] = {"complete": True, "digest": digest, "role_names": list(ROLES), "part": part}
    group.attrs.put(attrs | {"pixel_shape": shape, "plan": plan})


def _write_pixels(group: zarr.Group, images: ImageSource, new: np.ndarray, progress: Progress) -> None:
    """Write pictures by whole shards, from where an interrupted import stopped."""
    assert images.read is not None and images.shape is not None
    shape = (len(new), *images.shape, 3)
    done = int(attribute(group, "pixels_written") or 0)
    array = array_at(group, "pixels") if done else create_array(group, "pixels", shape, np.uint8, kind="pixels")
    step = shard_rows(array)
    progress(done * int(np.prod(shape[1:])))
    for start in range(done, len(new), step):
        pixels = images.read(new[start : start + step])
        if pixels.dtype != np.uint8 or pixels.shape[1:] != shape[1:]:
            raise ValueError(f"pictures must be uint8 of {shape[1:]}, got {pixels.dtype} {pixels.shape[1:]}")
        array[start : start + step] = pixels
        group.attrs.update({"pixels_written": start + len(pixels)})
        progress(pixels.nbytes)
