"""Figures say what they show; read back from the text of SVG files."""

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from data.voxels import Volume
from foundation.evaluation.figures import bars_per_roi, learning_curve, maps
from foundation.evaluation.figures.canvas import looks
from foundation.evaluation.figures.mosaic import axial_slices
from foundation.evaluation.metrics import patternwise_r
from foundation.evaluation.score import merge_scores
from tests.planted_scores import planted_scores

SYSTEMS = {"manybrains": 0.7, "ridge": 1.0, "banded-ridge": 0.9}


def texts(draw: Callable[[Path], None], directory: Path) -> list[str]:
    """Every text in a figure, in the order in which they are drawn."""
    path = directory / "figure.svg"
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(path)
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())]


def test_a_system_looks_the_same_in_every_figure_and_unlike_the_others():
    every = looks(["ridge", "scratch", "manybrains", "ceiling", "mine"])
    assert looks(["manybrains"])["manybrains"] == every["manybrains"]
    assert looks(["scratch", "ridge"])["ridge"] == every["ridge"]
    assert len({look.colour for look in every.values()}) == len({look.marker for look in every.values()}) == 4
    assert "ceiling" not in every


def test_bars_name_subjects_families_systems_and_ceiling(tmp_path):
    scores = merge_scores(planted_scores(SYSTEMS, subject=name) for name in ("subj01", "subj02"))
    found = texts(lambda path: bars_per_roi(scores, path), tmp_path)
    assert {"subj01", "subj02", "all", "early", "higher", *SYSTEMS, "ceiling"} <= set(found)
    assert not {"zero", "mean", "mid"} & set(found)  # they have no correlation, or no voxel


def test_a_curve_names_systems_sessions_and_training_images(tmp_path):
    points = [(1, planted_scores(SYSTEMS)), (10, planted_scores(SYSTEMS))]
    found = texts(lambda path: learning_curve(points, path, n_train={1: 161, 10: 1234}), tmp_path)
    assert {"subj05", "1", "10", "161", "1234", *SYSTEMS, "ceiling", "gain over ridge"} <= set(found)
    assert "sessions (below: training images in them)" in found
    assert not {"zero", "mean"} & set(found)


@pytest.mark.parametrize("systems", [{"manybrains": 1.0}, {"ridge": 1.0}, SYSTEMS], ids=["alone", "ridge", "all"])
def test_a_curve_of_one_point_without_intervals_or_without_ridge_is_drawn(tmp_path, systems):
    points = [(2, planted_scores(systems, n_bootstraps=0))]
    assert set(systems) <= set(texts(lambda path: learning_curve(points, path), tmp_path))


def responses() -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured, five images by 40 voxels: the correlation falls from the first image to the last."""
    rng = np.random.default_rng(0)
    predicted, noise = rng.standard_normal((2, 5, 40)).astype(np.float32)
    noise -= noise.mean(1, keepdims=True) + predicted * (noise * predicted).mean(1, keepdims=True)
    measured = predicted + np.arange(5, dtype=np.float32)[:, None] * noise
    assert (np.diff(patternwise_r(predicted, measured)) < 0).all()
    return predicted, measured


NAMES = ["first", "second", "third", "fourth", "f" * 64]


def test_maps_name_the_best_the_median_and_the_worst_image_by_pattern_r(tmp_path):
    predicted, measured = responses()
    found = texts(lambda path: maps(predicted, measured, path, images=NAMES, title="subj05"), tmp_path)
    titles = [text for text in found if "pattern r" in text]
    assert [title.split(",")[0] for title in titles] == ["best: first", "median: third", f"worst: {'f' * 24}…"]
    assert titles[0].endswith("pattern r = 1.00")
    assert {"subj05", "all voxels (40)", "measured", "predicted"} <= set(found)


def test_a_prediction_without_variance_counts_as_the_worst(tmp_path):
    predicted, measured = responses()
    predicted[1] = 0.5
    found = texts(lambda path: maps(predicted, measured, path, images=NAMES), tmp_path)
    assert "worst: second, pattern r = nan" in found


def test_a_strip_tells_families_and_how_many_voxels_they_have(tmp_path):
    predicted, measured = responses()
    families = {"early": np.arange(40) < 25, "higher": np.arange(40) >= 30}
    found = texts(lambda path: maps(predicted, measured, path, images=NAMES, families=families), tmp_path)
    assert {"early (25)", "higher (10)", "no family (5)"} <= set(found)


def test_a_single_image_is_shown_once(tmp_path):
    predicted, measured = (x[:1] for x in responses())
    found = texts(lambda path: maps(predicted, measured, path, images=NAMES[:1]), tmp_path)
    assert sum("pattern r" in text for text in found) == 1


def test_names_must_be_as_many_as_images(tmp_path):
    with pytest.raises(ValueError, match="4 names for 5 predicted and 5 measured images"):
        maps(*responses(), tmp_path / "maps.png", images=NAMES[:4])


@pytest.fixture
def volume() -> Volume:
    """40 voxels in two slices of a volume whose first axis goes left and whose last two are swapped."""
    affine = np.array([[-2.0, 0, 0, 10], [0, 0, 3.0, -5], [0, 2.5, 0, -20], [0, 0, 0, 1]])
    index = np.array([(i, k, j) for i in range(5) for k in (2, 4) for j in range(4)], np.int32)
    return Volume(shape=(7, 6, 5), affine=affine, index=index)


def test_slices_show_each_voxel_at_its_place_left_on_the_left(volume):
    x, y, z = volume.coordinates().T.astype(np.float64)
    for values in (x, y, z):
        slices = axial_slices(values, volume, n_slices=6)
        assert slices.values.shape == (2, 4, 5)
        rows = {"x": np.unique(x), "y": np.unique(y)[:, None], "z": np.unique(z)[:, None, None]}
        expected = rows["x" if values is x else "y" if values is y else "z"]
        np.testing.assert_array_equal(slices.values, np.broadcast_to(expected, (2, 4, 5)))
        np.testing.assert_allclose(slices.z_mm, [-15, -10])


def test_outside_the_voxels_slices_are_undefined(volume):
    some = Volume(shape=volume.shape, affine=volume.affine, index=volume.index[1:])
    slices = axial_slices(np.ones(39), some, n_slices=2)
    assert np.isnan(slices.values).sum() == 1


def test_maps_of_a_volume_tell_the_heights_of_slices_and_hands(tmp_path, volume):
    found = texts(lambda path: maps(*responses(), path, images=NAMES, place=volume), tmp_path)
    assert {"z = -15 mm", "z = -10 mm", "L", "R"} <= set(found)
    assert "all voxels (40)" not in found
