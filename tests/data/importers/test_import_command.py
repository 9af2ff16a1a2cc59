"""``python -m data import``: each layout goes in by the real command line, whole or not at all, killed or not."""

import hashlib
import json
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from data.__main__ import main
from data.store import PooledStore
from data.store.validate import validate
from tests import glmsingle_tree, mindeye_tree
from tests.algonauts_tree import make_algonauts_subject
from tests.dying_import import counted, small_shards
from tests.nsd_tree import betas_directory, experiment, write_tree

Spoil = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A small tree in one of the layouts, what its import tells, and how its files can be spoilt."""

    write: Callable[[Path], object]
    told: tuple[str, ...]
    """The subjects, as they are told of."""
    spoilt: dict[str, tuple[str, Spoil]]
    """By what is wrong: a file below the tree, and what to do to it. The file's name is in the error."""


def write_nsd(root: Path) -> None:
    write_tree(root, {"subj01": (1, 2), "subj05": (1,)}, kinds=["nii.gz"], csv=False)


def write_mindeye(root: Path) -> None:
    shown = np.random.default_rng(0).permutation(np.repeat(np.arange(300, 552), 3))  # from the 256th on pictures recur
    mindeye_tree.make_mindeye_subject(root, "subj01", shown, set(range(300, 350)))
    mindeye_tree.write_indices(root, {"subj01": shown})
    mindeye_tree.write_pictures(root / "coco_images_224_float16.hdf5")
    mindeye_tree.write_shared(root, set(range(300, 350)))


def write_arrays(root: Path) -> None:
    root.mkdir()
    rng = np.random.default_rng(0)
    np.save(root / "responses.npy", rng.normal(size=(20, 3)).astype(np.float32))
    np.save(root / "images.npy", rng.integers(0, 256, (20, 16, 16, 3), np.uint8))
    entry = {"subject": "A", "responses": "responses.npy", "images": "images.npy"}
    (root / "recordings.json").write_text(json.dumps([entry]))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def text(path: Path) -> None:
    path.write_text("hello")


def resaved(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return lambda path: np.save(path, change(np.load(path)))


def small_mask(path: Path) -> None:
    glmsingle_tree.save_nifti(path, np.ones((2, 2, 2), np.uint8))


def odd_picture(path: Path) -> None:
    Image.fromarray(np.zeros((5, 9, 3), np.uint8)).save(path)


SCAN = glmsingle_tree.scan("sub-01")
SHOWN = glmsingle_tree.picture_name(int(SCAN.picture[3]))
FMRI, MASKS = "subj01/training_split/training_fmri", "subj01/roi_masks"
SESSION_2 = "nsddata_betas/ppdata/subj01/func1pt8mm/betas_fithrf_GLMdenoise_RR/betas_session02.nii.gz"
LAYOUTS = {
    "nsd": Layout(
        write=write_nsd,
        told=("subj01: 2 sessions, 36 trials, 42 voxels", "subj05: 1 sessions, 18 trials"),
        spoilt={
            "betas cut off": (SESSION_2, cut),
            "betas of text": (SESSION_2, text),
            "design of text": ("nsddata/experiments/nsd/nsd_expdesign.mat", text),
            "no mask": ("nsddata/ppdata/subj01/func1pt8mm/roi/nsdgeneral.nii.gz", Path.unlink),
            "no pictures": ("nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5", Path.unlink),
        },
    ),
    "algonauts": Layout(
        write=lambda root: make_algonauts_subject(root, "subj01", [47, 3, 512, 100, 72, 9]),
        told=("subj01: 6 trials, 15 voxels, 6 images",),
        spoilt={
            "betas cut off": (f"{FMRI}/rh_training_fmri.npy", cut),
            "three axes": (f"{FMRI}/lh_training_fmri.npy", resaved(lambda a: a[..., None])),
            "no labels' names": (f"{MASKS}/mapping_streams.npy", lambda path: np.save(path, np.arange(3))),
            "an empty mask": (f"{MASKS}/lh.all-vertices_fsaverage_space.npy", resaved(np.zeros_like)),
        },
    ),
    "mindeye": Layout(
        write=write_mindeye,
        told=("subj01: 2 sessions, 756 trials, 4 voxels, 252 images",),
        spoilt={
            "betas cut off": ("betas_all_subj01_fp32_renorm.hdf5", cut),
            "tar cut off": ("wds/subj01/train/1.tar", cut),
            "no pictures": ("coco_images_224_float16.hdf5", Path.unlink),
            "indices of text": ("COCO_73k_subj_indices.hdf5", text),
        },
    ),
    "glmsingle": Layout(
        write=lambda root: glmsingle_tree.write_glmsingle(root, [SCAN]),
        told=("sub-01: 2 sessions, 24 trials",),
        spoilt={
            "betas cut off": (f"sub-01/{glmsingle_tree.TYPED}.hdf5", cut),
            "a mask of another size": ("sub-01/mask.nii.gz", small_mask),
            "an odd picture": (f"stimuli/{SHOWN}", odd_picture),
            "an empty table": (
                "sub-01/ses-01/func/sub-01_ses-01_task-images_run-01_events.tsv",
                lambda path: path.write_bytes(b""),
            ),
        },
    ),
    "arrays": Layout(
        write=write_arrays,
        told=("A: 20 trials, 3 voxels, 20 images",),
        spoilt={
            "no responses": ("responses.npy", Path.unlink),
            "responses cut off": ("responses.npy", cut),
            "pictures of floats": ("images.npy", resaved(lambda a: a / 255)),
            "a table of text": ("recordings.json", text),
        },
    ),
}
SPOILT = [(name, what) for name, layout in LAYOUTS.items() for what in layout.spoilt]
Call = Callable[..., tuple[int, str, str]]


def contents(path: Path) -> dict[str, str]:
    """Return the digest of every file below `path`, but for those that zarr was writing when it was killed."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".partial")
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Callable[[str], Path]:
    """Return a layout's tree, written once. Nobody changes it."""
    made: dict[str, Path] = {}

    def tree(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "source"
            LAYOUTS[name].write(made[name])
        return made[name]

    return tree


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tree_is_checked_imported_and_then_there_already(call, trees, tmp_path, name):
    source, store = trees(name), tmp_path / "s.zarr"
    code, out, err = call("import", name, source, store, "--check")
    assert (code, err) == (0, "")
    assert all(f"ok   {line}" in out for line in LAYOUTS[name].told)
    assert not store.exists()
    code, out, err = call("import", name, source, store)
    assert (code, err) == (0, "")
    assert all(f"\n{line}" in out for line in LAYOUTS[name].told)
    before = contents(store)
    code, out, err = call("import", name, source, store)
    assert (code, err) == (0, "")
    assert out.count(": there already") == len(LAYOUTS[name].told)
    assert contents(store) == before
    code, out, err = call("validate", store)
    assert (code, err) == (0, ""), out
    assert f"{store}: valid ({len(LAYOUTS[name].told)} subjects, " in out


def test_nsds_voxels_and_trials_are_those_of_nifti_and_design_file(call, trees, tmp_path):
    """Values are read with nibabel at the millimetres that the store gives, images with scipy from the design."""
    source, path = trees("nsd"), tmp_path / "s.zarr"
    assert call("import", "nsd", source, path)[0] == 0
    store, design = PooledStore.open(path), loadmat(experiment(source) / "nsd_expdesign.mat")
    ids = np.array(store.image_ids())
    for name, sessions in (("subj01", (1, 2)), ("subj05", (1,))):
        subject, number = store.subject(name), int(name[4:])
        coordinates = subject.coordinates
        assert coordinates is not None
        assert sorted(set(subject.session)) == list(sessions)
        for session in sessions:
            image = nib.load(betas_directory(source, name) / f"betas_session{session:02d}.nii.gz")
            at = np.rint(nib.affines.apply_affine(np.linalg.inv(image.affine), coordinates)).astype(int)
            np.testing.assert_allclose(nib.affines.apply_affine(image.affine, at), coordinates, atol=1e-3)
            there = subject.session == session
            expected = np.asarray(image.dataobj)[tuple(at.T)].T / 300
            np.testing.assert_allclose(subject.responses(there), expected, rtol=1e-6)
            n = len(expected)
            order = design["masterordering"][0, (session - 1) * n : session * n].astype(int)
            shown = design["subjectim"][number - 1, order - 1].astype(int) - 1
            assert ids[subject.image[there]].tolist() == [f"nsd-{i:05d}" for i in shown]


@pytest.mark.parametrize(("name", "what"), SPOILT, ids=[f"{name}: {what}" for name, what in SPOILT])
def test_a_spoilt_file_is_one_line_and_nothing_is_written(call, trees, tmp_path, name, what):
    source, store = Path(shutil.copytree(trees(name), tmp_path / "source")), tmp_path / "s.zarr"
    file, spoil = LAYOUTS[name].spoilt[what]
    there = tmp_path / "there.zarr"
    assert call("import", name, source, there)[0] == 0
    before = contents(there)
    spoil(source / file)
    for target in (store, there):
        code, _, err = call("import", name, source, target)
        assert code == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert Path(file).name in err
        assert "unexpected" not in err
    code, out, err = call("import", name, source, store, "--check")
    assert (code, err.count("\n")) == (1, 1)
    assert any(line.startswith("bad  ") and Path(file).name in line for line in out.splitlines())
    assert not store.exists()
    assert contents(there) == before


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def command_and_die(source: str, store: str, at: int) -> None:
    """Run the command and be killed in the middle of file operation `at`."""
    sys.argv = ["python -m data", "import", "nsd", source, store]
    with counted(at), small_shards():
        main()


def test_nsds_import_killed_at_ten_moments_leaves_a_valid_store_and_its_rerun_the_same_one(call, trees, tmp_path):
    source, whole = trees("nsd"), tmp_path / "whole" / "s.zarr"
    with counted() as done, small_shards():
        assert call("import", "nsd", source, whole)[0] == 0
    assert len(done) > 100
    reference, expected = PooledStore.open(whole), contents(whole)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dying_import", "data.__main__", "data.importers.nsd"])
    reached = set()
    for at in np.random.default_rng(11).choice(len(done), 10, replace=False).tolist():
        path = tmp_path / str(at) / "s.zarr"
        child = context.Process(target=command_and_die, args=(str(source), str(path), at))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if (path / "zarr.json").exists():
            assert validate(path) == [], at
            reached.add(len(PooledStore.open(path).subjects))
        with small_shards():
            code, _, err = call("import", "nsd", source, path)
        assert (code, err) == (0, ""), at
        assert validate(path) == [], at
        store = PooledStore.open(path)
        assert store.image_ids() == reference.image_ids()
        assert [store.subject(s).digest for s in store.subjects] == [
            reference.subject(s).digest for s in reference.subjects
        ]
        assert contents(path) == expected, at
    assert reached == {0, 1}
