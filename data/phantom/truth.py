"""What was simulated in a phantom, kept beside its store: for tests and reports only.

Nothing that fits or scores a model may open it. `NAME.truth.zarr` holds `subjects/<name>/<field of SubjectTruth>`
and, where the images have labels, `labels/<column>`.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float, Float32, Int

from data.phantom.images import ImageLabels, Objects

_FORMAT, _VERSION = "manybrains-phantom-truth", 1


@dataclass(frozen=True, kw_only=True)
class SubjectTruth:
    """What was simulated in one subject.

    Attributes
    ----------
    image : rows in the store of the images that the subject saw.
    signal : response without noise, of zero mean and unit variance per voxel over those images.
    receptive_field : x, y (from the top left) and standard deviation, in fractions of the image's side.
    hierarchy : 0 (V1) to 1 (end of the streams).
    content_share : how much of the signal comes from what is in the image rather than from energy, 0 to 1.
    ncsnr : standard deviation of the signal over that of the noise, the session's gain and offset aside.
    ceiling : correlation of the signal with the mean of a test image's repeats, in expectation.
    amplitude : standard deviation of the signal, in percent signal change.
    early : weights over the early profiles that all subjects share.
    content : tuning to categories, then scenes, in the order of the labels' names; no columns without labels.
    """

    image: Int[np.ndarray, " image"]
    signal: Float32[np.ndarray, "image voxel"]
    receptive_field: Float[np.ndarray, "voxel 3"]
    hierarchy: Float[np.ndarray, " voxel"]
    content_share: Float[np.ndarray, " voxel"]
    ncsnr: Float[np.ndarray, " voxel"]
    ceiling: Float[np.ndarray, " voxel"]
    amplitude: Float[np.ndarray, " voxel"]
    early: Float[np.ndarray, "voxel profile"]
    content: Float[np.ndarray, "voxel content"]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What was simulated; `labels` are in the order of the store's images, None for photographs without a table."""

    config: dict[str, Any]
    subjects: dict[str, SubjectTruth]
    labels: ImageLabels | None


def truth_path(store_path: str | Path) -> Path:
    """Return where the truth of the phantom at `store_path` lies: beside it, `NAME.truth.zarr`."""
    path = Path(store_path)
    return path.with_name(f"{path.name.removesuffix('.zarr')}.truth.zarr")


def write_truth(path: Path, truth: Truth) -> None:
    """Write the truth to `path`, where nothing may be yet."""
    root = zarr.open_group(str(path), mode="w-")
    for name, subject in truth.subjects.items():
        group = root.create_group(f"subjects/{name}")
        for field in fields(subject):
            _put(group, field.name, getattr(subject, field.name))
    if truth.labels is not None:
        labels = truth.labels
        table = root.create_group("labels")
        table.attrs.update({"scene_names": list(labels.scene_names), "category_names": list(labels.category_names)})
        _put(table, "scene", labels.scene)
        _put(table, "visible_area", labels.visible_area)
        for field in fields(Objects):
            _put(table, field.name, getattr(labels.objects, field.name))
    root.attrs.update({"format": _FORMAT, "version": _VERSION, "config": truth.config})


def read_truth(store_path: str | Path) -> Truth:
    """Read what was simulated in the phantom at `store_path`. For tests and reports only.

    Raises
    ------
    ValueError
        If there is no truth beside the store, as with every store that is not a phantom.
    """
    path = truth_path(store_path)
    if not path.exists():
        raise ValueError(f"no truth at {path}; only phantoms have one: `python -m data phantom STORE` writes both")
    root = zarr.open_group(str(path), mode="r")
    subjects = {}
    for name, _ in sorted(_group(root, "subjects").groups()):
        group = _group(root, f"subjects/{name}")
        subjects[name] = SubjectTruth(**{field.name: _get(group, field.name) for field in fields(SubjectTruth)})
    labels = None
    if "labels" in root:
        table = _group(root, "labels")
        names: Any = table.attrs.asdict()
        labels = ImageLabels(
            scene_names=tuple(names["scene_names"]),
            category_names=tuple(names["category_names"]),
            scene=_get(table, "scene"),
            objects=Objects(**{field.name: _get(table, field.name) for field in fields(Objects)}),
            visible_area=_get(table, "visible_area"),
        )
    attributes: Any = root.attrs.asdict()
    return Truth(config=attributes["config"], subjects=subjects, labels=labels)


def _group(root: zarr.Group, path: str) -> zarr.Group:
    group = root[path]
    assert isinstance(group, zarr.Group)
    return group


def _put(group: zarr.Group, name: str, values: np.ndarray) -> None:
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=tuple(max(1, n) for n in values.shape)
    )
    array[...] = values


def _get(group: zarr.Group, name: str) -> np.ndarray:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[...])
