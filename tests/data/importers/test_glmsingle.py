"""The GLMsingle importer: each value where the affine and the trial table say."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

import data.importers.glmsingle_betas as betas_module
from data.importers import gzipped_volumes
from data.importers.glmsingle_betas import open_betas
from data.importers.plan import SessionChoice
from data.schema import pixel_identity
from data.voxels import Volume
from tests.data.importers.glmsingle_plans import (
    ALL,
    LAYOUTS,
    TRUTH,
    all_tables,
    edit,
    imported,
    plan,
    the_problem,
    with_ids,
    write,
    written,
)
from tests.glmsingle_tree import (
    AFFINE,
    GRID,
    TYPED,
    events,
    picture,
    picture_name,
    save_betas,
    save_nifti,
    save_table,
    scan,
    write_glmsingle,
    write_laion,
    write_pictures,
)


@pytest.fixture
def source(tmp_path) -> Path:
    return write_glmsingle(tmp_path / "source", [TRUTH])


# -- what comes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1000, 1 << 28])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_beta_is_where_the_affine_says_and_every_trial_shows_its_picture(
    tmp_path, layout, block_bytes, monkeypatch
):
    monkeypatch.setattr(betas_module, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(gzipped_volumes, "BLOCK_BYTES", block_bytes)
    store = imported(write(layout, tmp_path / "source"))
    subject = store.subject("sub-01")
    responses, place = subject.responses(), subject.voxels.place
    assert isinstance(place, Volume)
    np.testing.assert_allclose(place.affine, AFFINE, atol=1e-6)  # NIfTI keeps it in single precision
    for voxel, mm in enumerate(place.coordinates()):
        i, j, k = np.rint(np.linalg.inv(AFFINE) @ [*mm, 1])[:3].astype(int)
        np.testing.assert_array_equal(responses[:, voxel], TRUTH.betas[i, j, k])
    assert len(place.index) == TRUTH.mask.sum()
    ids = store.image_ids()
    assert [ids[row] for row in subject.image] == [pixel_identity(picture(k)) for k in TRUTH.picture]
    np.testing.assert_array_equal(subject.session, TRUTH.session)
    np.testing.assert_array_equal(subject.trial_column("run"), TRUTH.run)
    assert subject.attrs["unit"] == "percent signal change"
    (pixels,) = [pixels for _, _, pixels in store.pixels()]
    assert {pixel_identity(p) for p in pixels} == {pixel_identity(picture(k)) for k in TRUTH.picture}


def test_the_same_scans_have_one_digest_whatever_file_they_come_in(tmp_path):
    layouts = [layout for layout in LAYOUTS if layout != "laion"]
    digests = {imported(write(k, tmp_path / k), f"{k}.zarr").subject("sub-01").digest for k in layouts}
    assert len(digests) == 1


def test_repeats_count_an_images_earlier_trials(source):
    repeat = imported(source).subject("sub-01").trial_column("repeat")
    assert repeat.tolist() == [TRUTH.picture[:t].tolist().count(k) for t, k in enumerate(TRUTH.picture)]


def test_several_subjects_share_their_images(tmp_path):
    truths = [TRUTH, scan("sub-07", n_sessions=3, seed=1)]
    store = imported(write_glmsingle(tmp_path / "source", truths))
    assert store.subjects == ["sub-01", "sub-07"]
    assert store.n_images == len({*truths[0].picture, *truths[1].picture})
    np.testing.assert_array_equal(store.subject("sub-07").responses(), truths[1].responses)


def test_subjects_are_chosen_by_name_or_number(tmp_path):
    source = write_glmsingle(tmp_path / "source", [TRUTH, scan("sub-07", seed=1)])
    for asked in ("sub-07", "7"):
        assert [subject.name for subject in plan(source, subjects=(asked,)).subjects] == ["sub-07"]
    assert "subject '3' is not in" in the_problem(source, subjects=("3",))


def test_the_source_may_be_one_subjects_directory(source):
    store = imported(source / "sub-01", images=source / "stimuli")
    np.testing.assert_array_equal(store.subject("sub-01").responses(), TRUTH.responses)


def test_rows_without_a_picture_are_passed_over_and_counted(source):
    (line,) = [line for line in plan(source).warnings if "show no picture" in line]
    assert f"{2 * len(all_tables(source))} rows of sub-01's tables show no picture" in line


def test_one_table_of_all_trials_will_do(source):
    for path in all_tables(source):
        path.unlink()
    table = events(TRUTH, np.arange(len(TRUTH.session)), session=TRUTH.session, run=TRUTH.run)
    save_table(source / "sub-01" / "events.tsv", table)
    np.testing.assert_array_equal(imported(source).subject("sub-01").session, TRUTH.session)


def test_tables_may_lie_elsewhere(source):
    elsewhere = source.parent / "bids" / "sub-01"
    for path in all_tables(source):
        elsewhere.mkdir(parents=True, exist_ok=True)
        shutil.move(path, elsewhere / path.name)
    assert "has no trials.tsv or events.tsv" in the_problem(source)
    store = imported(source, trials=source.parent / "bids")
    np.testing.assert_array_equal(store.subject("sub-01").session, TRUTH.session)


# -- images ------------------------------------------------------------------------------------------------------------


def test_two_names_of_one_picture_are_one_image(source):
    """Trials of one picture in the first table show a copy of it under another name."""
    shown = picture_name(int(TRUTH.picture[0]))
    shutil.copy(source / "stimuli" / shown, source / "stimuli" / "copy.png")
    edit(all_tables(source)[0], lambda table: table.replace({"stim_file": {shown: "copy.png"}}))
    store = imported(source)
    ids = store.image_ids()
    assert [ids[row] for row in store.subject("sub-01").image] == [pixel_identity(picture(k)) for k in TRUTH.picture]


def test_repeats_of_a_picture_with_two_names_do_not_depend_on_the_sessions_chosen(source):
    """Session 1 shows one picture under a name that session 2 doesn't use."""
    shown = picture_name(int(TRUTH.picture[TRUTH.session == 2][0]))
    shutil.copy(source / "stimuli" / shown, source / "stimuli" / "copy.png")
    for path in all_tables(source)[:2]:
        edit(path, lambda table: table.assign(stim_file=["n/a" if s == "n/a" else "copy.png" for s in table.stim_file]))
    (whole,) = plan(source).subjects
    (second,) = plan(source, sessions=SessionChoice(numbered=(2,))).subjects
    np.testing.assert_array_equal(second.sessions[0].columns["repeat"], whole.sessions[1].columns["repeat"])
    assert second.sessions[0].columns["repeat"][0] == (TRUTH.session == 1).sum()


def test_the_data_sets_own_id_is_the_identity_with_pictures_and_without(source):
    with_ids(source)
    expected = [f"lab-{k:02d}" for k in TRUTH.picture]
    shutil.copytree(source, source.parent / "bare" / "source")
    shutil.rmtree(source.parent / "bare" / "source" / "stimuli")
    seen = imported(source)
    bare = imported(source.parent / "bare" / "source", pixels=False)
    for store in (seen, bare):
        ids = store.image_ids()
        assert [ids[row] for row in store.subject("sub-01").image] == expected
    assert seen.subject("sub-01").digest == bare.subject("sub-01").digest
    (pixels,) = [pixels for _, _, pixels in seen.pixels()]
    for identity, found in zip(seen.image_ids(), pixels, strict=True):
        np.testing.assert_array_equal(found, picture(int(identity[4:])))


def test_without_pictures_a_name_is_no_identity(source):
    assert "has no column image_id, and a file's name is no identity" in the_problem(source, pixels=False)


def test_a_prescribed_split_comes_as_roles(source):
    part = ["train", "validation", "test", "n/a"]
    for path in all_tables(source):
        edit(
            path,
            lambda table: table.assign(split=[part[int(s[5:7]) % 4] if s != "n/a" else s for s in table.stim_file]),
        )
    store = imported(source)
    number = {pixel_identity(picture(k)): k for k in range(12)}
    for identity, role in zip(store.image_ids(), store.image_roles(), strict=True):
        assert role == part[number[identity] % 4].replace("n/a", "")


# -- sessions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sessions_that_come_later_make_the_same_subject(tmp_path, layout):
    source = write(layout, tmp_path / "source", [scan("sub-01", n_sessions=3)])
    at_once = imported(source, "once.zarr").subject("sub-01")
    for choice in (SessionChoice(numbered=(2,)), SessionChoice(n=1), ALL):
        store = imported(source, "slowly.zarr", sessions=choice)
    assert store.subject("sub-01").digest == at_once.digest
    np.testing.assert_array_equal(store.subject("sub-01").responses(), at_once.responses())


def test_only_images_of_the_chosen_sessions_come(source):
    store = imported(source, sessions=SessionChoice(n=1))
    assert store.subject("sub-01").n_trials == (TRUTH.session == 1).sum()
    assert store.n_images == len(set(TRUTH.picture[TRUTH.session == 1]))


def test_without_a_session_index_there_is_nothing_to_choose(source):
    for path in all_tables(source):
        path.unlink()
    save_table(source / "sub-01" / "trials.tsv", pd.DataFrame({"label": [picture_name(k) for k in TRUTH.picture]}))
    store = imported(source)
    assert store.subject("sub-01").session is None
    np.testing.assert_array_equal(store.subject("sub-01").responses(), TRUTH.responses)
    assert "has no column session, so sessions can't be chosen" in the_problem(source, sessions=SessionChoice(n=1))


def test_trials_whose_session_has_no_betas_are_passed_over_with_a_warning(tmp_path):
    source = write_laion(tmp_path / "source", [TRUTH])
    next(source.rglob("*ses-02*SingletrialBetas_statmap.nii.gz")).unlink()
    found = plan(source)
    assert [session.session for session in found.subjects[0].sessions] == [1]
    assert any("no betas of session 2" in line for line in found.warnings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_measure_is_the_model_of_the_betas_whatever_file_they_are_in(tmp_path, layout):
    (subject,) = plan(write(layout, tmp_path / "source")).subjects
    assert subject.measure == ("SingletrialBetas" if layout == "laion" else TYPED)


# -- times -------------------------------------------------------------------------------------------------------------


def test_onsets_that_start_anew_with_each_run_tell_no_time_of_a_session(source):
    for choice in (ALL, SessionChoice(n=1)):
        assert all("time_s" not in s.columns for s in plan(source, sessions=choice).subjects[0].sessions)


def test_onsets_that_rise_throughout_a_session_become_seconds_from_its_first_trial(source):
    onset = TRUTH.onset + 100 * TRUTH.run + 7 * TRUTH.session
    for path in all_tables(source):
        path.unlink()
    table = pd.DataFrame(
        {
            "onset": onset,
            "session": TRUTH.session,
            "run": TRUTH.run,
            "stim_file": [picture_name(k) for k in TRUTH.picture],
        }
    )
    save_table(source / "sub-01" / "events.tsv", table)
    for session in plan(source).subjects[0].sessions:
        here = onset[TRUTH.session == session.session]
        np.testing.assert_allclose(session.columns["time_s"], here - here[0])


# -- voxels ------------------------------------------------------------------------------------------------------------


def spoilt(betas: np.ndarray, *at: tuple[int, int, int, int], value: float = np.nan) -> np.ndarray:
    betas = betas.copy()
    for place in at:
        betas[place] = value
    return betas


def test_voxels_that_are_not_finite_in_some_trial_are_left_out_and_counted(source):
    inside = np.argwhere(TRUTH.mask)
    bad = [(*inside[2], 23), (*inside[5], 0)]
    save_betas(source / "sub-01", spoilt(spoilt(TRUTH.betas, bad[0]), bad[1], value=np.inf), "hdf5")
    found = plan(source)
    assert any(f"sub-01: 2 of {len(inside)} voxels are not finite in some trial" in line for line in found.warnings)
    expected = np.delete(inside, [2, 5], axis=0)
    np.testing.assert_array_equal(found.subjects[0].voxels.place.index, expected)
    responses = written(found, source.parent / "store.zarr").subject("sub-01").responses()
    np.testing.assert_array_equal(responses, np.delete(TRUTH.responses, [2, 5], axis=1))


def test_a_session_that_is_not_imported_has_a_say_in_which_voxels_are(source):
    last = (*np.argwhere(TRUTH.mask)[0], 23)
    save_betas(source / "sub-01", spoilt(TRUTH.betas, last), "hdf5")
    found = plan(source, sessions=SessionChoice(n=1))
    assert found.subjects[0].voxels.n_voxels == TRUTH.mask.sum() - 1


@pytest.mark.parametrize("layout", ["hdf5", "npy", "laion"])
def test_without_a_mask_every_voxel_that_varies_is_taken(tmp_path, layout):
    source = write(layout, tmp_path / "source")
    for path in (*source.rglob("mask.nii.gz"), *source.rglob("*R2mean*")):
        path.unlink()
    found = plan(source)
    assert any("has no mask.nii.gz, so every voxel whose betas vary is taken" in line for line in found.warnings)
    subject = written(found, tmp_path / "store.zarr").subject("sub-01")
    np.testing.assert_array_equal(subject.responses(), TRUTH.responses)
    if layout == "laion":
        np.testing.assert_array_equal(subject.voxels.place.index, np.argwhere(TRUTH.mask))
    else:
        assert subject.voxels.place is None
        assert any("doesn't say where its voxels are" in line for line in found.warnings)


def test_a_mask_may_be_given(source):
    fewer = TRUTH.mask.copy()
    fewer[:2] = False
    path = save_nifti(source.parent / "visual.nii.gz", np.where(fewer, 1, -1).astype(np.int16))
    subject = imported(source, mask=path).subject("sub-01")
    np.testing.assert_array_equal(subject.voxels.place.index, np.argwhere(fewer))
    assert subject.provenance["mask"] == str(path)


@pytest.mark.parametrize("kind", ["hdf5", "npy"])
def test_betas_of_a_list_of_voxels_are_placed_by_their_mask(source, kind):
    """GLMsingle given (voxel, time) returns (voxel, 1, 1, trial)."""
    (source / "sub-01" / f"{TYPED}.hdf5").unlink()
    save_betas(source / "sub-01", TRUTH.betas[TRUTH.mask][:, None, None, :], kind)
    subject = imported(source).subject("sub-01")
    np.testing.assert_array_equal(subject.responses(), TRUTH.responses)
    np.testing.assert_array_equal(subject.voxels.place.index, np.argwhere(TRUTH.mask))


def test_a_scaled_nifti_is_read_as_its_header_says(tmp_path):
    source = write_laion(tmp_path / "source", [scan("sub-01", n_sessions=1)])
    path = next(source.rglob("*SingletrialBetas_statmap.nii.gz"))
    image = nibabel.Nifti1Image(np.arange(np.prod(GRID) * 12, dtype=np.int16).reshape(*GRID, 12), AFFINE)
    image.header.set_slope_inter(0.25, -3)
    nibabel.save(image, path)
    expected = nibabel.load(path).get_fdata(dtype=np.float32)
    subject = imported(source).subject("sub-01")
    np.testing.assert_array_equal(subject.responses(), expected[tuple(subject.voxels.place.index.T)].T)
    assert len(np.unique(subject.responses())) > 100


def test_label_volumes_with_names_and_masks_of_rois_become_families(source):
    labels = np.random.default_rng(9).integers(0, 3, GRID).astype(np.int16)
    directory = source / "sub-01"
    save_nifti(directory / "sub-01_space-T1w_desc-streams_dseg.nii.gz", labels)
    (directory / "sub-01_space-T1w_desc-streams_dseg.tsv").write_text("index\tname\n1\tearly\n2\tventral\n")
    save_nifti(directory / "sub-01_space-T1w_desc-HRFindex_dseg.nii.gz", labels)
    roi = (labels == 2).astype(np.uint8)
    rois = source.parent / "rois" / "sub-01" / "face"
    save_nifti(rois / "sub-01_space-T1w_res-1pt8_label-FFA1_mask.nii.gz", roi)
    save_nifti(rois / "sub-01_space-T1w_res-1pt5_label-FFA1_mask.nii.gz", np.ones((9, 9, 9), np.uint8))
    found = plan(source)
    voxels = written(found, source.parent / "store.zarr").subject("sub-01").voxels
    assert {family: rois.names for family, rois in voxels.rois.items()} == {
        "streams": {1: "early", 2: "ventral"},
        "FFA1": {1: "FFA1"},
    }
    np.testing.assert_array_equal(voxels.rois["streams"].labels, labels[TRUTH.mask])
    np.testing.assert_array_equal(voxels.rois["FFA1"].labels, roi[TRUTH.mask])
    assert any("HRFindex_dseg.nii.gz has no .tsv of names" in line for line in found.warnings)
    assert any("res-1pt5_label-FFA1_mask.nii.gz has another grid" in line for line in found.warnings)


def test_a_pickled_file_says_how_much_memory_it_takes(tmp_path):
    source = write("npy", tmp_path / "source")
    assert any("can only be loaded whole, which takes 0.0 GB" in line for line in plan(source).warnings)


@pytest.fixture
def laion(tmp_path) -> Path:
    return write_laion(tmp_path / "source", [TRUTH])


def test_a_part_of_a_statmap_is_those_trials_of_the_whole(laion, monkeypatch):
    betas = open_betas(sorted(laion.rglob("*SingletrialBetas_statmap.nii.gz"))[0])
    voxels = np.array([3, 0, 17])
    expected = TRUTH.betas.reshape(-1, TRUTH.betas.shape[-1])[voxels].T
    for volumes in (1, 5, 100):
        monkeypatch.setattr(gzipped_volumes, "BLOCK_BYTES", volumes * int(np.prod(GRID)) * 4)
        np.testing.assert_array_equal(np.concatenate(list(betas.read(voxels, 4, 11))), expected[4:11])


def test_a_label_volume_is_resampled_with_a_warning(source):
    fine = np.kron(np.arange(60).reshape(GRID) % 3, np.ones((2, 2, 2), int)).astype(np.int16)
    affine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1.0])
    affine[:3, 3] += affine[:3, :3] @ [-0.5, -0.5, -0.5]
    save_nifti(source / "sub-01" / "atlas-fine_dseg.nii.gz", fine, affine)
    (source / "sub-01" / "atlas-fine_dseg.tsv").write_text("index\tname\n1\ta\n2\tb\n")
    found = plan(source)
    assert any("atlas-fine_dseg.nii.gz has another grid than the betas" in line for line in found.warnings)
    np.testing.assert_array_equal(
        found.subjects[0].voxels.rois["fine"].labels, (np.arange(60).reshape(GRID) % 3)[TRUTH.mask]
    )


def test_pictures_of_other_suffixes_are_found_by_name(source):
    shutil.rmtree(source / "stimuli")
    write_pictures(source / "images", ".bmp")
    for path in all_tables(source):
        edit(path, lambda table: table.assign(stim_file=[s.removesuffix(".png") for s in table.stim_file]))
    assert imported(source).n_images == len(set(TRUTH.picture))
