"""Groups of voxels: the ROIs of Stage 1, each kind named in a word.

::

    sequential:30     runs of 30 consecutive voxels, as the paper groups them
    compact:30        k-means on positions, clusters of about 30 voxels
    auto:30           compact where positions are known, else sequential
    functional:30     k-means on positions and on how alike voxels respond to the training images
    roi:streams       the labels of an ROI family of the subject
    atlas:PATH        the labels of a volume in the subject's space, resampled (nearest neighbour) if need be

A voxel that `roi` or `atlas` gives no label belongs to one further parcel, ``outside``, which comes last. Only
``functional`` looks at responses: it is made anew for each split, choice of sessions and seed, never kept in a store,
and says which images it looked at, so that the audit can hold it to the training part.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64, Num

from data.preprocess import Samples
from data.schema import digest_of, json_digest
from data.voxels import Rois, Volume, VoxelTable

Kind = Literal["sequential", "compact", "auto", "functional", "roi", "atlas"]
N_COMPONENTS = 20
"""Principal components of the responses that `functional` clusters by."""


def sequential(n_voxels: int, *, size: int = 30) -> Int64[np.ndarray, " voxel"]:
    """Return runs of `size` consecutive voxels of the flattened mask, as the paper groups them."""
    n = max(1, round(n_voxels / size))
    return np.minimum(np.arange(n_voxels) * n // n_voxels, n - 1)


def compact(
    coordinates: Float32[np.ndarray, "voxel 3"], *, size: int = 30, seed: int = 0
) -> Int64[np.ndarray, " voxel"]:
    """Return spatially compact clusters of about `size` voxels: k-means on positions, numbered by first voxel."""
    return _clusters(coordinates, size=size, seed=seed)


def functional(
    coordinates: Float32[np.ndarray, "voxel 3"],
    responses: Float32[np.ndarray, "image voxel"],
    *,
    size: int = 30,
    seed: int = 0,
) -> Int64[np.ndarray, " voxel"]:
    """Return clusters of voxels that lie close together and respond alike, numbered by first voxel.

    K-means on positions, scaled to a total variance of 1, beside the voxels' profiles over images, each standardised
    so that the squared distance of two is ``2 (1 - r)``, reduced to their first principal components and scaled to a
    total variance of 1 as well: place and response count alike. `responses` are those of training images.
    """
    from sklearn.decomposition import PCA

    profile = responses.T - responses.mean(0)[:, None]
    length = np.linalg.norm(profile, axis=1, keepdims=True)
    profile = np.divide(profile, length, out=np.zeros_like(profile), where=length > 0)
    n_components = min(N_COMPONENTS, *profile.shape)
    pca = PCA(n_components, svd_solver="randomized", random_state=seed)
    return _clusters(np.hstack([_unit_variance(coordinates), _unit_variance(pca.fit_transform(profile))]), size, seed)


def _unit_variance(features: Num[np.ndarray, "voxel feature"]) -> Float64[np.ndarray, "voxel feature"]:
    spread = np.sqrt(features.var(0, dtype=np.float64).sum())
    return features.astype(np.float64) / (spread if spread > 0 else 1)


def _clusters(features: Num[np.ndarray, "voxel feature"], size: int, seed: int) -> Int64[np.ndarray, " voxel"]:
    from sklearn.cluster import KMeans

    n = max(1, round(len(features) / size))
    # A fixed number of starts, as an int: scikit-learn's stubs know only its default, "auto".
    found = KMeans(n_clusters=n, n_init=cast(Any, 1), random_state=seed).fit_predict(features)
    _, first = np.unique(found, return_index=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[np.unique(found, return_inverse=True)[1]]


# -- by name -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ParcelSpec:
    """How to make parcels: a kind, and the `size` of a cluster or the `source` of the labels."""

    kind: Kind
    size: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.source if self.size is None else self.size}"


@dataclass(frozen=True, kw_only=True)
class Parcels:
    """Every voxel in one parcel of some `kind`: `labels` count from 0 and index `names`.

    `key` identifies how they were made, and what from. `used_images` are the store's rows of the images whose responses
    were looked at, None where none were.
    """

    kind: Kind
    labels: Int64[np.ndarray, " voxel"]
    names: tuple[str, ...]
    key: str
    used_images: Int[np.ndarray, " image"] | None = None


def parse_parcels(text: str) -> ParcelSpec:
    """Return what a text like ``compact:30`` asks for.

    Raises
    ------
    ValueError
        If it names no kind of parcels, or a size that isn't a whole number from 1.
    """
    kind, _, rest = text.partition(":")
    if kind not in get_args(Kind):
        raise ValueError(f"parcels {text!r} are of no known kind; there are {', '.join(get_args(Kind))} (compact:30)")
    kind = cast(Kind, kind)
    if kind in ("roi", "atlas"):
        if not rest:
            raise ValueError(f"parcels {text!r} need a source; write roi:FAMILY or atlas:PATH")
        return ParcelSpec(kind=kind, source=rest)
    if rest and (not rest.isdecimal() or int(rest) < 1):
        raise ValueError(f"parcels {text!r} need a size in voxels, a whole number from 1; write {kind}:30")
    return ParcelSpec(kind=kind, size=int(rest or 30))


def make_parcels(
    spec: ParcelSpec,
    voxels: VoxelTable,
    *,
    responses: Samples | None = None,
    split_digest: str | None = None,
    n_sessions: int | None = None,
    seed: int = 0,
) -> Parcels:
    """Return a subject's parcels.

    Parameters
    ----------
    responses, split_digest, n_sessions
        For ``functional``: the standardised training samples, the digest of the split of the images that the subject
        saw (`Split.digest_of`), and the sessions that they came from (None: all). The other kinds don't look at them.
    seed
        Of the clustering.

    Raises
    ------
    ValueError
        If the subject lacks what the parcels are made from.
    """
    made_from: dict[str, Any] = {"spec": str(spec), "voxels": voxels.digest()}
    if spec.kind in ("roi", "atlas"):
        rois = _family(spec, voxels) if spec.kind == "roi" else _atlas(spec, voxels)
        labels, names = _by_label(rois)
        made_from |= {"labels": digest_of(rois.labels)}
        return Parcels(kind=spec.kind, labels=labels, names=names, key=json_digest(made_from))
    assert spec.size is not None
    used = None
    if spec.kind == "sequential" or (spec.kind == "auto" and _known_positions(voxels) is None):
        labels = sequential(voxels.n_voxels, size=spec.size)
    elif spec.kind in ("compact", "auto"):
        labels = compact(_positions(spec, voxels), size=spec.size, seed=seed)
        made_from |= {"seed": seed}
    else:
        if responses is None or split_digest is None:
            raise ValueError(f"parcels {spec} look at responses; give training samples and the digest of their split")
        labels = functional(_positions(spec, voxels), responses.responses, size=spec.size, seed=seed)
        used = np.union1d(responses.image, [] if responses.standardised_by is None else responses.standardised_by)
        used = used.astype(responses.image.dtype)
        made_from |= {"seed": seed, "split": split_digest, "sessions": n_sessions, "subject": responses.subject}
        made_from |= {"responses": digest_of(responses.image, responses.responses, used)}
    names = tuple(f"{spec.kind}-{k + 1}" for k in range(labels.max() + 1))
    return Parcels(kind=spec.kind, labels=labels, names=names, key=json_digest(made_from), used_images=used)


def _positions(spec: ParcelSpec, voxels: VoxelTable) -> Float32[np.ndarray, "voxel 3"]:
    found = _known_positions(voxels)
    if found is None:
        raise ValueError(f"parcels {spec} need positions, which these voxels lack; ask for sequential:{spec.size}")
    return found


def _known_positions(voxels: VoxelTable) -> Float32[np.ndarray, "voxel 3"] | None:
    if voxels.coordinates is None and isinstance(voxels.place, Volume):
        return voxels.place.coordinates()
    return voxels.coordinates


def _family(spec: ParcelSpec, voxels: VoxelTable) -> Rois:
    if spec.source not in voxels.rois:
        have = ", ".join(sorted(voxels.rois)) or "none"
        raise ValueError(f"parcels {spec}: the subject has no ROI family {spec.source!r}; it has {have}")
    return voxels.rois[spec.source]


def _atlas(spec: ParcelSpec, voxels: VoxelTable) -> Rois:
    from data.nifti import read_labels

    if not isinstance(voxels.place, Volume):
        raise ValueError(f"parcels {spec} need voxels with a place in a volume, which these lack; ask for roi:FAMILY")
    return read_labels(Path(cast(str, spec.source)), voxels.place)


def _by_label(rois: Rois) -> tuple[Int64[np.ndarray, " voxel"], tuple[str, ...]]:
    """Return parcels of the labels that occur, in their order; label 0 comes last, as ``outside``."""
    found = np.unique(rois.labels)
    order = [*(int(label) for label in found if label), *([0] if 0 in found else [])]
    place = np.empty(len(found), np.int64)
    place[np.searchsorted(found, order)] = np.arange(len(order))
    names = tuple(rois.names[label] if label else "outside" for label in order)
    return place[np.searchsorted(found, rois.labels)], names
