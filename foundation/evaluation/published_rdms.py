"""Representational dissimilarity matrices that a data set publishes in place of responses, as a file.

An .npz with ``rdms`` (rdm, image, image), such as one per subject or per repeat, and ``images``, the images' identities
in the store as text.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int

from data.splits import Split


@dataclass(frozen=True, kw_only=True)
class PublishedRdms:
    """Measured RDMs, and the images that they are of."""

    rdms: Float64[np.ndarray, "rdm image image"]
    images: tuple[str, ...]

    def rows(self, split: Split) -> Int[np.ndarray, " image"]:
        """Return the store's rows of the images.

        Raises
        ------
        ValueError
            If the store lacks one, or a model may have learned from one: they must all be test images.
        """
        place = {identity: row for row, identity in enumerate(split.ids)}
        missing = [name for name in self.images if name not in place]
        if missing:
            raise ValueError(f"{len(missing)} images of the RDMs aren't in the store, such as {missing[0]!r}")
        rows = np.array([place[name] for name in self.images])
        seen = rows[~split.select(rows, "test")]
        if len(seen):
            raise ValueError(
                f"{len(seen)} images of the RDMs are no test images of the store, such as {split.ids[seen[0]]!r}: "
                "models have learned from them; leave them out"
            )
        return rows


def read_rdms(path: Path) -> PublishedRdms:
    """Read measured RDMs.

    Raises
    ------
    ValueError
        If the file isn't of that form.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            rdms, images = file["rdms"].astype(np.float64), file["images"]
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz with `rdms` and `images`, without pickles: {error}") from error
    n_images = len(images)
    if images.dtype.kind not in "US" or images.ndim != 1 or len(set(images.tolist())) < n_images:
        raise ValueError(f"`images` of {path} must be a list of different names, as text")
    if rdms.ndim != 3 or rdms.shape[1:] != (n_images, n_images) or not len(rdms):
        raise ValueError(f"`rdms` of {path} are {rdms.shape}, expected (rdm, {n_images}, {n_images}), for its images")
    names = images.astype("U").tolist() if images.dtype.kind == "U" else [name.decode() for name in images.tolist()]
    return PublishedRdms(rdms=rdms, images=tuple(names))
