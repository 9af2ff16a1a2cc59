"""The NSD importer: every voxel, trial, picture and label is that of the files, whatever part of them is asked for."""

import gzip
import shutil
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat

from data.importers import betas as betas_module
from data.importers import gzipped_volumes
from data.importers.findings import Findings
from data.importers.nsd import plan_nsd
from data.importers.nsd_design import N_IMAGES, read_design, read_stim_info, runs_by_rule
from data.importers.nsd_voxels import read_ctab
from data.importers.plan import ImportPlan, SessionChoice
from data.sources import SubjectSource
from data.store import PooledStore
from data.voxels import Surface, Volume
from tests.nsd_tree import (
    AFFINE,
    FAMILIES,
    PRF,
    STREAMS,
    DesignTruth,
    betas_directory,
    experiment,
    make_design,
    real_sized_design,
    roi_directory,
    write_expdesign,
    write_hdf5_betas,
    write_nifti,
    write_pictures,
    write_stim_info,
    write_surface_subject,
    write_tree,
)

ALL = SessionChoice()


def plan(root: Path, subjects: tuple[str, ...] | None = ("1",), sessions: SessionChoice = ALL, **options) -> ImportPlan:
    return plan_nsd(root, subjects=subjects, sessions=sessions, **options)


def subject_of(root: Path, sessions: SessionChoice = ALL, *, subject: str = "1", **options) -> SubjectSource:
    found = plan(root, (subject,), sessions, **options)
    assert found.problems == []
    return found.subjects[0]


def responses_of(subject: SubjectSource, session: int = 1) -> np.ndarray:
    return np.concatenate(list(next(s for s in subject.sessions if s.session == session).read()))


@pytest.fixture(scope="module")
def design() -> DesignTruth:
    return make_design()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Three sessions of subj01 and two of subj04, as nii.gz and hdf5. Nothing here is ever changed."""
    root = tmp_path_factory.mktemp("nsd")
    write_tree(root, {"subj01": (1, 2, 3), "subj04": (1, 2)})
    return root


@pytest.fixture
def small(tmp_path) -> Path:
    """Two sessions of subj01 in nii.gz, for a test to change."""
    write_tree(tmp_path / "nsd", {"subj01": (1, 2)}, kinds=["nii.gz"], csv=False)
    return tmp_path / "nsd"


@pytest.fixture(scope="module")
def surface(tmp_path_factory, design) -> Path:
    """Three sessions of subj02 on fsaverage, the second without data in the left vertex 3."""
    root = tmp_path_factory.mktemp("fsaverage")
    write_expdesign(root, design)
    write_pictures(root)
    write_surface_subject(root, design, "subj02", (1, 2, 3))
    return root


# -- responses and voxels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_type", ["nii.gz", "hdf5"])
def test_a_voxel_has_the_values_that_the_nifti_has_at_its_position(tree, tmp_path, file_type):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.write_subject(subject_of(tree, file_type=file_type))
    subject = store.subject(1)
    coordinates = subject.coordinates
    assert coordinates is not None
    for session in (1, 2, 3):
        image = nib.load(betas_directory(tree, "subj01") / f"betas_session{session:02d}.nii.gz")
        position = np.linalg.inv(image.affine) @ np.c_[coordinates, np.ones(len(coordinates))].T
        x, y, z = np.rint(position[:3]).astype(int)
        np.testing.assert_allclose(position[:3], [x, y, z], atol=1e-4)
        expected = np.asarray(image.dataobj)[x, y, z].T
        found = subject.responses(subject.session == session)
        np.testing.assert_allclose(found, expected / 300, rtol=1e-6)
    assert subject.attrs["unit"] == "percent signal change"


def test_voxels_are_where_nsdgeneral_is_above_zero_in_c_order(tree):
    place = subject_of(tree).voxels.place
    values = np.asarray(nib.load(roi_directory(tree, "subj01") / "nsdgeneral.nii.gz").dataobj)
    assert set(np.unique(values)) == {-1, 0, 1}
    assert isinstance(place, Volume)
    np.testing.assert_array_equal(place.index, np.argwhere(values == 1))
    np.testing.assert_allclose(place.affine, AFFINE, atol=1e-5)
    assert place.shape == values.shape


def test_another_mask_or_the_brain_mask_can_be_asked_for(tree):
    streams = np.asarray(nib.load(roi_directory(tree, "subj01") / "streams.nii.gz").dataobj)
    brain = np.asarray(nib.load(roi_directory(tree, "subj01").parent / "brainmask.nii.gz").dataobj)
    for mask, values in (("streams", streams), ("all", brain)):
        place = subject_of(tree, mask=mask).voxels.place
        assert isinstance(place, Volume)
        np.testing.assert_array_equal(place.index, np.argwhere(values > 0))


def test_hdf5_and_nifti_give_the_same_digest_of_content(tree, tmp_path):
    digests = []
    for file_type in ("nii.gz", "hdf5", "auto"):
        store = PooledStore.create(tmp_path / f"{file_type}.zarr", name="s")
        store.write_subject(subject_of(tree, file_type=file_type))
        digests.append(store.subject(1).digest)
    assert digests[0] == digests[1] == digests[2]


def test_auto_takes_a_sessions_hdf5_and_otherwise_its_nifti(small, design):
    directory = betas_directory(small, "subj01")
    data = np.asarray(nib.load(directory / "betas_session02.nii.gz").dataobj)
    write_hdf5_betas(directory / "betas_session02.hdf5", data)
    files = [session.files for session in subject_of(small).sessions]
    assert files == [(directory / "betas_session01.nii.gz",), (directory / "betas_session02.hdf5",)]


def test_a_scale_in_the_header_leaves_the_integers_as_they_are(small):
    path = betas_directory(small, "subj01") / "betas_session01.nii.gz"
    before = responses_of(subject_of(small))
    raw = np.asarray(nib.load(path).dataobj)
    write_nifti(path, raw, slope=1 / 300)
    assert np.asarray(nib.load(path).dataobj).dtype.kind == "f"  # nibabel does apply it
    np.testing.assert_array_equal(responses_of(subject_of(small)), before)
    assert not any("slope" in line for line in plan(small).warnings)
    write_nifti(path, raw, slope=0.5)
    np.testing.assert_array_equal(responses_of(subject_of(small)), before)
    assert any("slope 0.5" in line and str(path) in line for line in plan(small).warnings)


def test_big_endian_files_give_the_same_responses(small):
    path = betas_directory(small, "subj01") / "betas_session01.nii.gz"
    before = responses_of(subject_of(small))
    image = nib.load(path)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, header), path)
    assert nib.load(path).header.endianness == ">"
    np.testing.assert_array_equal(responses_of(subject_of(small)), before)


def test_a_nifti_is_decompressed_once_from_front_to_back_in_blocks(tree, monkeypatch):
    whole = responses_of(subject_of(tree, file_type="nii.gz"))
    session = subject_of(tree, file_type="nii.gz").sessions[0]
    volume, opened = 5 * 7 * 6 * 2, []

    class Watched(gzip.GzipFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append([])

        def read(self, size: int | None = -1) -> bytes:
            opened[-1].append((self.tell(), size))
            return super().read(size)

    monkeypatch.setattr(betas_module, "BLOCK_BYTES", 5 * volume)
    monkeypatch.setattr(gzipped_volumes, "BLOCK_BYTES", 5 * volume)
    monkeypatch.setattr(gzip, "open", Watched)
    blocks = list(session.read())
    assert [len(block) for block in blocks] == [5, 5, 5, 3]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    (reads,) = opened
    starts = [352, 352 + 5 * volume, 352 + 10 * volume, 352 + 15 * volume]
    assert reads == [(0, 352), *zip(starts, [5 * volume] * 3 + [3 * volume], strict=True), (352 + 18 * volume, 1)]


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_and_their_names_are_those_of_volume_and_ctab(tree):
    voxels = subject_of(tree).voxels
    assert isinstance(voxels.place, Volume)
    assert set(voxels.rois) == set(FAMILIES)  # nsdgeneral is the mask, and the files of one hemisphere are no families
    for family, names in FAMILIES.items():
        raw = np.asarray(nib.load(roi_directory(tree, "subj01") / f"{family}.nii.gz").dataobj)[
            tuple(voxels.place.index.T)
        ]
        assert raw.min() == -1
        for k, name in enumerate(names, start=1):
            np.testing.assert_array_equal(voxels.rois[family].mask(name), raw == k)
        np.testing.assert_array_equal(voxels.rois[family].labels == 0, raw <= 0)


def test_without_a_ctab_labels_have_known_names_or_numbers_and_a_warning(small):
    labels = small / "nsddata" / "freesurfer" / "subj01" / "label"
    (labels / "prf-visualrois.mgz.ctab").unlink()
    (labels / "floc-faces.mgz.ctab").unlink()
    rois = subject_of(small).voxels.rois
    assert rois["prf-visualrois"].names == dict(enumerate(PRF, start=1))
    assert rois["floc-faces"].names == {1: "label-1", 2: "label-2"}
    assert rois["streams"].names == dict(enumerate(STREAMS, start=1))
    warnings = plan(small).warnings
    for family in ("prf-visualrois", "floc-faces"):
        assert sum(f"{family}.mgz.ctab does not exist" in line for line in warnings) == 1


def test_a_ctab_is_read_with_tabs_colours_and_blank_lines(tmp_path):
    path = tmp_path / "x.ctab"
    path.write_text("-1 none\n0 Unknown\n\n1 V1v\t\n 12  hV4 255 0 0 0\n")
    assert read_ctab(path) == {1: "V1v", 12: "hV4"}


def test_the_published_ncsnr_comes_along(tree):
    voxels = subject_of(tree).voxels
    assert isinstance(voxels.place, Volume)
    raw = np.asarray(nib.load(betas_directory(tree, "subj01") / "ncsnr.nii.gz").dataobj)
    np.testing.assert_array_equal(voxels.reliability["ncsnr"], raw[tuple(voxels.place.index.T)])


# -- trials and images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["mat", "csv"])
def test_each_trial_shows_the_image_that_the_design_file_says(tree, tmp_path, file):
    """Subject 4, against an independent reading of nsd_expdesign.mat by the formula of the manual."""
    found = loadmat(experiment(tree) / "nsd_expdesign.mat")
    root = tree
    if file == "csv":
        root = tmp_path / "csv"
        write_stim_info(root, make_design())
        for name in ("nsddata_betas", "nsddata_stimuli", "nsddata/ppdata", "nsddata/freesurfer"):
            (root / name).symlink_to(tree / name)
    subject = subject_of(root, subject="4")
    earlier: dict[int, int] = {}
    for session in subject.sessions:
        assert session.session is not None
        for t in range(18):
            trial = (session.session - 1) * 18 + t
            image = int(found["subjectim"][3, int(found["masterordering"][0, trial]) - 1]) - 1
            assert subject.images.ids[session.columns["image"][t]] == f"nsd-{image:05d}"
            assert session.columns["repeat"][t] == earlier.get(image, 0)
            earlier[image] = earlier.get(image, 0) + 1
    assert max(earlier.values()) > 1


def test_runs_and_times_come_from_the_behaviour(tree):
    for session in subject_of(tree).sessions:
        run = session.columns["run"]
        np.testing.assert_array_equal(run, np.repeat(np.arange(1, 13), [2, 1] * 6))
        np.testing.assert_allclose(session.columns["time_s"], 4 * np.arange(18) + 60 * (run - 1), atol=1e-3)


def test_without_behaviour_runs_follow_the_rule_and_times_are_left_out(small):
    (small / "nsddata" / "ppdata" / "subj01" / "behav" / "responses.tsv").unlink()
    columns = subject_of(small).sessions[0].columns
    np.testing.assert_array_equal(columns["run"], np.repeat(np.arange(1, 13), [2, 1] * 6))
    assert "time_s" not in columns
    assert any("responses.tsv does not exist" in line for line in plan(small).warnings)


def test_the_rule_gives_63_and_62_trials_in_turn():
    np.testing.assert_array_equal(np.bincount(runs_by_rule(750))[1:], [63, 62] * 6)


def test_times_that_are_no_dates_are_left_out_of_all_sessions(small):
    path = small / "nsddata" / "ppdata" / "subj01" / "behav" / "responses.tsv"
    table = pd.read_csv(path, sep="\t")
    table.loc[len(table) - 1, "TIME"] = (
        np.nan
    )  # in a session that isn't imported: the columns don't depend on the choice
    table.to_csv(path, sep="\t", index=False)
    assert "time_s" not in subject_of(small, SessionChoice(n=1)).sessions[0].columns
    assert any("TIME is not a MATLAB date" in line for line in plan(small).warnings)


def test_pictures_are_those_of_the_ids_whatever_is_asked_for(tree):
    images = subject_of(tree).images
    with h5py.File(tree / "nsddata_stimuli" / "stimuli" / "nsd" / "nsd_stimuli.hdf5") as file:
        bricks = np.asarray(file["imgBrick"])
    assert images.shape == (5, 7)
    assert images.read is not None
    for rows in (np.arange(len(images.ids)), np.array([7, 2, 3])):
        expected = [bricks[int(images.ids[row].removeprefix("nsd-"))] for row in rows]
        np.testing.assert_array_equal(images.read(rows), expected)


def test_without_pixels_the_pictures_may_be_missing(small):
    (small / "nsddata_stimuli" / "stimuli" / "nsd" / "nsd_stimuli.hdf5").unlink()
    images = subject_of(small, pixels=False).images
    assert (images.shape, images.read) == (None, None)
    (problem,) = plan(small).problems
    assert "nsd_stimuli.hdf5 does not exist" in problem
    assert "--no-pixels" in problem


def test_of_the_shared_images_those_seen_three_times_by_all_test(tree, design):
    roles: dict[str, str] = {}
    for subject in plan(tree, None).subjects:
        roles |= dict(zip(subject.images.ids, subject.images.roles, strict=True))
    assert set(roles.values()) == {"train", "validation", "test"}
    for identity, role in roles.items():
        image = int(identity.removeprefix("nsd-"))
        expected = "test" if image in design.tested else "validation" if image in design.validated else "train"
        assert role == expected, identity


def test_a_design_with_nsds_published_totals_has_515_test_images_and_485_for_validation(tmp_path):
    truth = real_sized_design()
    write_expdesign(tmp_path, truth)
    findings = Findings()
    found = read_design(tmp_path, findings)
    assert findings.problems == []
    assert found is not None
    assert found.trials_per_session == 750
    roles = np.array(found.roles(range(N_IMAGES)))
    assert set(np.flatnonzero(roles == "test")) == truth.tested
    assert set(np.flatnonzero(roles == "validation")) == truth.validated
    assert (len(truth.tested), len(truth.validated)) == (515, 485)
    np.testing.assert_array_equal(found.image, truth.of_trial)


def test_the_csv_leaves_open_what_was_not_done(tmp_path, design):
    """A table that lists only the trials of sessions that a subject did agrees with the design."""
    path = write_stim_info(tmp_path, design)
    done = 30 * design.trials_per_session
    columns = [f"subject4_rep{r}" for r in range(3)]
    table = pd.read_csv(path)
    table.assign(**{c: table[c].where(table[c] <= done, 0) for c in columns}).to_csv(path, index=False)
    found = read_stim_info(path)
    np.testing.assert_array_equal(found.image[3, :done], design.of_trial[3, :done])
    assert (found.image[3, done:] == -1).all()
    write_expdesign(tmp_path, design)
    findings = Findings()
    assert read_design(tmp_path, findings) is not None
    assert findings.problems == []


# -- subjects and sessions ---------------------------------------------------------------------------------------------


def test_subjects_are_named_or_numbered_and_by_default_all_that_are_there(tree):
    for given in (None, ("1", "4"), ("subj01", "subj04"), ("1", "subj01", "4")):
        assert [subject.name for subject in plan(tree, given).subjects] == ["subj01", "subj04"]


def test_any_sessions_can_be_chosen_and_keep_their_numbers_images_and_repeats(tree):
    everything = subject_of(tree)
    for choice, numbers in ((SessionChoice(n=2), [1, 2]), (SessionChoice(numbered=(3, 1)), [1, 3])):
        some = subject_of(tree, choice)
        assert [session.session for session in some.sessions] == numbers
        for session in some.sessions:
            assert session.session is not None
            whole = everything.sessions[session.session - 1]
            np.testing.assert_array_equal(session.columns["repeat"], whole.columns["repeat"])
            shown = [some.images.ids[row] for row in session.columns["image"]]
            assert shown == [everything.images.ids[row] for row in whole.columns["image"]]
        assert set(some.images.ids) == {some.images.ids[row] for s in some.sessions for row in s.columns["image"]}


def test_sessions_that_come_later_are_appended_and_give_the_digest_of_one_import(tree, tmp_path):
    once = PooledStore.create(tmp_path / "once.zarr", name="once")
    once.write_subject(subject_of(tree))
    twice = PooledStore.create(tmp_path / "twice.zarr", name="twice")
    assert len(twice.write_subject(subject_of(tree, SessionChoice(n=2)))) == 2
    assert [session.session for session in twice.write_subject(subject_of(tree))] == [3]
    assert twice.write_subject(subject_of(tree)) == []
    assert twice.subject(1).digest == once.subject(1).digest
    assert sorted(twice.image_ids()) == sorted(once.image_ids())
    assert twice.subject(1).provenance["importer"] == "nsd 1"


def test_a_session_of_other_betas_is_not_appended(small, tmp_path):
    directory = betas_directory(small, "subj01")
    shutil.copytree(directory, directory.with_name("betas_fithrf"))
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.write_subject(subject_of(small, SessionChoice(n=1)))
    other = subject_of(small, SessionChoice(numbered=(2,)), betas="betas_fithrf")
    with pytest.raises(ValueError, match=r"'subj01' is in .* already with other") as caught:
        store.write_subject(other)
    assert "betas_fithrf and betas_fithrf_GLMdenoise_RR" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.write_subject(subject_of(small))[0].session == 2


def test_a_copy_with_fewer_sessions_than_the_subject_did_is_told_of(tree):
    found = plan(tree)
    assert any("has 3 of the 40 sessions that subj01 did" in line for line in found.warnings)
    assert not any("sessions that subj01 did" in line for line in plan(tree, sessions=SessionChoice(n=2)).warnings)


# -- fsaverage ---------------------------------------------------------------------------------------------------------


def test_on_fsaverage_the_voxels_are_the_left_then_the_right_vertices_of_the_mask(surface):
    subject = subject_of(surface, subject="2", space="fsaverage")
    place = subject.voxels.place
    assert isinstance(place, Surface)
    assert (subject.scale, subject.dtype, place.n_vertices) == (1.0, np.float32, (11, 9))
    # In the mask are 2, 3, 5, 7, 8 (and 11); in session 2 the left vertex 3 is NaN, so it is left out of all.
    np.testing.assert_array_equal(place.vertex, [2, 5, 7, 8, 2, 3, 5, 7, 8])
    np.testing.assert_array_equal(place.hemisphere, [0] * 4 + [1] * 5)
    for session in (1, 2, 3):
        directory = betas_directory(surface, "subj02", "fsaverage")
        raw = [(directory / f"{side}.betas_session{session:02d}.mgh").read_bytes() for side in ("lh", "rh")]
        halves = [np.asarray(nib.MGHImage.from_bytes(half).dataobj) for half in raw]
        expected = np.stack([halves[h][v, 0, 0] for h, v in zip(place.hemisphere, place.vertex, strict=True)])
        np.testing.assert_array_equal(responses_of(subject, session), expected.T)
    np.testing.assert_array_equal(subject.voxels.rois["streams"].labels, place.vertex % 8)
    assert subject.voxels.rois["streams"].names[7] == "parietal"
    assert subject.voxels.reliability["ncsnr"].shape == (9,)
    (told,) = [line for line in plan(surface, ("2",), space="fsaverage").warnings if "not finite" in line]
    assert "1 of 10 vertices are not finite" in told
    assert "fetched later and miss others can't be appended" in told


def test_on_fsaverage_the_vertices_do_not_depend_on_the_sessions_that_are_chosen(surface):
    first = subject_of(surface, SessionChoice(n=1), subject="2", space="fsaverage")
    every = subject_of(surface, subject="2", space="fsaverage")
    assert first.voxels.digest() == every.voxels.digest()


def test_on_fsaverage_every_vertex_can_be_asked_for(surface):
    subject = subject_of(surface, subject="2", space="fsaverage", mask="all")
    assert subject.voxels.n_voxels == 19
    assert responses_of(subject, 3).shape == (18, 19)


def test_a_surface_subject_goes_into_a_store(surface, tmp_path):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    subject = subject_of(surface, subject="2", space="fsaverage", pixels=False)
    store.write_subject(subject)
    np.testing.assert_array_equal(store.subject(2).responses(np.arange(18)), responses_of(subject))
