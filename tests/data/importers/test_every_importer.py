"""What the command line promises of all importers alike: subjects by number or name, files behind the pictures."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data.importers.algonauts import plan_algonauts
from data.importers.arrays import plan_arrays
from data.importers.glmsingle import plan_glmsingle
from data.importers.mindeye import plan_mindeye
from data.importers.nsd import plan_nsd
from data.importers.plan import ImportPlan, SessionChoice
from data.schema import resolve_subject
from tests import glmsingle_tree, mindeye_tree
from tests.algonauts_tree import make_algonauts_subject
from tests.nsd_tree import write_tree


def write_nsd(root: Path) -> None:
    write_tree(root, {"subj01": (1,), "subj02": (1,)}, kinds=["nii.gz"], csv=False)


def write_algonauts(root: Path) -> None:
    for name in ("subj01", "subj02"):
        make_algonauts_subject(root, name, [47, 3, 512])


def write_mindeye(root: Path) -> None:
    shown = np.arange(750)
    for name in ("subj01", "subj02"):
        mindeye_tree.make_mindeye_subject(root, name, shown, set())
    mindeye_tree.write_indices(root, {"subj01": shown, "subj02": shown})
    mindeye_tree.write_pictures(root / "coco_images_224_float16.hdf5")


def write_glmsingle(root: Path) -> None:
    glmsingle_tree.write_glmsingle(root, [glmsingle_tree.scan(name) for name in ("sub-01", "sub-02")])


def write_laion(root: Path) -> None:
    glmsingle_tree.write_laion(root, [glmsingle_tree.scan(name) for name in ("sub-01", "sub-02")])


def write_arrays(root: Path) -> None:
    root.mkdir()
    np.save(root / "responses.npy", np.ones((4, 3), np.float32))
    np.save(root / "images.npy", np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8))
    entry = {"responses": "responses.npy", "images": "images.npy"}
    (root / "recordings.json").write_text(json.dumps([{"subject": name, **entry} for name in ("sub01", "sub02")]))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tree of subjects 1 and 2 is written and planned, their names, the files behind their pictures."""

    write: Callable[[Path], None]
    plan: Callable[..., ImportPlan]
    names: tuple[str, str]
    files: tuple[str, ...]


NSD_NAMES, BIDS_NAMES = ("subj01", "subj02"), ("sub-01", "sub-02")
LAYOUTS = {
    "nsd": Layout(
        write=write_nsd, plan=plan_nsd, names=NSD_NAMES, files=("nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5",)
    ),
    "algonauts": Layout(write=write_algonauts, plan=plan_algonauts, names=NSD_NAMES, files=()),
    "mindeye": Layout(write=write_mindeye, plan=plan_mindeye, names=NSD_NAMES, files=("coco_images_224_float16.hdf5",)),
    "glmsingle": Layout(write=write_glmsingle, plan=plan_glmsingle, names=BIDS_NAMES, files=()),
    "laion": Layout(
        write=write_laion,
        plan=plan_glmsingle,
        names=BIDS_NAMES,
        files=("stimuli/task-images_stimuli.h5", "stimuli/task-images_metadata.csv"),
    ),
    "arrays": Layout(write=write_arrays, plan=plan_arrays, names=("sub01", "sub02"), files=("images.npy",)),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def tree(request, tmp_path_factory) -> tuple[Layout, Path]:
    """A tree in each layout. Nothing here is ever changed."""
    layout = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp(request.param) / "source"
    layout.write(root)
    return layout, root


def planned(tree: tuple[Layout, Path], subjects: tuple[str, ...] | None) -> ImportPlan:
    layout, root = tree
    return layout.plan(root, subjects=subjects, sessions=SessionChoice())


def test_subjects_are_numbers_or_names_and_all_of_them_by_default(tree):
    one, two = tree[0].names
    for given, names in (
        (None, [one, two]),
        (("1", "2"), [one, two]),
        (("2",), [two]),
        ((two, "1"), [one, two]),
        (("02", two), [two]),
        ((), []),
    ):
        plan = planned(tree, given)
        assert plan.problems == []
        assert [subject.name for subject in plan.subjects] == names, given


def test_each_subject_that_is_not_there_is_a_line_that_says_who_is(tree):
    plan = planned(tree, ("9", "1", "nobody"))
    assert [subject.name for subject in plan.subjects] == [tree[0].names[0]]
    for problem, given in zip(plan.problems, ("9", "nobody"), strict=True):
        assert f"subject {given!r} is not in {tree[1]}" in problem
        assert problem.endswith(f"; it has {', '.join(tree[0].names)}")


def test_pictures_tell_their_files_where_those_are_few(tree):
    layout, root = tree
    for subject in planned(tree, None).subjects:
        assert subject.images.files == tuple(root / name for name in layout.files)
    bare = layout.plan(root, subjects=None, sessions=SessionChoice(), pixels=False)
    assert all(subject.images.files == () for subject in bare.subjects)


def test_a_number_that_could_be_two_subjects_is_refused(tmp_path):
    glmsingle_tree.write_glmsingle(tmp_path / "source", [glmsingle_tree.scan("sub-01")])
    shutil.copytree(tmp_path / "source" / "sub-01", tmp_path / "source" / "sub-1")
    (problem,) = plan_glmsingle(tmp_path / "source", subjects=("1",), sessions=SessionChoice()).problems
    assert problem == "subject '1' could be sub-01 or sub-1; it has sub-01, sub-1"


def test_a_name_of_digits_alone_is_a_name_first():
    assert resolve_subject("5", ["5", "subj05"], "here") == "5"
    with pytest.raises(ValueError, match="subject '4' is not in here; it has no subjects"):
        resolve_subject("4", [], "here")
