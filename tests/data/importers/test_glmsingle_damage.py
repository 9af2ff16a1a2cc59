"""The GLMsingle importer on odd and damaged files: each is named in one clear line, and nothing in it runs."""

import gzip
import pickle
import re
import shutil
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image

from tests.data.importers.glmsingle_plans import (
    TRUTH,
    all_tables,
    edit,
    plan,
    problems,
    the_problem,
    with_ids,
    write,
)
from tests.glmsingle_tree import (
    AFFINE,
    GRID,
    TYPED,
    cut_gzip,
    glmsingle_dict,
    picture_name,
    save_betas,
    save_nifti,
    scan,
    write_glmsingle,
    write_laion,
)


@pytest.fixture
def source(tmp_path) -> Path:
    return write_glmsingle(tmp_path / "source", [TRUTH])


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    source = write_glmsingle(tmp_path / "source", [TRUTH, scan("sub-02", seed=2), scan("sub-03", seed=3)])
    (source / "sub-01" / "mask.nii.gz").write_bytes(b"no volume")
    (source / "stimuli" / picture_name(int(TRUTH.picture[0]))).unlink()
    (source / "sub-02" / f"{TYPED}.hdf5").write_bytes(b"no hdf5")
    edit(all_tables(source / "sub-03")[0], lambda table: table.assign(onset="soon"))
    edit(all_tables(source / "sub-03")[1], lambda table: table.drop(columns="stim_file").drop(columns="trial_type"))
    told = "\n".join(problems(source))
    for part in (
        "mask.nii.gz is damaged or is not a readable NIfTI",
        "stimuli lacks 1 of the",
        f"{TYPED}.hdf5 is damaged, cut off or no HDF5",
        "onset 'soon' is not a number",
        "one that names the picture is needed",
    ):
        assert part in told


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_that_would_run_code_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write("npy", tmp_path / "source")
    np.save(source / "sub-01" / f"{TYPED}.npy", glmsingle_dict(TRUTH.betas) | {"R2": Bomb()})
    assert f"{TYPED}.npy" in the_problem(source)
    assert not (tmp_path / "exploded").exists()
    with (source / "sub-01" / f"{TYPED}.npy").open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        pickle.load(file)
    assert (tmp_path / "exploded").exists(), "a free unpickler would have run it"


def first(source: Path) -> Path:
    return all_tables(source)[0]


def no_betasmd(source: Path) -> None:
    with h5py.File(source / "sub-01" / f"{TYPED}.hdf5", "a") as file:
        del file["betasmd"]


def three_axes(source: Path) -> None:
    no_betasmd(source)
    with h5py.File(source / "sub-01" / f"{TYPED}.hdf5", "a") as file:
        file["betasmd"] = np.zeros((3, 4, 5), np.float32)


def odd_picture(source: Path) -> None:
    Image.fromarray(np.zeros((5, 9, 3), np.uint8)).save(source / "stimuli" / picture_name(int(TRUTH.picture[3])))


def unreadable_picture(source: Path) -> None:
    (source / "stimuli" / picture_name(int(TRUTH.picture[3]))).write_text("no picture")


def two_tasks(source: Path) -> None:
    shutil.copy(first(source), source / "sub-01" / "sub-01_ses-01_task-rest_run-01_events.tsv")


def two_ids_of_a_picture(source: Path) -> None:
    with_ids(source)
    edit(first(source), lambda table: table.assign(image_id=["n/a" if s == "n/a" else "same" for s in table.stim_file]))


def an_empty_id(source: Path) -> None:
    with_ids(source)
    edit(first(source), lambda table: table.assign(image_id=""))


def two_parts(source: Path) -> None:
    for part, path in zip(("train", "test", "train", "test"), all_tables(source), strict=True):
        edit(path, lambda table, part=part: table.assign(split=part))


def no_subject(source: Path) -> None:
    shutil.rmtree(source / "sub-01")


def finite_nowhere(source: Path) -> None:
    save_betas(source / "sub-01", np.full_like(TRUTH.betas, np.nan), "hdf5")


def each(change):
    """Edit every table."""

    def spoil(source: Path) -> None:
        for path in all_tables(source):
            edit(path, change)

    return spoil


def one(change):
    """Edit the first table."""
    return lambda source: edit(first(source), change)


def mask_of(array: np.ndarray, name: str = "mask.nii.gz"):
    return lambda source: save_nifti(source / "sub-01" / name, array.astype(np.uint8))


WRONG = {
    "no betas in the file": (no_betasmd, rf"{TYPED}.hdf5 has no data set 'betasmd', it has .*; give GLMsingle's own"),
    "three axes": (three_axes, r"has betas of shape \(3, 4, 5\); \(x, y, z, trial\) is expected"),
    "an odd picture": (odd_picture, r"stim_\d\d.png is \(5, 9\) but others are \(8, 8\); crop them to one size first"),
    "no picture": (unreadable_picture, r"stim_\d\d.png is not a readable picture; replace or remove it"),
    "no pictures": (lambda source: shutil.rmtree(source / "stimuli"), r"stimuli does not exist; give .* by --images"),
    "two tasks": (two_tasks, r"sub-01 has events of several tasks \(images, rest\); .* by --trials"),
    "an id for two pictures": (two_ids_of_a_picture, r"image_id 'same' goes with the pictures .* an id is one image"),
    "an empty id": (an_empty_id, r"row \d+: no image_id for a picture; fill it in or drop the column"),
    "an image in two parts": (two_parts, r"is in the split '.*' and in '.*'; an image has one"),
    "an unknown part": (
        each(lambda t: t.assign(split="val")),
        r"split 'val' of .* is none of train, validation",
    ),
    "no subject": (no_subject, r"source has no betas: .*; check SOURCE"),
    "finite nowhere": (finite_nowhere, r"sub-01: no voxel is finite in all trials; check .*mask.nii.gz"),
    "a trial short": (
        lambda source: save_betas(source / "sub-01", TRUTH.betas[..., :-1], "hdf5"),
        rf"{TYPED}.hdf5 has 23 betas but .* 24 rows with a picture; they must be the trials that GLMsingle was given",
    ),
    "no session of its own": (
        lambda source: save_betas(source / "sub-01" / "ses-01", TRUTH.betas, "hdf5"),
        r"is one of several files of betas, so its path must say its session",
    ),
    "unlike tables": (one(lambda t: t.assign(split="train")), r"differ in their column 'split'; make them alike"),
    "a session in words": (
        each(lambda t: t.assign(session="one")),
        r"run-01_events.tsv, row 1: session 'one' is not a whole number from 0; correct it",
    ),
    "half a run": (each(lambda t: t.assign(run="1.5")), r"row 1: run '1.5' is not a whole number from 0; correct it"),
    "no onset": (one(lambda t: t.assign(onset="-")), r"row 1: onset '-' is not a number; correct it"),
    "an empty table": (
        lambda source: first(source).write_bytes(b""),
        r"events.tsv is not a readable table",
    ),
    "bytes for a table": (
        lambda source: first(source).write_bytes(b"\xff\x81\n"),
        r"events.tsv is not a readable table",
    ),
    "no trial": (each(lambda t: t.assign(stim_file="n/a")), r"no row names a picture; fill in the column that should"),
    "two masks": (mask_of(TRUTH.mask, "other_mask.nii.gz"), r"has several masks, such as mask.nii.gz and other_mask"),
    "a mask of another size": (
        mask_of(np.ones((2, 2, 2))),
        r"mask.nii.gz is \(2, 2, 2\) with 8 voxels above 0, which fits neither the volume \(5, 4, 3\)",
    ),
    "an empty mask": (mask_of(np.zeros(GRID)), r"mask.nii.gz has no voxel above 0; give another mask"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_file_is_one_clear_line(source, spoil, message):
    spoil(source)
    assert re.search(message, "\n".join(problems(source)))


@pytest.fixture
def laion(tmp_path) -> Path:
    return write_laion(tmp_path / "source", [TRUTH])


def test_a_damaged_statmap_is_named(laion):
    one, other = sorted(laion.rglob("*SingletrialBetas_statmap.nii.gz"))
    one.write_bytes(one.read_bytes()[:-40])
    cut_gzip(other)
    damaged, short = problems(laion)
    assert one.name in damaged
    assert "is damaged or cut off" in damaged
    assert other.name in short
    assert "holds less than its header says; fetch it again" in short


def test_a_flipped_byte_that_decompresses_all_the_same_is_found(laion):
    """In a stored block only the checksum at the end tells."""
    path = sorted(laion.rglob("*SingletrialBetas_statmap.nii.gz"))[0]
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole, compresslevel=0))
    (subject,) = plan(laion).subjects
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or cut off .CRC check failed"):
        list(subject.sessions[0].read())
    assert f"{path.name} is damaged or cut off (CRC check failed" in the_problem(laion)


def test_sessions_in_different_volumes_are_refused(laion):
    path = sorted(laion.rglob("*SingletrialBetas_statmap.nii.gz"))[1]
    save_nifti(path, np.asarray(nibabel.load(path).dataobj), AFFINE @ np.diag([2, 1, 1, 1]))
    assert "have different volumes; betas of all sessions must lie in one" in the_problem(laion)


def test_a_mask_in_another_space_is_refused(laion):
    affine = AFFINE.copy()
    affine[0, 3] += 5
    path = save_nifti(laion.parent / "other.nii.gz", TRUTH.mask.astype(np.uint8), affine)
    assert "have different affines; the mask must lie in the space of the betas" in the_problem(laion, mask=path)


def test_beta_indices_that_skip_are_refused(laion):
    path = sorted(laion.rglob("*_trials.tsv"))[0]
    edit(path, lambda table: table.assign(beta_index=[str(int(k) + 1) for k in table.beta_index]))
    assert "beta_index of session 1 doesn't run from 0 to 11 in the order of runs" in the_problem(laion)


def test_an_archive_without_its_table_is_refused(laion):
    (laion / "stimuli" / "task-images_metadata.csv").unlink()
    assert "task-images_metadata.csv must be there with a column image_name" in the_problem(laion)
