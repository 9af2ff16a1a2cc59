"""What a report keeps of a subject: the numbers of the table, three images, and no predictions."""

import io

import numpy as np
import pytest
from PIL import Image

from data.sources import ImageBlock
from data.store import PooledStore
from data.voxels import VoxelTable
from foundation.evaluation.evaluated import Evaluated
from foundation.evaluation.metrics import patternwise_r
from foundation.evaluation.report.kept import LEVELS, n_above_chance, picture, shown
from foundation.evaluation.score import score
from tests.planted_scores import N_IMAGES, N_VOXELS, planted_measured


class Subject:
    """A subject of a store, as far as a report asks."""

    voxels = VoxelTable(n_voxels=N_VOXELS)


@pytest.fixture
def store(tmp_path, monkeypatch) -> PooledStore:
    made = PooledStore.create(tmp_path / "store.zarr", name="store")
    made.add_images(ImageBlock(ids=[f"image{i}" for i in range(N_IMAGES)], roles=["test"] * N_IMAGES))
    monkeypatch.setattr(made, "subject", lambda name: Subject())
    return made


def evaluated(*, averaged: bool = False) -> Evaluated:
    measured, signal = planted_measured()
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, *signal.shape)).astype(np.float32)
    predictions = {"ours": signal + 0.5 * noise[0], "ridge": signal + noise[1]}
    samples = {"ours": rng.standard_normal((20, *signal.shape)).astype(np.float32)}
    mean = np.zeros(N_VOXELS, np.float32)
    scores = score(predictions, measured, training_mean=mean, n_bootstraps=10, rng=rng, samples=samples)
    return Evaluated(
        measured=measured,
        rows=np.arange(N_IMAGES),
        predictions=predictions,
        samples=samples,
        training_mean=mean,
        scores={"strict": scores},
    )


def test_voxel_r_averages_to_the_number_in_the_table(store):
    kept = shown(evaluated(), store, leading="ours")
    rows = {r.system: r.value for r in kept.scores.rows if (r.roi, r.axis, r.target, r.metric) == (
        "all", "voxel", "mean", "r")}  # fmt: skip
    for system in ("ours", "ridge"):
        assert kept.r[system].mean() == pytest.approx(rows[system], abs=1e-6)


def test_examples_are_the_extremes_and_the_median_of_the_leading_system(store):
    of = evaluated()
    kept = shown(of, store, leading="ridge")
    r = patternwise_r(of.predictions["ridge"], of.measured.mean)
    best, median, worst = kept.examples
    assert (best.which, median.which, worst.which) == ("best", "median", "worst")
    assert (best.r, worst.r) == pytest.approx((r.max(), r.min()))
    assert best.name == f"image{r.argmax()}"
    np.testing.assert_array_equal(best.predicted, of.predictions["ridge"][r.argmax()])
    assert best.predicted.base is None  # a view would keep all predictions in memory


def test_the_highest_r_is_the_root_of_the_ceiling(store):
    kept = shown(evaluated(), store, leading="ours")
    assert kept.highest_r == pytest.approx(np.sqrt(0.7))


def test_each_level_of_a_sampling_system_is_kept_and_samples_are_not(store):
    kept = shown(evaluated(), store, leading="ours")
    assert list(kept.covered) == ["ours"]
    assert kept.covered["ours"].shape == (len(LEVELS),)
    assert (np.diff(kept.covered["ours"]) > 0).all()


def test_noise_is_above_chance_in_few_voxels_and_signal_in_all():
    rng = np.random.default_rng(0)
    assert n_above_chance(rng.normal(0, 1 / np.sqrt(97), 2000), n_images=100) <= 2
    assert n_above_chance(np.full(50, 0.6), n_images=100) == 50
    assert n_above_chance(np.full(50, -0.6), n_images=100) == 0  # predicted backwards
    assert n_above_chance(np.full(50, np.nan), n_images=100) == 0


def test_a_picture_is_found_by_its_row_over_blocks(tmp_path):
    store = PooledStore.create(tmp_path / "pictures.zarr", name="pictures")
    shades = np.array([10, 90, 170, 250], np.uint8)
    for k in (0, 2):
        pixels = np.broadcast_to(shades[k : k + 2, None, None, None], (2, 300, 200, 3)).copy()
        store.add_images(ImageBlock(ids=[f"image{k}", f"image{k + 1}"], roles=["test", "test"], pixels=pixels))
    for row, shade in enumerate(shades):
        found = picture(store, row)
        assert found is not None
        opened = Image.open(io.BytesIO(found))
        assert max(opened.size) == 160
        assert np.abs(np.asarray(opened).astype(int) - shade).max() < 3
    with pytest.raises(ValueError, match="there is no image 4"):
        picture(store, 4)


def test_without_pixels_there_is_no_picture_and_none_is_kept_if_unwanted(store):
    assert picture(store, 0) is None
    assert all(e.jpeg is None for e in shown(evaluated(), store, leading="ours", with_pictures=False).examples)
