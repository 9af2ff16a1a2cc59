"""Where a subject's voxels lie, as a file beside a model: a prediction becomes a volume without the store at hand.

``place.safetensors`` has the arrays of a `data.voxels.Volume` or `Surface`, and as JSON in its metadata the rest.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.nifti import written_whole
from data.voxels import Surface, Volume, VoxelTable

FILE = "place.safetensors"
_METADATA = "manybrains-place"


def save_place(place: Volume | Surface, directory: Path) -> Path:
    """Write ``place.safetensors`` into `directory`, whole or not at all, and return its path."""
    if isinstance(place, Volume):
        arrays = {"index": place.index, "affine": place.affine}
        rest = {"kind": "volume", "shape": [int(n) for n in place.shape]}
    else:
        arrays = {"hemisphere": place.hemisphere, "vertex": place.vertex}
        rest = {"kind": "surface", "space": place.space, "n_vertices": [int(n) for n in place.n_vertices]}
    path = directory / FILE
    with written_whole(path) as draft:
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, draft, {_METADATA: json.dumps(rest)}
        )
    return path


def load_place(directory: Path) -> Volume | Surface | None:
    """Return what `save_place` wrote into `directory`, or None where it wrote nothing.

    Raises
    ------
    ValueError
        If the file is damaged or something else.
    """
    path = directory / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            rest = json.loads((file.metadata() or {})[_METADATA])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        place = _place(rest, arrays)
        VoxelTable(n_voxels=len(arrays["index" if isinstance(place, Volume) else "vertex"]), place=place).check()
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged or holds no voxels' places ({error}); use another copy") from error
    return place


def _place(rest: dict[str, Any], arrays: dict[str, np.ndarray]) -> Volume | Surface:
    if rest["kind"] == "volume":
        x, y, z = (int(n) for n in rest["shape"])
        affine = arrays["affine"].astype(np.float64).reshape(4, 4)
        return Volume(shape=(x, y, z), affine=affine, index=arrays["index"].astype(np.int32))
    left, right = (int(n) for n in rest["n_vertices"])
    return Surface(
        space=str(rest["space"]),
        n_vertices=(left, right),
        hemisphere=arrays["hemisphere"].astype(np.int8),
        vertex=arrays["vertex"].astype(np.int32),
    )
