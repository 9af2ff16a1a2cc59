"""What is known of a subject's voxels beside their responses: places, ROI labels, published reliability."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Float64, Int8, Int16, Int32

from data.schema import check_name, digest_of, json_digest


@dataclass(frozen=True, kw_only=True)
class Rois:
    """One family of ROI labels; label 0 means "in none of them"."""

    labels: Int16[np.ndarray, " voxel"]
    names: dict[int, str]

    def mask(self, *names: str) -> np.ndarray:
        """Return where a voxel carries one of `names`, as (voxel,) bool."""
        wanted = [label for label, name in self.names.items() if name in names]
        return np.isin(self.labels, wanted)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Where voxels lie in a volume: `index` (i, j, k) into `shape`; `affine` takes it to mm."""

    shape: tuple[int, int, int]
    affine: Float64[np.ndarray, "4 4"]
    index: Int32[np.ndarray, "voxel 3"]

    def coordinates(self) -> Float32[np.ndarray, "voxel 3"]:
        """Return the voxels' positions in mm."""
        return (self.index @ self.affine[:3, :3].T + self.affine[:3, 3]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Where voxels lie on a pair of surfaces: `hemisphere` (0 left, 1 right) and `vertex` in `space`."""

    space: str
    n_vertices: tuple[int, int]
    hemisphere: Int8[np.ndarray, " voxel"]
    vertex: Int32[np.ndarray, " voxel"]


def _as_text(sizes: Sequence[int]) -> str:
    return str(tuple(int(n) for n in sizes))


@dataclass(frozen=True, kw_only=True)
class VoxelTable:
    """What is known of a subject's voxels beside their responses.

    `reliability` holds maps that a data set publishes, such as NSD's ``ncsnr``. They were computed from all trials,
    test trials too, so they may mask or report, never weigh a loss or choose anything (protocol rule 5).
    """

    n_voxels: int
    coordinates: Float32[np.ndarray, "voxel 3"] | None = None
    place: Volume | Surface | None = None
    rois: dict[str, Rois] = field(default_factory=dict)
    reliability: dict[str, Float32[np.ndarray, " voxel"]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError where the table contradicts itself."""
        n = self.n_voxels
        for family, rois in self.rois.items():
            check_name(family, "ROI family")
            if len(rois.labels) != n:
                raise ValueError(f"{n} voxels but {len(rois.labels)} labels of {family!r}")
            if missing := set(np.unique(rois.labels).tolist()) - set(rois.names) - {0}:
                raise ValueError(f"label {min(missing)} of {family!r} has no name")
        for name, values in self.reliability.items():
            check_name(name, "reliability map")
            if len(values) != n:
                raise ValueError(f"{n} voxels but {len(values)} values of the reliability map {name!r}")
        if self.coordinates is not None:
            if self.coordinates.shape != (n, 3):
                raise ValueError(f"coordinates must be ({n}, 3), got {self.coordinates.shape}")
            if not np.isfinite(self.coordinates).all():
                raise ValueError("coordinates must be finite; leave them out where they are unknown")
        if isinstance(self.place, Volume):
            index, shape = self.place.index, np.array(self.place.shape)
            if index.shape != (n, 3) or (index < 0).any() or (index >= shape).any():
                raise ValueError(f"{n} voxels need an index each within the volume {self.place.shape}")
            if len(np.unique(index, axis=0)) < n:
                raise ValueError("two voxels have the same index in the volume")
        if isinstance(self.place, Surface):
            side, vertex = self.place.hemisphere, self.place.vertex
            if len(side) != n or len(vertex) != n or not np.isin(side, (0, 1)).all():
                raise ValueError(f"{n} voxels need a hemisphere (0 left, 1 right) and a vertex each")
            if (vertex < 0).any() or (vertex >= np.array(self.place.n_vertices)[side]).any():
                raise ValueError(f"a vertex is outside the {self.place.n_vertices} vertices of {self.place.space}")

    def digest(self) -> str:
        """Return the digest of places and labels; published reliability doesn't enter: nothing is fitted on it."""
        parts: list[np.ndarray | str] = [str(self.n_voxels)]
        if self.coordinates is not None and not isinstance(self.place, Volume):  # in a volume the index says it exactly
            parts += ["coordinates", self.coordinates]
        if isinstance(self.place, Volume):
            parts += ["volume", _as_text(self.place.shape), self.place.affine, self.place.index]
        if isinstance(self.place, Surface):
            parts += ["surface", self.place.space, _as_text(self.place.n_vertices)]
            parts += [self.place.hemisphere, self.place.vertex]
        for name in sorted(self.rois):
            parts += [name, self.rois[name].labels, json_digest({str(k): v for k, v in self.rois[name].names.items()})]
        return digest_of(*parts)
