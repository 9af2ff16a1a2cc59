"""A report's figures say what they show; surfaces are coarsened by leaving vertices out, with nothing fetched."""

import re
import socket
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from data.voxels import Surface, Volume, VoxelTable
from foundation.evaluation.curve import curve_rows
from foundation.evaluation.figures.brain import Scale, brain_map, how_shown
from foundation.evaluation.figures.calibration import calibration_plot
from foundation.evaluation.figures.gallery import measured_against_predicted
from foundation.evaluation.figures.histogram import r_against_highest, voxel_histogram
from foundation.evaluation.figures.learning_curve import draw_curve
from foundation.evaluation.figures.panel import WIDTH, legend_columns, new_panel, wrapped
from foundation.evaluation.figures.surface import N_VERTICES, on_fsaverage5, to_fsaverage5
from tests.planted_scores import planted_scores

R = Scale(label="voxel r", low=0.0, high=1.0)
FSAVERAGE = 163_842


def texts(draw: Callable[[Path], None], directory: Path) -> set[str]:
    """Every text in a figure."""
    path = directory / "figure.svg"
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(path)
    return {text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())}


def surface(vertices: list[int], hemispheres: list[int], *, space: str = "fsaverage", n: int = FSAVERAGE) -> Surface:
    return Surface(
        space=space,
        n_vertices=(n, n),
        hemisphere=np.array(hemispheres, np.int8),
        vertex=np.array(vertices, np.int32),
    )


def test_a_histogram_names_systems_units_and_what_could_be_reached(tmp_path):
    r = {"ours": np.array([0.1, 0.4, np.nan]), "ridge": np.array([0.0, 0.2, 0.3])}
    highest = np.full(3, 0.8)
    found = texts(
        lambda path: voxel_histogram(r, path, highest_r=highest, title="subj01", limits=(-0.2, 1.0)), tmp_path
    )
    assert {"subj01", "ours", "ridge", "highest possible r", "voxels (count per bin)"} <= found
    assert "highest possible r" not in texts(
        lambda path: voxel_histogram(r, path, title="subj01", limits=(-0.2, 1.0)), tmp_path
    )


def test_r_against_the_highest_has_units_on_both_axes_and_counts_undefined_voxels_out(tmp_path):
    r, highest = np.array([0.1, np.nan, 0.5]), np.array([0.8, 0.8, np.nan])
    found = texts(lambda path: r_against_highest(r, highest, path, title="t", limits=(-0.2, 1.0)), tmp_path)
    assert {"highest possible r (√ noise ceiling)", "voxel r", "voxels (count, log scale)"} <= found


def test_calibration_is_drawn_in_per_cent_and_leaves_out_levels_without_a_value(tmp_path):
    covered = {"ours": np.array([0.1, 0.5, np.nan])}
    found = texts(
        lambda path: calibration_plot(covered, [0.1, 0.5, 0.9], path, title="subj01", systems=["ours", "ridge"]),
        tmp_path,
    )
    assert {"subj01", "ours", "right spread", "targets inside (%)", "nominal level of the interval (%)"} <= found
    assert "ridge" not in found


@pytest.mark.parametrize("labelled", [True, False], ids=["families", "no labels"])
def test_measured_against_predicted_tells_families_apart(tmp_path, labelled):
    measured, predicted = np.random.default_rng(0).standard_normal((2, 30))
    families = {"early": np.arange(30) < 10, "higher": np.arange(30) > 20} if labelled else {}
    found = texts(
        lambda path: measured_against_predicted(measured, predicted, path, families=families, limit=2.0), tmp_path
    )
    assert {"predicted (SD)", "measured (SD)"} <= found
    assert ({"early", "higher", "no family"} <= found) is labelled


def test_the_curve_of_a_runs_rows_is_that_of_its_scores(tmp_path):
    rows = curve_rows([(1, planted_scores({"ours": 1.0, "ridge": 1.0})), (3, planted_scores({"ours": 0.5}))])
    assert {"1", "3", "ours", "ridge", "ceiling"} <= texts(lambda path: draw_curve(rows, path), tmp_path)


def test_long_names_are_wrapped_and_stand_below_each_other():
    assert max(map(len, wrapped("subj01: voxel r of " + "long-name/" * 12).splitlines())) <= 11 * WIDTH + 1
    figure, _ = new_panel("")
    assert legend_columns(figure, ["a" * 60]) == 1
    assert legend_columns(figure, ["ours", "ridge"]) > 2


# -- where voxels are --------------------------------------------------------------------------------------------------


def test_fsaverage5_has_the_first_vertices_of_fsaverage_in_each_hemisphere():
    place = surface([0, N_VERTICES - 1, N_VERTICES, 0, 7], [0, 0, 0, 1, 1])
    found = to_fsaverage5(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), place)
    assert found.shape == (2, N_VERTICES)
    assert [found[0, 0], found[0, -1], found[1, 0], found[1, 7]] == [1, 2, 4, 5]
    assert np.isfinite(found).sum() == 4


def test_only_surfaces_that_contain_fsaverage5_are_shown_on_it():
    assert on_fsaverage5(surface([0], [0]))
    assert not on_fsaverage5(surface([0], [0], space="native"))
    assert not on_fsaverage5(surface([0], [0], space="fsaverage4", n=2562))
    assert not on_fsaverage5(None)


def test_a_surface_is_drawn_without_a_network(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refused)
    n = 400
    voxels = VoxelTable(n_voxels=2 * n, place=surface([*range(n), *range(n)], [0] * n + [1] * n))
    values = np.linspace(0, 1, 2 * n)
    found = texts(lambda path: brain_map(values, path, voxels=voxels, families={}, scale=R, title="subj01"), tmp_path)
    assert {"left, lateral", "right, lateral", "left, medial", "right, ventral", "voxel r"} <= found


@pytest.fixture
def grid() -> Volume:
    """24 voxels in three slices."""
    return Volume(
        shape=(4, 4, 4), affine=np.diag([2.0, 2.0, 3.0, 1.0]), index=np.argwhere(np.ones((4, 2, 3))).astype(np.int32)
    )


def test_a_map_is_drawn_where_the_voxels_are_known_to_be(tmp_path, grid):
    values = np.linspace(0, 1, 24)
    tables = {
        "volume": VoxelTable(n_voxels=24, place=grid),
        "positions": VoxelTable(n_voxels=24, coordinates=grid.coordinates()),
        "nowhere": VoxelTable(n_voxels=24),
    }
    expected = {
        "volume": {"z = 0 mm", "z = 6 mm", "L", "R"},
        "positions": {"from above", "from behind", "from the right", "z, up (mm)"},
        "nowhere": {"early", "(10)", "no family", "(14)"},
    }
    told = {"volume": "Axial slices", "positions": "positions in mm", "nowhere": "a strip"}
    for name, voxels in tables.items():
        families = {"early": np.arange(24) < 10}
        found = texts(
            lambda path, voxels=voxels, families=families: brain_map(
                values, path, voxels=voxels, families=families, scale=R, title="subj01"
            ),
            tmp_path,
        )
        assert expected[name] | {"voxel r", "subj01"} <= found, name
        assert told[name] in how_shown(voxels)


def test_a_difference_has_two_sided_colours_and_a_score_one_sided():
    assert Scale(label="", low=-0.3, high=0.3).colours.name == "coolwarm"
    assert R.colours.name == "viridis"
