"""Maps of voxels by name: the values are right, the format suits the voxels, and nothing that is there is lost."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest

from data import export
from data.export import export_map, map_names
from data.nifti import from_volume, read_labels, volume_of_mask
from data.noise_ceiling import ncsnr, noise_ceiling, split_half_reliability
from data.preprocess import standardised_trials
from data.sources import SubjectData
from data.splits import split_of
from data.store import PooledStore, SubjectStore
from data.voxels import Rois, Surface, Volume, VoxelTable

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 2, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1]])
SHAPE = (5, 6, 4)
SURFACE = Surface(
    space="fsaverage-tiny",
    n_vertices=(6, 7),
    hemisphere=np.array([0, 1, 0, 1, 1], np.int8),
    vertex=np.array([3, 0, 1, 5, 2], np.int32),
)
N_VOXELS = 5


def make_store(path, make_block, place, **voxels) -> PooledStore:
    """Forty images shown three times each over three sessions; the signal of voxel k is k times the noise."""
    rng = np.random.default_rng(4)
    store = PooledStore.create(path, name="maps")
    store.add_images(make_block([f"image-{k}" for k in range(40)]))
    image = np.tile(np.arange(40, dtype=np.int32), 3)
    signal = rng.normal(size=(40, N_VOXELS)) * np.arange(N_VOXELS)
    responses = 100 + signal[image] + rng.normal(size=(120, N_VOXELS))
    session = np.repeat(np.arange(1, 4), 40).astype(np.int16)
    given = {"responses": responses.astype(np.float32), "image": image, "session": session, "place": place} | voxels
    store.add_subject(SubjectData(name="subj01", **given))
    return store


@pytest.fixture
def corner() -> Volume:
    where = np.zeros(SHAPE, bool)
    where.flat[:N_VOXELS] = True
    return volume_of_mask(where, AFFINE)


@pytest.fixture
def volumetric(tmp_path, make_block, corner) -> PooledStore:
    rois = {"areas": Rois(labels=np.array([1, 1, 0, 2, 0], np.int16), names={1: "V1", 2: "V2"})}
    return make_store(tmp_path / "volume.zarr", make_block, corner, rois=rois)


@pytest.fixture
def superficial(tmp_path, make_block) -> PooledStore:
    return make_store(tmp_path / "surface.zarr", make_block, SURFACE)


def test_the_mean_and_standard_deviation_are_those_of_all_trials(volumetric, tmp_path, corner):
    responses = volumetric.subject(1).responses().astype(np.float64)
    for name, expected in {"mean": responses.mean(0), "sd": responses.std(0)}.items():
        out = tmp_path / f"{name}.nii.gz"
        assert export_map(volumetric, "subj01", name, out) == [out]
        image = nibabel.load(out)
        np.testing.assert_allclose(image.affine, AFFINE)
        np.testing.assert_allclose(from_volume(image.get_fdata(), corner), expected, rtol=1e-5)


def test_the_signal_to_noise_ratio_is_that_of_the_standardised_trials(volumetric, tmp_path):
    export_map(volumetric, 1, "ncsnr", tmp_path / "ncsnr.npy")
    trials = standardised_trials(volumetric.subject(1), split_of(volumetric))
    found = np.load(tmp_path / "ncsnr.npy")
    np.testing.assert_array_equal(found, ncsnr(trials.responses, trials.image))
    np.testing.assert_allclose(found, np.arange(N_VOXELS), rtol=0.35, atol=0.35)


def test_ceiling_and_split_half_rise_with_the_signal(volumetric, tmp_path):
    for name in ("noise-ceiling", "split-half"):
        export_map(volumetric, 1, name, tmp_path / f"{name}.npy")
        found = np.load(tmp_path / f"{name}.npy")
        assert (np.diff(found[1:]) > 0).all()
        assert found[-1] > 0.9


@pytest.mark.parametrize("n_at_a_time", [1, 2, 5])
def test_maps_of_noise_are_those_of_all_voxels_whatever_fits_into_memory(
    volumetric, tmp_path, monkeypatch, n_at_a_time
):
    subject, split = volumetric.subject(1), split_of(volumetric)
    trials = standardised_trials(subject, split)
    shown = np.unique(trials.image[split.select(trials.image, "test")], return_counts=True)[1]
    ratio = ncsnr(trials.responses, trials.image)
    expected = {
        "ncsnr": ratio,
        "noise-ceiling": noise_ceiling(ratio, shown),
        "split-half": split_half_reliability(trials.responses, trials.image, rng=np.random.default_rng(0)),
    }
    asked = []
    read = SubjectStore.voxel_responses

    def counted(self, voxels):
        asked.append(len(voxels))
        return read(self, voxels)

    monkeypatch.setattr(SubjectStore, "voxel_responses", counted)
    monkeypatch.setattr(SubjectStore, "responses", None)  # all voxels at once
    monkeypatch.setattr(export, "BLOCK_BYTES", n_at_a_time * 4 * subject.n_trials)
    for name, values in expected.items():
        export_map(volumetric, 1, name, tmp_path / f"{name}.npy")
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), values, rtol=1e-6, err_msg=name)
    assert max(asked) == n_at_a_time
    assert sum(asked) == len(expected) * N_VOXELS


def test_labels_go_out_with_their_names_and_come_back(volumetric, tmp_path, corner):
    out = tmp_path / "areas.nii.gz"
    assert export_map(volumetric, 1, "roi:areas", out) == [out, tmp_path / "areas.tsv"]
    found = read_labels(out, corner)
    np.testing.assert_array_equal(found.labels, [1, 1, 0, 2, 0])
    assert found.names == {1: "V1", 2: "V2"}


def test_parcels_go_out_numbered_from_one(volumetric, tmp_path, corner):
    export_map(volumetric, 1, "parcels:sequential:2", tmp_path / "parcels.nii.gz")
    found = read_labels(tmp_path / "parcels.nii.gz", corner)
    np.testing.assert_array_equal(found.labels, [1, 1, 1, 2, 2])
    assert found.names == {1: "sequential-1", 2: "sequential-2"}
    export_map(volumetric, 1, "parcels:functional:2", tmp_path / "functional.npy")
    assert set(np.load(tmp_path / "functional.npy")) == {1, 2}


def test_a_surface_goes_to_one_file_per_hemisphere(superficial, tmp_path):
    paths = export_map(superficial, 1, "mean", tmp_path / "mean.gii")
    left = nibabel.load(paths[0]).agg_data()
    np.testing.assert_allclose(left[[3, 1]], superficial.subject(1).responses().mean(0)[[0, 2]], rtol=1e-5)
    assert np.isnan(left[[0, 2, 4, 5]]).all()


def test_published_maps_are_among_the_maps(tmp_path, make_subject):
    store = PooledStore.create(tmp_path / "published.zarr", name="x")
    given = make_subject("subj01", [0, 1]).source(["a", "b"])
    voxels = VoxelTable(n_voxels=5, reliability={"ncsnr": np.arange(5, dtype=np.float32)})
    store.write_subject(replace(given, voxels=voxels))
    assert "published:ncsnr" in map_names(store.subject(1))
    export_map(store, 1, "published:ncsnr", tmp_path / "map.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy"), np.arange(5))


def test_an_unknown_map_is_answered_with_what_there_is(volumetric, tmp_path):
    for name in ("nsr", "roi:streams", "published:ncsnr"):
        with pytest.raises(ValueError, match=f"subj01 has no map '{name}'; it has mean, sd, ncsnr, .*, roi:areas"):
            export_map(volumetric, 1, name, tmp_path / "map.npy")
    assert not (tmp_path / "map.npy").exists()


def test_a_file_that_is_there_is_kept_unless_told_otherwise(volumetric, tmp_path):
    out = tmp_path / "mean.npy"
    out.write_text("precious")
    with pytest.raises(ValueError, match=r"mean\.npy exists already"):
        export_map(volumetric, 1, "mean", out)
    assert out.read_text() == "precious"
    export_map(volumetric, 1, "mean", out, overwrite=True)
    assert np.load(out).shape == (N_VOXELS,)


def test_a_format_that_does_not_suit_the_voxels_is_refused(volumetric, superficial, tmp_path, store):
    for asked, name, message in (
        (volumetric, "map.gii", "lie in a volume, which GIFTI doesn't hold; name a .nii.gz"),
        (superficial, "map.nii.gz", r"lie on a surface \(fsaverage-tiny\), which NIfTI doesn't hold; name a .gii"),
        (store, "map.nii", "have no place in a volume or on a surface; write .*map.npy"),
        (volumetric, "map.mat", "must end with one of .nii, .nii.gz, .gii, .npy"),
        (volumetric, "nowhere/map.npy", "nowhere is not a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            export_map(asked, "subj01", "mean", tmp_path / name)


def test_without_repeats_there_is_no_map_of_noise(tmp_path, make_block, corner):
    plain = make_store(
        tmp_path / "once.zarr",
        make_block,
        corner,
        image=np.arange(40, dtype=np.int32),
        session=None,
        responses=np.random.default_rng(0).normal(size=(40, N_VOXELS)),
    )
    with pytest.raises(ValueError, match="saw no image twice, so its noise can't be told"):
        export_map(plain, 1, "ncsnr", tmp_path / "map.npy")
    averaged = make_store(
        tmp_path / "mean.zarr",
        make_block,
        corner,
        upstream_preprocessing="averaged",
        n_averaged=np.full(120, 3, np.float32),
    )
    with pytest.raises(ValueError, match="came averaged over repeats"):
        export_map(averaged, 1, "split-half", tmp_path / "map.npy")
