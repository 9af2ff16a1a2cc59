"""The MindEye2 importer: a row of the betas gets the image that the release says, in its session."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from data.importers import mindeye
from data.importers.mindeye import plan_mindeye
from data.importers.plan import ImportPlan, SessionChoice
from data.sources import SubjectSource
from data.store import PooledStore
from tests.mindeye_tree import (
    behav,
    make_mindeye_subject,
    pictures,
    write_indices,
    write_pictures,
    write_shared,
    write_tar,
)
from tests.nsd_tree import DesignTruth, real_sized_design, write_expdesign

N_TRIALS = 1500
BETAS = "betas_all_subj01_fp32_renorm.hdf5"
INDICES = "COCO_73k_subj_indices.hdf5"
PICTURES = "coco_images_224_float16.hdf5"


@pytest.fixture(scope="module")
def truth() -> DesignTruth:
    return real_sized_design()


@pytest.fixture(scope="module")
def shown(truth) -> np.ndarray:
    """What subj01 saw in its first two sessions."""
    return truth.of_trial[0, :N_TRIALS]


@pytest.fixture(scope="module")
def made(tmp_path_factory, truth, shown) -> Path:
    """The release: two sessions of subj01; indices of all 40, as in the real one."""
    root = tmp_path_factory.mktemp("made") / "mindeye"
    make_mindeye_subject(root, "subj01", shown, truth.tested | truth.validated)
    write_indices(root, {"subj01": truth.of_trial[0], "subj02": truth.of_trial[1]})
    write_pictures(root / PICTURES)
    write_shared(root, truth.tested | truth.validated)
    return root


@pytest.fixture
def tree(made, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "mindeye")


@pytest.fixture(scope="module")
def design(tmp_path_factory, truth) -> Path:
    return write_expdesign(tmp_path_factory.mktemp("nsd"), truth)


def planned(tree: Path, *, choice: SessionChoice | None = None, **options) -> ImportPlan:
    return plan_mindeye(tree, **{"subjects": None, **options}, sessions=choice or SessionChoice())


def the_subject(tree: Path, **options) -> SubjectSource:
    plan = planned(tree, **options)
    assert plan.problems == []
    (source,) = plan.subjects
    return source


def written(source: SubjectSource, path: Path) -> PooledStore:
    PooledStore.create(path, name="mindeye").write_subject(source)
    return PooledStore.open(path)


def shown_by(source: SubjectSource) -> list[int]:
    """NSD's id of each trial of all sessions."""
    return [int(source.images.ids[row][4:]) for session in source.sessions for row in session.columns["image"]]


def betas(tree: Path) -> np.ndarray:
    with h5py.File(tree / BETAS) as file:
        return file["betas"][...]


# -- what comes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 7 * 100 * 16, 64 << 20])
def test_every_row_has_its_session_its_image_and_its_repeat(tree, shown, monkeypatch, block_bytes):
    monkeypatch.setattr(mindeye, "_BLOCK_BYTES", block_bytes)
    store = written(the_subject(tree, pixels=False), tree.parent / "store.zarr")
    subject = store.subject("subj01")
    np.testing.assert_array_equal(subject.responses(), betas(tree))
    np.testing.assert_array_equal(subject.session, np.arange(N_TRIALS) // 750 + 1)
    ids = store.image_ids()
    assert [ids[row] for row in subject.image] == [f"nsd-{i:05d}" for i in shown]
    repeat = pd.Series(shown).groupby(shown).cumcount()
    assert repeat.max() > 0
    np.testing.assert_array_equal(subject.trial_column("repeat"), repeat)
    assert subject.attrs["unit"] == "z"
    assert subject.upstream_preprocessing is not None
    assert "z-scored per session" in subject.upstream_preprocessing


@pytest.mark.parametrize("rows_per_chunk", [64, 1, None])
def test_half_precision_pictures_become_the_bytes_that_they_came_from(tree, rows_per_chunk):
    write_pictures(tree / PICTURES, rows_per_chunk=rows_per_chunk)
    source = the_subject(tree)
    store = written(source, tree.parent / "store.zarr")
    nsd_ids = np.array([int(identity[4:]) for identity in store.image_ids()])
    expected = pictures(nsd_ids)
    assert len(np.unique(expected)) == 256
    np.testing.assert_array_equal(np.concatenate([batch for _, _, batch in store.pixels()]), expected)
    assert source.images.read is not None
    np.testing.assert_array_equal(source.images.read(np.array([9, 2, 700])), expected[[9, 2, 700]])
    assert "rounded to uint8" in source.provenance["pixels"]


@pytest.mark.parametrize("only", ["indices", "tars", "design"])
def test_any_one_source_says_what_the_rows_show(tree, shown, design, only):
    if only != "indices":
        (tree / INDICES).unlink()
    if only != "tars":
        shutil.rmtree(tree / "wds")
    plan = planned(tree, pixels=False, design=design if only == "design" else None)
    assert plan.problems == []
    assert not any("left out" in warning for warning in plan.warnings)
    assert shown_by(plan.subjects[0]) == shown.tolist()


def test_rows_that_no_file_names_are_left_out_and_counted(tree, truth, shown):
    (tree / INDICES).unlink()
    shutil.rmtree(tree / "wds" / "subj01" / "new_test")
    shutil.rmtree(tree / "wds" / "subj01" / "test")
    kept = ~np.isin(shown, list(truth.tested | truth.validated))
    plan = planned(tree, pixels=False)
    (warning,) = [w for w in plan.warnings if "left out" in w]
    assert f"{(~kept).sum()} of {N_TRIALS} rows" in warning
    subject = written(plan.subjects[0], tree.parent / "store.zarr").subject("subj01")
    np.testing.assert_array_equal(subject.responses(), betas(tree)[kept])
    np.testing.assert_array_equal(subject.session, (np.arange(N_TRIALS) // 750 + 1)[kept])
    assert shown_by(plan.subjects[0]) == shown[kept].tolist()


def test_a_session_that_no_file_names_is_not_there_to_choose(tree):
    (tree / INDICES).unlink()
    for part in ("train/1.tar", "new_test/0.tar", "test/0.tar"):
        (tree / "wds" / "subj01" / part).unlink()
    assert [s.session for s in planned(tree, pixels=False).subjects[0].sessions] == [1]
    (problem,) = planned(tree, pixels=False, choice=SessionChoice(numbered=(2,))).problems
    assert "no session 2; it has 1" in problem


@pytest.mark.parametrize(
    ("choice", "sessions"), [(SessionChoice(n=1), [1]), (SessionChoice(numbered=(2,)), [2])], ids=["first", "second"]
)
def test_a_choice_of_sessions_brings_their_trials_and_images_alone(tree, shown, choice, sessions):
    source = the_subject(tree, pixels=False, choice=choice)
    store = written(source, tree.parent / "store.zarr")
    rows = np.flatnonzero(np.isin(np.arange(N_TRIALS) // 750 + 1, sessions))
    subject = store.subject("subj01")
    np.testing.assert_array_equal(subject.responses(), betas(tree)[rows])
    assert sorted(store.image_ids()) == sorted({f"nsd-{i:05d}" for i in shown[rows]})
    # Repeats count from the first session, whichever sessions come in.
    repeat = pd.Series(shown).groupby(shown).cumcount().to_numpy()
    np.testing.assert_array_equal(subject.trial_column("repeat"), repeat[rows])


def test_a_session_that_is_appended_gives_the_digest_of_all_at_once(tree):
    whole = written(the_subject(tree, pixels=False), tree.parent / "whole.zarr")
    written(the_subject(tree, pixels=False, choice=SessionChoice(n=1)), tree.parent / "parts.zarr")
    parts = PooledStore.open(tree.parent / "parts.zarr", writable=True)
    assert [s.session for s in parts.write_subject(the_subject(tree, pixels=False))] == [2]
    assert parts.write_subject(the_subject(tree, pixels=False)) == []
    assert parts.subject("subj01").digest == whole.subject("subj01").digest


def test_an_incomplete_last_session_is_told(tree, shown, truth):
    make_mindeye_subject(tree.parent / "short", "subj01", shown[:800], truth.tested | truth.validated)
    plan = planned(tree.parent / "short", pixels=False)
    assert any("last is incomplete" in warning for warning in plan.warnings)
    assert [s.n_trials for s in plan.subjects[0].sessions] == [750, 50]


def test_images_are_those_of_nsd_so_subjects_share_them(tree, truth):
    make_mindeye_subject(tree, "subj02", truth.of_trial[1, :N_TRIALS], truth.tested | truth.validated, n_voxels=7)
    plan = planned(tree, pixels=False)
    store = PooledStore.create(tree.parent / "store.zarr", name="mindeye")
    for source in plan.subjects:
        store.write_subject(source)
    assert store.n_images == len(np.unique(truth.of_trial[:2, :N_TRIALS]))
    assert (store.subject(1).n_voxels, store.subject(2).n_voxels) == (4, 7)


# -- roles -------------------------------------------------------------------------------------------------------------


def test_with_the_design_the_roles_are_those_of_the_protocol(tree, design, truth):
    source = the_subject(tree, pixels=False, design=design)
    expected = dict.fromkeys(truth.tested, "test") | dict.fromkeys(truth.validated, "validation")
    assert source.images.roles == [expected.get(int(identity[4:]), "train") for identity in source.images.ids]
    assert set(source.images.roles) == {"train", "validation", "test"}


def test_without_the_design_a_hash_splits_and_that_is_told(tree):
    plan = planned(tree, pixels=False)
    assert set(plan.subjects[0].images.roles) == {""}
    (warning,) = plan.warnings
    assert "hash" in warning
    assert "--design" in warning


# -- what is missing or odd --------------------------------------------------------------------------------------------


def test_indices_that_differ_from_the_tars_are_a_problem_that_names_both(tree, shown):
    changed = shown.copy()
    changed[[20, 900]] = changed[[900, 20]]
    write_indices(tree, {"subj01": changed})
    problems = planned(tree, pixels=False).problems
    assert problems
    assert all(INDICES in problem and ".tar" in problem and "remove" in problem for problem in problems)
    assert any(f"trial 20 of subj01 showed image {shown[20]}" in problem for problem in problems)


def test_a_design_that_differs_from_the_release_is_a_problem(tree, design, truth):
    write_shared(tree, (truth.tested | truth.validated) - {min(truth.tested)})
    write_indices(tree, {"subj01": truth.of_trial[1]})
    shutil.rmtree(tree / "wds")
    shared, images = planned(tree, pixels=False, design=design).problems
    assert f"whether image {min(truth.tested)} is shared" in shared
    assert "nsd_expdesign.mat" in images
    assert INDICES in images


def edited(key: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            values = change(file[key][...])
            del file[key]
            if values is not None:
                file[key] = values

    return spoil


def one_sample(values: np.ndarray) -> Callable[[Path], None]:
    return lambda path: write_tar(path, [{"behav": values}])


def huge_member(path: Path) -> None:
    """A header that announces a terabyte, and nothing behind it."""
    member = tarfile.TarInfo("sample000000000.behav.npy")
    member.size = 1 << 40
    path.write_bytes(member.tobuf() + bytes(1024))


def pickled_member(path: Path) -> None:
    np.save(path.with_suffix(".npy"), np.array([{}], dtype=object), allow_pickle=True)
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_suffix(".npy"), "sample000000000.behav.npy")


def linked_member(path: Path) -> None:
    member = tarfile.TarInfo("sample000000000.behav.npy")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "w") as archive:
        archive.addfile(member)


TAR = "wds/subj01/train/1.tar"
BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "betas-no-hdf5": (BETAS, lambda p: p.write_bytes(b"text")),
    "betas-cut-off": (BETAS, lambda p: p.write_bytes(p.read_bytes()[:9000])),
    "betas-other-key": (BETAS, edited("betas", lambda a: None)),
    "betas-doubles": (BETAS, edited("betas", lambda a: a.astype(np.float64))),
    "betas-three-axes": (BETAS, edited("betas", lambda a: a[..., None])),
    "indices-no-hdf5": (INDICES, lambda p: p.write_bytes(b"text")),
    "indices-without-subject": (INDICES, edited("subj01", lambda a: None)),
    "indices-from-1": (INDICES, edited("subj01", lambda a: np.where(a == a.max(), 73_000, a))),
    "indices-fractions": (INDICES, edited("subj01", lambda a: a + 0.5)),
    "pictures-missing": (PICTURES, lambda p: p.unlink()),
    "pictures-bytes": (PICTURES, edited("images", lambda a: (a * 255).astype(np.uint8))),
    "pictures-channels-last": (PICTURES, edited("images", lambda a: a.transpose(0, 2, 3, 1))),
    "pictures-fewer": (PICTURES, edited("images", lambda a: a[:-1])),
    "tar-no-tar": (TAR, lambda p: p.write_bytes(b"text" * 500)),
    "tar-cut-off": (TAR, lambda p: p.write_bytes(p.read_bytes()[:100_100])),
    "tar-huge-member": (TAR, huge_member),
    "tar-pickled-member": (TAR, pickled_member),
    "tar-linked-member": (TAR, linked_member),
    "tar-other-shape": (TAR, one_sample(np.zeros((3, 17)))),
    "tar-row-out-of-range": (TAR, one_sample(behav(5, N_TRIALS))),
    "tar-image-out-of-range": (TAR, one_sample(behav(73_000, 1400))),
    "tar-negative-row": (TAR, one_sample(behav(5, -7))),
    "tar-fractions": (TAR, one_sample(behav(5, 1400) + 0.5)),
    "tar-not-a-number": (TAR, one_sample(behav(5, 1400) * np.nan)),
    "tar-two-images": (TAR, lambda p: write_tar(p, [{"behav": behav(5, 1400)}, {"behav": behav(6, 1400)}])),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_that_names_it_and_the_remedy(tree, kind):
    name, spoil = BAD[kind]
    spoil(tree / name)
    plan = planned(tree)
    assert plan.problems
    assert any(str(tree / name) in problem for problem in plan.problems)
    for problem in plan.problems:
        assert "\n" not in problem
        assert "download" in problem or "remove" in problem


def test_all_that_is_amiss_is_told_at_once(tree, truth, shown):
    make_mindeye_subject(tree, "subj02", truth.of_trial[1, :N_TRIALS], truth.tested | truth.validated)
    kinds = ("betas-doubles", "pictures-missing")
    for kind in kinds:
        name, spoil = BAD[kind]
        spoil(tree / name)
    pickled_member(tree / "wds" / "subj02" / "train" / "0.tar")
    problems = planned(tree, design=tree / "absent.mat").problems
    for name in (*[BAD[kind][0] for kind in kinds], "wds/subj02/train/0.tar", "absent.mat"):
        assert sum(name in problem for problem in problems) == 1, problems


@pytest.mark.parametrize(
    "content", [np.zeros(73_000), np.zeros(1000, bool), np.array([{}])], ids=["float", "few", "pickle"]
)
def test_a_shared1000_that_is_something_else_is_a_problem(tree, design, content):
    np.save(tree / "shared1000.npy", content, allow_pickle=True)
    (problem,) = planned(tree, pixels=False, design=design).problems
    assert str(tree / "shared1000.npy") in problem
    assert "download" in problem


def test_pictures_outside_0_to_1_are_refused_when_they_are_read_and_nothing_is_half_written(tree):
    edited("images", lambda a: a * np.float16(255))(tree / PICTURES)
    store = PooledStore.create(tree.parent / "store.zarr", name="mindeye")
    with pytest.raises(ValueError, match=f"{PICTURES}: picture .* outside 0..1"):
        store.write_subject(the_subject(tree))
    assert (store.subjects, store.n_images) == ([], 0)


def test_an_image_that_is_shown_more_than_three_times_is_a_problem(tree, shown):
    write_indices(tree, {"subj01": np.where(np.arange(N_TRIALS) < 200, 77, shown)})
    shutil.rmtree(tree / "wds")
    (problem,) = planned(tree, pixels=False).problems
    assert "image 77 is in 200 trials" in problem
    assert INDICES in problem


def test_nothing_that_names_the_images_is_a_problem(tree):
    (tree / INDICES).unlink()
    shutil.rmtree(tree / "wds")
    (problem,) = planned(tree, pixels=False).problems
    assert BETAS in problem
    assert "--design" in problem


@pytest.mark.parametrize("subjects", [None, ("subj05",)], ids=["empty", "unknown"])
def test_a_subject_that_is_not_there_is_a_problem(tree, tmp_path, subjects):
    (tmp_path / "empty").mkdir()
    source = tmp_path / "empty" if subjects is None else tree
    (problem,) = planned(source, subjects=subjects, pixels=False).problems
    assert ("no betas_all_subj0X" if subjects is None else "'subj05' is not in") in problem
