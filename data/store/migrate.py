"""Stores of older formats, brought to the current one in place, a step per format; an interruption loses nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

from data.schema import FORMAT_VERSION, TRIAL_COLUMNS
from data.sources import SubjectData
from data.store.images import block_digest
from data.store.pooled import OldStoreError, PooledStore, format_version, written_by
from data.store.zarr_arrays import array_at, attribute, complete_members, get, get_optional, group_at
from data.voxels import Rois


def migrate(path: str | Path, *, tell: Callable[[str], None] = lambda line: None) -> None:
    """Bring a store to the current format; one that has it is left alone.

    Raises
    ------
    ValueError
        If there is no store, or one of a newer format.
    """
    try:
        PooledStore.open(path)
    except OldStoreError:
        pass
    else:
        return
    root = zarr.open_group(str(path), mode="r+", zarr_format=3)
    while (found := format_version(root)) < FORMAT_VERSION:
        _STEPS[found](str(path), root)
        tell(f"{path}: format {found} is now format {found + 1}")
        root = zarr.open_group(str(path), mode="r+", zarr_format=3)


def _from_0(path: str, root: zarr.Group) -> None:
    """A subject's trials were arrays of its own; now they are a part, with an array of responses per session."""
    store = PooledStore(path, root)
    ids = store.image_ids()
    subjects = complete_members(root, "subjects")
    for name, group in subjects:
        if "responses" not in group or complete_members(group, "parts"):
            continue
        data = _subject_0(name, group)
        # Labels and coordinates lie where format 1 has them, so the subject's head is there once it says so.
        group.attrs.update({"head_digest": data.source(ids).head_digest(), "place": None, "measure": ""})
        store.add_subject(data)
    for _, group in subjects:
        for old in ("responses", "trials"):  # whatever an interruption left of them
            sync(group.store.delete_dir(f"{group.path}/{old}"))
    for _, group in complete_members(root, "images"):
        names = attribute(group, "role_names")
        group.attrs.update({"digest": block_digest(get(group, "id"), [names[code] for code in get(group, "role")])})
    root.attrs.update({"format_version": 1, "written_by": written_by()})


def _subject_0(name: str, group: zarr.Group) -> SubjectData:
    rois = {}
    if "rois" in group:
        for family, array in group_at(group, "rois").arrays():
            names = {int(label): text for label, text in attribute(array, "names").items()}
            rois[family] = Rois(labels=np.asarray(array[...]), names=names)
    columns: dict[str, Any] = {column: get_optional(group, f"trials/{column}") for column in TRIAL_COLUMNS}
    return SubjectData(
        name=name,
        responses=np.asarray(array_at(group, "responses")[...]),
        coordinates=get_optional(group, "voxels/coordinates"),
        rois=rois,
        **{key: attribute(group, key) for key in ("scale", "unit", "provenance", "upstream_preprocessing")},
        **columns,
    )


_STEPS = {0: _from_0}
