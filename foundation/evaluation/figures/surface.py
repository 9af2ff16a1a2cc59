"""A number per vertex of fsaverage, drawn by nilearn on the mesh of fsaverage5 that comes with it.

fsaverage's icosahedra are nested: fsaverage5's vertices are the first 10,242 of fsaverage's 163,842 in each hemisphere,
so a map is made coarser by leaving vertices out, and nothing is averaged.
"""

import warnings

import numpy as np
from jaxtyping import Float, Float32
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from data.voxels import Surface, Volume

N_VERTICES = 10_242
"""Of fsaverage5, in each hemisphere."""
_HEMISPHERES = ("left", "right")
_VIEWS = ("lateral", "medial", "ventral")


def on_fsaverage5(place: Volume | Surface | None) -> bool:
    """Return whether a map of these vertices can be shown on fsaverage5."""
    return isinstance(place, Surface) and place.space.startswith("fsaverage") and min(place.n_vertices) >= N_VERTICES


def to_fsaverage5(values: Float[np.ndarray, " voxel"], place: Surface) -> Float32[np.ndarray, "hemisphere vertex"]:
    """Return the values at fsaverage5's vertices, NaN where there is none."""
    found = np.full((2, N_VERTICES), np.nan, np.float32)
    kept = place.vertex < N_VERTICES
    found[place.hemisphere[kept], place.vertex[kept]] = values[kept]
    return found


def draw_surface(
    figure: Figure,
    values: Float[np.ndarray, " voxel"],
    place: Surface,
    *,
    colours: Colormap,
    limits: tuple[float, float],
) -> None:
    """Draw both hemispheres, inflated, seen from the side, from the middle and from below."""
    from nilearn.datasets import load_fsaverage, load_fsaverage_data
    from nilearn.plotting import plot_surf

    mesh = load_fsaverage("fsaverage5")["inflated"]
    folds = load_fsaverage_data("fsaverage5", data_type="sulcal")
    axes = figure.subplots(len(_VIEWS), 2, subplot_kw={"projection": "3d"})
    for k, (side, on_side) in enumerate(zip(_HEMISPHERES, to_fsaverage5(values, place), strict=True)):
        for ax, view in zip(axes[:, k], _VIEWS, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a triangle without a value has a mean of nothing
                plot_surf(
                    mesh.parts[side],
                    on_side,
                    bg_map=folds.data.parts[side],
                    hemi=side,
                    view=view,
                    cmap=colours,
                    vmin=limits[0],
                    vmax=limits[1],
                    colorbar=False,
                    axes=ax,
                    figure=figure,
                    avg_method="median",
                )
            for drawn in ax.collections:
                drawn.set_rasterized(True)
            ax.set_box_aspect((1, 1, 1), zoom=1.45)
            ax.set_title(f"{side}, {view}", fontsize="small", pad=-2)
