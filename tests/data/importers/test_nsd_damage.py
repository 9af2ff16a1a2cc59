"""Files of NSD that are missing, damaged or another data set's: each is one line that names it, all of them at once."""

import gzip
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat, savemat

from data.importers.betas import hdf5_trials, mgh_trials, nifti_trials, read_header
from data.importers.nsd import plan_nsd
from data.importers.nsd_design import read_expdesign
from data.importers.plan import ImportPlan, SessionChoice
from data.store import PooledStore
from tests.nsd_tree import (
    betas_directory,
    experiment,
    make_design,
    roi_directory,
    write_expdesign,
    write_hdf5_betas,
    write_mgh,
    write_nifti,
    write_pictures,
    write_stim_info,
    write_surface_subject,
    write_tree,
)

Damage = tuple[Callable[[Path], object], str, str]
"""What is done to a tree, the file that a problem then names, and what else it says."""


ALL = SessionChoice()


def plan(root: Path, subjects: tuple[str, ...] | None = ("1",), sessions: SessionChoice = ALL, **options) -> ImportPlan:
    return plan_nsd(root, subjects=subjects, sessions=sessions, **options)


@pytest.fixture
def small(tmp_path) -> Path:
    """Two sessions of subj01 in nii.gz, for a test to damage."""
    write_tree(tmp_path / "nsd", {"subj01": (1, 2)}, kinds=["nii.gz"], csv=False)
    return tmp_path / "nsd"


# -- ways to damage a tree ---------------------------------------------------------------------------------------------


def roi(root: Path, name: str = "nsdgeneral") -> Path:
    return roi_directory(root, "subj01") / f"{name}.nii.gz"


def session(root: Path, number: int = 1, suffix: str = "nii.gz") -> Path:
    return betas_directory(root, "subj01") / f"betas_session{number:02d}.{suffix}"


def behaviour(root: Path) -> Path:
    return root / "nsddata" / "ppdata" / "subj01" / "behav" / "responses.tsv"


def pictures(root: Path) -> Path:
    return root / "nsddata_stimuli" / "stimuli" / "nsd" / "nsd_stimuli.hdf5"


def mat(root: Path) -> Path:
    return experiment(root) / "nsd_expdesign.mat"


def cut(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def change_mat(root: Path, **changes: Callable[[np.ndarray], np.ndarray] | None) -> None:
    variables = {name: values for name, values in loadmat(mat(root)).items() if not name.startswith("__")}
    for name, change in changes.items():
        variables[name] = np.array([]) if change is None else change(variables[name])
    savemat(mat(root), variables)


def change_table(path: Path, separator: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(path, sep=separator)).to_csv(path, sep=separator, index=False)


def with_stim_info(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame], *, alone: bool = False) -> None:
    path = write_stim_info(root, make_design())
    change_table(path, ",", change)
    if alone:
        mat(root).unlink()


def volumes(n: int = 18, shape: tuple[int, int, int] = (5, 7, 6), dtype: type = np.int16) -> np.ndarray:
    return np.ones((*shape, n), dtype)


def with_hdf5(root: Path, name: str, data: np.ndarray) -> None:
    session(root).unlink()
    with h5py.File(session(root, suffix="hdf5"), "w") as file:
        file[name] = data


def first(values: np.ndarray, value: float) -> np.ndarray:
    changed = values.copy()
    changed[0, 0] = value
    return changed


BROKEN: dict[str, Damage] = {
    "no design": (lambda r: mat(r).unlink(), "nsd_expdesign.mat", "does not exist"),
    "design cut off": (lambda r: cut(mat(r)), "nsd_expdesign.mat", "damaged or no MATLAB 5 file"),
    "design is text": (lambda r: mat(r).write_text("hello"), "nsd_expdesign.mat", "damaged or no MATLAB 5 file"),
    "design is HDF5": (lambda r: h5py.File(mat(r), "w").close(), "nsd_expdesign.mat", "damaged or no MATLAB 5 file"),
    "no ordering": (lambda r: change_mat(r, masterordering=None), "nsd_expdesign.mat", "no variable 'masterordering'"),
    "ordering too short": (
        lambda r: change_mat(r, masterordering=lambda m: m[:, :-1]),
        "nsd_expdesign.mat",
        "has 719 trials",
    ),
    "ordering from 0": (
        lambda r: change_mat(r, masterordering=lambda m: m - 1),
        "nsd_expdesign.mat",
        "holds 0, outside 1 to 240",
    ),
    "73k id too high": (
        lambda r: change_mat(r, subjectim=lambda m: first(m, 73_001)),
        "nsd_expdesign.mat",
        "73001, outside 1 to 73000",
    ),
    "ids with fractions": (lambda r: change_mat(r, subjectim=lambda m: m + 0.5), "nsd_expdesign.mat", "whole numbers"),
    "seven subjects": (lambda r: change_mat(r, subjectim=lambda m: m[:7]), "nsd_expdesign.mat", "each of 8 subjects"),
    "other shared images": (
        lambda r: change_mat(r, sharedix=lambda m: m[:, ::-1]),
        "nsd_expdesign.mat",
        "'sharedix' are not the first",
    ),
    "csv of another design": (
        lambda r: with_stim_info(r, lambda t: t.assign(nsdId=t["nsdId"].to_numpy()[::-1])),
        "nsd_stim_info_merged.csv",
        "in trial 1 of subject 1",
    ),
    "csv shares others": (
        lambda r: with_stim_info(r, lambda t: t.assign(shared1000=~t["shared1000"])),
        "nsd_stim_info_merged.csv",
        "differ on which images are shared",
    ),
    "csv without a column": (
        lambda r: with_stim_info(r, lambda t: t.drop(columns="subject3_rep1"), alone=True),
        "nsd_stim_info_merged.csv",
        "no column 'subject3_rep1'",
    ),
    "csv with text": (
        lambda r: with_stim_info(r, lambda t: t.assign(nsdId="x"), alone=True),
        "nsd_stim_info_merged.csv",
        "'nsdId' must hold whole numbers",
    ),
    "csv leaves trials open": (
        lambda r: with_stim_info(r, lambda t: t.assign(subject2_rep0=0), alone=True),
        "nsd_stim_info_merged.csv",
        "no image for trial 1 of subject 2",
    ),
    "csv has two images in a trial": (
        lambda r: with_stim_info(r, lambda t: t.assign(subject2_rep0=t["subject2_rep1"]), alone=True),
        "nsd_stim_info_merged.csv",
        "a trial of 'subject2_rep1' has two images",
    ),
    "csv has an id twice": (
        lambda r: with_stim_info(r, lambda t: t.assign(nsdId=t["nsdId"].replace(5, 6)), alone=True),
        "nsd_stim_info_merged.csv",
        "occurs twice",
    ),
    "csv empty": (
        lambda r: (mat(r).unlink(), (experiment(r) / "nsd_stim_info_merged.csv").write_text("")),
        "nsd_stim_info_merged.csv",
        "not a readable table",
    ),
    "behaviour of another subject": (
        lambda r: change_table(behaviour(r), "\t", lambda t: t.assign(SUBJECT=2)),
        "responses.tsv",
        "of subject 2, not 1",
    ),
    "behaviour with other images": (
        lambda r: change_table(behaviour(r), "\t", lambda t: t.assign(**{"73KID": t["73KID"].to_numpy()[::-1]})),
        "responses.tsv",
        "trial 1 of session 1 has 73KID",
    ),
    "behaviour too short": (
        lambda r: change_table(behaviour(r), "\t", lambda t: t.iloc[:20]),
        "responses.tsv",
        "has 2 trials of session 2",
    ),
    "behaviour without runs": (
        lambda r: change_table(behaviour(r), "\t", lambda t: t.drop(columns="RUN")),
        "responses.tsv",
        "no column 'RUN'",
    ),
    "behaviour with run 13": (
        lambda r: change_table(behaviour(r), "\t", lambda t: t.assign(RUN=13)),
        "responses.tsv",
        "holds 13, outside 1 to 12",
    ),
    "behaviour is binary": (lambda r: behaviour(r).write_bytes(b"\xff\xfe\x00\x81"), "responses.tsv", "not a readable"),
    "no mask": (lambda r: roi(r).unlink(), "nsdgeneral.nii.gz", "does not exist"),
    "mask of nothing": (
        lambda r: write_nifti(roi(r), -np.ones((5, 7, 6), np.int16)),
        "nsdgeneral.nii.gz",
        "no voxel above 0",
    ),
    "mask of another subject": (
        lambda r: write_nifti(roi(r), np.ones((6, 7, 5), np.int16)),
        "betas_session01.nii.gz",
        "mask of subj01 is (6, 7, 5)",
    ),
    "mask with a time axis": (
        lambda r: write_nifti(roi(r), np.ones((5, 7, 6, 2), np.int16)),
        "nsdgeneral.nii.gz",
        "a single volume (x, y, z) is needed",
    ),
    "mask cut off": (lambda r: cut(roi(r)), "nsdgeneral.nii.gz", "damaged"),
    "ROI of another shape": (
        lambda r: write_nifti(roi(r, "streams"), np.ones((5, 7, 5), np.int16)),
        "streams.nii.gz",
        "(5, 7, 5)",
    ),
    "ROI with fractions": (
        lambda r: write_nifti(roi(r, "streams"), np.full((5, 7, 6), 1.5, np.float32)),
        "streams.nii.gz",
        "holds 1.5",
    ),
    "ROI with NaN": (
        lambda r: write_nifti(roi(r, "streams"), np.full((5, 7, 6), np.nan, np.float32)),
        "streams.nii.gz",
        "holds nan",
    ),
    "ctab without names": (
        lambda r: (r / "nsddata/freesurfer/subj01/label/streams.mgz.ctab").write_text("1\n2\n"),
        "streams.mgz.ctab",
        "'1' is not",
    ),
    "ctab with two names": (
        lambda r: (r / "nsddata/freesurfer/subj01/label/streams.mgz.ctab").write_text("1 a\n1 b\n"),
        "streams.mgz.ctab",
        "'a' and 'b'",
    ),
    "ncsnr of another shape": (
        lambda r: write_nifti(betas_directory(r, "subj01") / "ncsnr.nii.gz", np.ones((5, 5, 5), np.float32)),
        "ncsnr.nii.gz",
        "(5, 5, 5)",
    ),
    "betas cut off": (lambda r: cut(session(r), 0.9), "betas_session01.nii.gz", "cut off"),
    "betas cut to the header": (lambda r: cut(session(r), 0.001), "betas_session01.nii.gz", "damaged"),
    "betas empty": (lambda r: session(r).write_bytes(b""), "betas_session01.nii.gz", "damaged"),
    "betas not gzipped": (lambda r: session(r).write_bytes(b"hello" * 100), "betas_session01.nii.gz", "damaged"),
    "betas as floats": (
        lambda r: write_nifti(session(r), volumes(dtype=np.float32)),
        "betas_session01.nii.gz",
        "holds float32",
    ),
    "betas of one volume": (
        lambda r: write_nifti(session(r), volumes()[..., 0]),
        "betas_session01.nii.gz",
        "shape (5, 7, 6)",
    ),
    "betas with a trial too few": (
        lambda r: write_nifti(session(r), volumes(17)),
        "betas_session01.nii.gz",
        "has 17 trials, not 18",
    ),
    "betas in another volume": (
        lambda r: write_nifti(session(r), volumes(shape=(7, 5, 6))),
        "betas_session01.nii.gz",
        "is (7, 5, 6) (x, y, z)",
    ),
    "hdf5 not in MATLAB's order": (
        lambda r: with_hdf5(r, "betas", volumes()),
        "betas_session01.hdf5",
        "(18, 6, 7) (x, y, z)",
    ),
    "hdf5 without betas": (
        lambda r: with_hdf5(r, "data", volumes()),
        "betas_session01.hdf5",
        "no data set 'betas', it has ['data']",
    ),
    "hdf5 of a matrix": (lambda r: with_hdf5(r, "betas", volumes()[0, 0]), "betas_session01.hdf5", "shape (6, 18)"),
    "hdf5 cut off": (
        lambda r: (with_hdf5(r, "betas", volumes()), cut(session(r, suffix="hdf5"))),
        "betas_session01.hdf5",
        "cut off",
    ),
    "session missing in the middle": (
        lambda r: session(r, 2).rename(session(r, 4)),
        "betas_session02.{nii.gz,hdf5}",
        "later sessions do",
    ),
    "session that was never scanned": (
        lambda r: session(r, 2).rename(session(r, 41)),
        "betas_session41.nii.gz",
        "did sessions 1 to 40",
    ),
    "no sessions": (
        lambda r: (session(r, 1).unlink(), session(r, 2).unlink()),
        "betas_fithrf_GLMdenoise_RR",
        "has no betas_session01",
    ),
    "no pictures": (lambda r: pictures(r).unlink(), "nsd_stimuli.hdf5", "--no-pixels"),
    "too few pictures": (lambda r: write_pictures(r, 50), "nsd_stimuli.hdf5", "has 50 pictures"),
    "pictures as floats": (
        lambda r: (
            pictures(r).unlink(),
            h5py.File(pictures(r), "w").create_dataset("imgBrick", data=np.ones((2000, 5, 7, 3))).file.close(),
        ),
        "nsd_stimuli.hdf5",
        "not uint8",
    ),
    "pictures cut off": (lambda r: cut(pictures(r)), "nsd_stimuli.hdf5", "cut off"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_one_line_that_names_the_file(small, name):
    damage, file, words = BROKEN[name]
    assert plan(small).problems == []
    damage(small)
    found = plan(small)
    told = [line for line in found.problems if file in line and words in line]
    assert told, found.problems
    assert all("\n" not in line for line in found.problems)
    assert found.subjects == [] or file == "nsd_stimuli.hdf5"


def test_everything_that_is_wrong_is_told_at_once(small):
    cut(session(small, 1))
    roi(small).unlink()
    behaviour(small).write_text("")
    mat(small).write_text("")
    pictures(small).unlink()
    problems = plan(small, ("1", "3", "9")).problems
    for words in (
        "betas_session01.nii.gz",
        "nsdgeneral.nii.gz",
        "nsd_expdesign.mat",
        "nsd_stimuli.hdf5",
        "'3'",
        "'9'",
    ):
        assert sum(words in line for line in problems) == 1, words


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (SessionChoice(n=5), "--sessions 5 asks for more"),
        (SessionChoice(numbered=(1, 7)), "has no session 7; it has 1-2"),
    ],
    ids=["too many", "absent"],
)
def test_sessions_that_are_not_there_are_a_problem(small, choice, words):
    (problem,) = plan(small, sessions=choice).problems
    assert words in problem
    assert str(betas_directory(small, "subj01")) in problem


def test_what_is_wrong_in_sessions_that_are_not_wanted_stops_nothing(small):
    cut(session(small, 2))
    assert plan(small, sessions=SessionChoice(n=1)).problems == []
    assert len(plan(small).problems) == 1


def test_a_directory_that_is_not_nsd_is_a_problem(tmp_path):
    (problem,) = plan(tmp_path / "nowhere", None).problems
    assert "is no directory" in problem
    assert any("give the root of NSD" in line for line in plan(tmp_path, None).problems)


def test_a_file_type_of_volumes_is_refused_for_a_surface(small):
    with pytest.raises(ValueError, match=r"--file-type hdf5 is for func1pt8mm"):
        plan(small, space="fsaverage", file_type="hdf5")


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x40
    path.write_bytes(bytes(raw))


def test_damage_that_shows_only_while_reading_names_the_file_and_leaves_no_subject(small, tmp_path):
    (subject,) = plan(small).subjects
    flip(session(small, 2), session(small, 2).stat().st_size // 2)
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    with pytest.raises(ValueError, match=r"betas_session02.nii.gz is damaged or cut off"):
        store.write_subject(subject)
    store = PooledStore.open(tmp_path / "s.zarr")
    assert (store.subjects, store.n_images) == ([], 0)


def test_a_wrong_checksum_at_the_end_is_found(small):
    flip(session(small), session(small).stat().st_size - 7)
    with pytest.raises(ValueError, match=r"betas_session01.nii.gz is damaged or cut off .CRC check failed"):
        list(plan(small).subjects[0].sessions[0].read())


def test_a_flipped_byte_that_decompresses_all_the_same_is_found(small):
    """In a stored block only the checksum at the end tells."""
    path = session(small)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    flip(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"betas_session01.nii.gz is damaged or cut off .CRC check failed"):
        list(plan(small).subjects[0].sessions[0].read())


def test_a_damaged_picture_file_is_named_where_it_is_read(small):
    (subject,) = plan(small).subjects
    assert subject.images.read is not None
    cut(pictures(small))
    with pytest.raises(ValueError, match=r"nsd_stimuli.hdf5 is damaged, cut off or no HDF5 file .*; fetch it again"):
        subject.images.read(np.arange(3))


@pytest.mark.parametrize("kind", ["nii.gz", "hdf5", "mgh", "mat"])
def test_a_file_with_wrong_bytes_reads_or_is_an_error_that_names_it(tmp_path, kind):
    rng = np.random.default_rng(5)
    index, vertices = np.argwhere(np.ones((5, 7, 6), bool)).astype(np.int32), np.arange(11, dtype=np.int32)
    path = tmp_path / f"betas.{kind}"
    if kind == "mat":
        path = write_expdesign(tmp_path, make_design())
    elif kind == "mgh":
        write_mgh(path, rng.normal(size=(11, 18)).astype(np.float32))
    else:
        (write_nifti if kind == "nii.gz" else write_hdf5_betas)(path, volumes())
    whole, errors = path.read_bytes(), []
    for _ in range(100):
        raw = bytearray(whole)
        for place in rng.integers(0, min(len(raw), 600), 2):
            raw[place] = rng.integers(0, 256)
        path.write_bytes(raw[: rng.integers(len(raw) // 2, 2 * len(raw))])
        try:
            if kind == "mat":
                read_expdesign(path)
            elif kind == "mgh":
                list(mgh_trials((path, path), (vertices, vertices)))
            else:
                read_header(path)
                list((nifti_trials if kind == "nii.gz" else hdf5_trials)(path, index))
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 20
    assert all(path.name in line for line in errors)


def hemisphere(root: Path, side: str = "lh", number: int = 1) -> Path:
    return betas_directory(root, "subj02", "fsaverage") / f"{side}.betas_session{number:02d}.mgh"


def surface_mask(root: Path) -> Path:
    return root / "nsddata" / "freesurfer" / "fsaverage" / "label" / "rh.nsdgeneral.mgz"


def without_values(root: Path) -> None:
    for side, n in (("lh", 11), ("rh", 9)):
        write_mgh(hemisphere(root, side), np.full((n, 18), np.nan, np.float32))


SURFACE_BROKEN: dict[str, Damage] = {
    "half a session": (lambda r: hemisphere(r, "rh", 2).unlink(), "rh.betas_session02.mgh", "does not exist"),
    "cut off": (lambda r: cut(hemisphere(r)), "lh.betas_session01.mgh", "cut off"),
    "text": (lambda r: hemisphere(r).write_text("hello"), "lh.betas_session01.mgh", "damaged"),
    "too few trials": (
        lambda r: write_mgh(hemisphere(r), np.ones((11, 5), np.float32)),
        "lh.betas_session01.mgh",
        "5 trials, not 18",
    ),
    "integers": (
        lambda r: write_mgh(hemisphere(r), np.ones((11, 18), np.int16)),
        "lh.betas_session01.mgh",
        "holds int16",
    ),
    "vertices of native space": (
        lambda r: write_mgh(hemisphere(r), np.ones((12, 18), np.float32)),
        "fsaverage",
        "vertices of lh differ by file ([11, 12])",
    ),
    "all NaN": (without_values, "subj02", "no vertex within the mask 'nsdgeneral' that is finite"),
    "no mask": (lambda r: surface_mask(r).unlink(), "rh.nsdgeneral.mgz", "--mask all"),
    "mask of another surface": (
        lambda r: write_mgh(surface_mask(r), np.ones(8, np.float32)),
        "rh.nsdgeneral.mgz",
        "has 8 vertices",
    ),
}


@pytest.mark.parametrize("name", SURFACE_BROKEN)
def test_what_is_wrong_on_a_surface_is_one_line_that_names_the_file(tmp_path, name):
    damage, file, words = SURFACE_BROKEN[name]
    write_expdesign(tmp_path, make_design())
    write_surface_subject(tmp_path, make_design(), "subj02", (1, 2, 3))
    damage(tmp_path)
    found = plan(tmp_path, ("2",), space="fsaverage", pixels=False)
    assert [line for line in found.problems if file in line and words in line], found.problems
    assert found.subjects == []


def test_a_vertex_that_is_not_finite_later_on_is_refused_with_file_trial_and_vertex(tmp_path):
    write_expdesign(tmp_path, make_design())
    write_surface_subject(tmp_path, make_design(), "subj02", (1,))
    data = np.ones((11, 18), np.float32)
    data[5, 9] = np.inf
    write_mgh(hemisphere(tmp_path), data)
    (subject,) = plan(tmp_path, ("2",), space="fsaverage", pixels=False).subjects
    with pytest.raises(ValueError, match=r"lh.betas_session01.mgh: response inf of trial 10, vertex 5 is not finite"):
        list(subject.sessions[0].read())
