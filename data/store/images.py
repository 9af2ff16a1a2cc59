"""The images of a store, in blocks: what counts, and writing a block that counts once its subject's part does."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int, UInt8

from data.schema import ROLES, digest_of, json_digest, pixel_identity
from data.sources import ImageSource
from data.store.shards import REMEDY
from data.store.zarr_arrays import (
    array_at,
    attribute,
    complete_members,
    create_array,
    get,
    get_optional,
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


def block_digest(ids: UInt8[np.ndarray, "image byte"], roles: Sequence[str]) -> str:
    """Return the digest of a block: what images it has, and the role of each."""
    return digest_of(ids, "\n".join(roles))


def image_blocks(root: zarr.Group) -> list[tuple[str, zarr.Group]]:
    """Return the blocks that count: complete, and if a subject's import brought them, that is complete too.

    Raises
    ------
    ValueError
        If one is missing before others, whose rows would be taken for its own.
    """
    found = []
    for name, group in complete_members(root, "images"):
        part = attribute(group, "part")
        named = isinstance(part, str) and part in root
        if part is None or (named and attribute(group_at(root, part), "image_block") == name):
            found.append((name, group))
    names = [name for name, _ in found]
    if lost := sorted({f"{k:04d}" for k in range(len(names))} - set(names)):
        raise ValueError(f"{root.store_path}: image block {lost[0]} is missing, though {names[-1]} is there; {REMEDY}")
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
    digest = block_digest(ids, [images.roles[i] for i in new])
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in images.files]
    plan = digest_of(digest, roles, str(part), str(images.shape), str(images.read is None), json_digest(files))
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
    """Write pictures and the digest of each by whole shards, from where an interrupted import stopped."""
    assert images.read is not None and images.shape is not None
    shape = (len(new), *images.shape, 3)
    done = int(attribute(group, "pixels_written") or 0)
    if done:
        array, digests = array_at(group, "pixels"), array_at(group, "pixel_digest")
    else:
        array = create_array(group, "pixels", shape, np.uint8, kind="pixels")
        n_rows = shard_rows(array)
        digests = create_array(group, "pixel_digest", (len(new), 32), np.uint8, kind="table", rows_per_shard=n_rows)
    step = shard_rows(array)
    progress(done * int(np.prod(shape[1:])))
    for start in range(done, len(new), step):
        pixels = images.read(new[start : start + step])
        if pixels.dtype != np.uint8 or pixels.shape[1:] != shape[1:]:
            raise ValueError(f"pictures must be uint8 of {shape[1:]}, got {pixels.dtype} {pixels.shape[1:]}")
        array[start : start + step] = pixels
        hashed = [bytes.fromhex(pixel_identity(picture).removeprefix("sha256:")) for picture in pixels]
        digests[start : start + step] = np.frombuffer(b"".join(hashed), np.uint8).reshape(-1, 32)
        group.attrs.update({"pixels_written": start + len(pixels)})
        progress(pixels.nbytes)


def picture_digests(root: zarr.Group) -> dict[int, str]:
    """Return the identity that each image's pixels would give it, by global row, for the images with pictures."""
    found: dict[int, str] = {}
    first = 0
    for _, group in image_blocks(root):
        hashed = get_optional(group, "pixel_digest")
        if hashed is not None:
            found |= {first + k: f"sha256:{row.tobytes().hex()}" for k, row in enumerate(hashed)}
        first += array_at(group, "id").shape[0]
    return found


def check_still_ours(root: zarr.Group, block: str | None, *, part: str) -> None:
    """Raise ValueError if another writer took the place of a block that is about to count with `part`.

    A file lock keeps writers apart where there are files; on an object store this is the last look before the commit.
    """
    if block is None:
        return
    group = group_at(root, f"images/{block}") if f"images/{block}" in root else None
    taken = group is None or attribute(group, "part") != part or not attribute(group, "complete")
    if taken or len(image_blocks(root)) != int(block):
        raise ValueError("another process added images to the store meanwhile; run the import again, one at a time")
