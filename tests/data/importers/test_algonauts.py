"""The Algonauts importer: what the challenge published is in the store, and what is amiss is told all at once."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.importers import algonauts
from data.importers.algonauts import plan_algonauts
from data.importers.plan import ImportPlan, SessionChoice
from data.store import PooledStore
from data.voxels import Surface
from tests.algonauts_tree import COUNTS, FSAVERAGE, NAMES, make_algonauts_subject, picture
from tests.nsd_tree import DesignTruth, make_design, write_expdesign

IDS = [3, 12, 13, 512, 40_000, 72_998, 7, 100, 101]
SPLIT, MASKS = "training_split/training_fmri", "roi_masks"
PICTURES = "training_split/training_images"


@pytest.fixture
def tree(tmp_path) -> Path:
    """One subject of nine images, in no order of their ids."""
    make_algonauts_subject(tmp_path / "challenge", "subj01", IDS)
    return tmp_path / "challenge"


def planned(tree: Path, *, choice: SessionChoice | None = None, **options) -> ImportPlan:
    return plan_algonauts(tree, **{"subjects": None, **options}, sessions=choice or SessionChoice())


def imported(tree: Path, **options) -> PooledStore:
    plan = planned(tree, **options)
    assert plan.problems == []
    store = PooledStore.create(tree.parent / "store.zarr", name="algonauts")
    for source in plan.subjects:
        store.write_subject(source)
    return PooledStore.open(store.path)


def published(tree: Path, subject: str = "subj01") -> np.ndarray:
    sides = [np.load(tree / subject / SPLIT / f"{side}_training_fmri.npy") for side in ("lh", "rh")]
    return np.hstack(sides)


# -- what comes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 150, 1 << 20])
def test_every_row_is_the_response_to_the_image_that_its_picture_names(tree, monkeypatch, block_bytes):
    monkeypatch.setattr(algonauts, "_BLOCK_BYTES", block_bytes)
    store = imported(tree)
    subject = store.subject("subj01")
    np.testing.assert_array_equal(subject.responses(), published(tree))
    ids = store.image_ids()
    assert [ids[row] for row in subject.image] == [f"nsd-{i:05d}" for i in IDS]
    assert subject.session is None
    assert subject.attrs["unit"] == "z"
    assert subject.upstream_preprocessing == "z-scored per session and averaged over repeats (Algonauts 2023)"
    assert "test images" in subject.provenance["left_out"]


def test_the_pictures_are_those_of_the_files(tree):
    store = imported(tree)
    pixels = np.concatenate([batch for _, _, batch in store.pixels()])
    by_id = dict(zip(store.image_ids(), pixels, strict=True))
    for nsd_id in IDS:
        np.testing.assert_array_equal(by_id[f"nsd-{nsd_id:05d}"], picture(nsd_id))


def test_without_pixels_only_identities_come_in(tree):
    store = imported(tree, pixels=False)
    assert store.n_images == len(IDS)
    with pytest.raises(ValueError, match="without pixels"):
        next(store.pixels())


def test_each_response_lies_at_its_vertex_of_fsaverage(tree):
    voxels = imported(tree).subject("subj01").voxels
    assert isinstance(voxels.place, Surface)
    assert voxels.place.n_vertices == (FSAVERAGE, FSAVERAGE)
    # fsaverage-space labels are another file of the challenge: painted on the surface, ours must give the same map.
    for family in NAMES:
        for k, side in enumerate(COUNTS):
            here = voxels.place.hemisphere == k
            painted = np.zeros(FSAVERAGE, np.int64)
            painted[voxels.place.vertex[here]] = voxels.rois[family].labels[here]
            np.testing.assert_array_equal(
                painted, np.load(tree / "subj01" / MASKS / f"{side}.{family}_fsaverage_space.npy")
            )


def test_labels_have_the_names_of_the_mapping_and_unknown_is_none(tree):
    rois = imported(tree).subject("subj01").rois
    assert {family: list(found.names.values()) for family, found in rois.items()} == NAMES
    labels = np.load(tree / "subj01" / MASKS / "rh.streams_challenge_space.npy")
    np.testing.assert_array_equal(rois["streams"].mask("ventral")[COUNTS["lh"] :], labels == 5)


def test_subjects_share_images_and_keep_their_own_rows(tree):
    make_algonauts_subject(tree, "subj06", [100, 5, 3], seed=6)
    store = imported(tree)
    assert store.subjects == ["subj01", "subj06"]
    assert store.n_images == len(IDS) + 1
    np.testing.assert_array_equal(store.subject(6).responses(), published(tree, "subj06"))


def test_only_the_named_subjects_are_planned(tree):
    make_algonauts_subject(tree, "subj06", [100, 5, 3], seed=6)
    assert [source.name for source in planned(tree, subjects=("subj06",)).subjects] == ["subj06"]


def test_a_second_import_finds_everything_there(tree):
    store = PooledStore.open(imported(tree).path, writable=True)
    assert store.write_subject(planned(tree).subjects[0]) == []


def test_files_left_by_macos_are_no_pictures(tree):
    (tree / "subj01" / PICTURES / "._train-0001_nsd-00003.png").write_text("left by macOS")
    assert planned(tree).problems == []


# -- sessions, roles, repeats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [SessionChoice(n=3), SessionChoice(numbered=(1, 2))], ids=["first-n", "numbered"])
def test_a_choice_of_sessions_is_refused_since_there_is_no_session_index(tree, choice):
    (problem,) = planned(tree, choice=choice).problems
    assert "no session index" in problem
    assert str(tree) in problem


def test_without_the_design_a_hash_splits_and_three_repeats_are_taken_for_granted_and_told(tree):
    plan = planned(tree)
    (source,) = plan.subjects
    assert source.images.roles == [""] * len(IDS)
    assert (source.sessions[0].columns["n_averaged"] == 3).all()
    assert any("--design" in warning and "hash" in warning for warning in plan.warnings)
    assert source.provenance["n_averaged"] == "nominal"


def with_design(tmp_path: Path, n_sessions: int) -> tuple[Path, Path, DesignTruth, list[int]]:
    """The challenge, the design file, its truth, and a subject's ids: all images of its first sessions."""
    truth = make_design()
    shown = truth.of_trial[1, : n_sessions * truth.trials_per_session]
    ids = sorted(set(shown.tolist()), key=lambda i: (i % 7, i))
    make_algonauts_subject(tmp_path / "challenge", "subj02", ids)
    return tmp_path / "challenge", write_expdesign(tmp_path, truth), truth, ids


@pytest.mark.parametrize("n_sessions", [1, 5, 20])
def test_with_the_design_each_row_tells_how_many_presentations_it_is_the_mean_of(tmp_path, n_sessions):
    tree, design, truth, ids = with_design(tmp_path, n_sessions)
    plan = planned(tree, design=design)
    assert (plan.problems, plan.warnings) == ([], [])
    shown = truth.of_trial[1, : n_sessions * truth.trials_per_session].tolist()
    n_averaged = plan.subjects[0].sessions[0].columns["n_averaged"].tolist()
    assert n_averaged == [shown.count(i) for i in ids]
    assert n_sessions == 1 or len(set(n_averaged)) > 1


def test_with_the_design_the_roles_are_those_of_the_protocol(tmp_path):
    tree, design, truth, _ = with_design(tmp_path, 37)
    store = imported(tree, design=design)
    expected = dict.fromkeys(truth.tested, "test") | dict.fromkeys(truth.validated, "validation")
    ids = [int(identity.removeprefix("nsd-")) for identity in store.image_ids()]
    assert store.image_roles() == [expected.get(i, "train") for i in ids]
    assert set(store.image_roles()) == {"train", "validation", "test"}


def test_where_the_pictures_are_of_no_first_sessions_the_repeats_are_nominal_and_that_is_told(tmp_path):
    truth = make_design()
    make_algonauts_subject(tmp_path / "challenge", "subj02", sorted(set(truth.of_trial[1, [0, 100, 200]].tolist())))
    plan = planned(tmp_path / "challenge", design=write_expdesign(tmp_path, truth))
    assert plan.problems == []
    assert "mean of 3" in plan.warnings[0]
    assert (plan.subjects[0].sessions[0].columns["n_averaged"] == 3).all()


def test_where_the_last_session_can_not_be_told_the_repeats_are_nominal_and_that_is_told(tmp_path):
    truth = make_design()
    of_session = np.array_split(truth.of_trial[1], 40)
    seen = [set(np.concatenate(of_session[: n + 1]).tolist()) for n in range(40)]
    idle = next(n for n in range(1, 40) if seen[n] == seen[n - 1])  # it brings no new image
    tree, design, _, _ = with_design(tmp_path, idle)
    plan = planned(tree, design=design)
    assert "mean of 3" in plan.warnings[0]
    assert (plan.subjects[0].sessions[0].columns["n_averaged"] == 3).all()


def test_an_image_that_the_subject_never_saw_is_a_problem(tmp_path):
    truth = make_design()
    own = set(truth.of_trial[1, :18].tolist()) - truth.tested - truth.validated
    make_algonauts_subject(tmp_path / "challenge", "subj03", sorted(own))
    (problem,) = planned(tmp_path / "challenge", design=write_expdesign(tmp_path, truth)).problems
    assert "subj03" in problem
    assert "nsd_expdesign.mat" in problem


# -- what is missing or odd --------------------------------------------------------------------------------------------


def resaved(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch it-ran",)


FOURTH = f"{PICTURES}/train-0004_nsd-00512.png"
BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no-left": (f"{SPLIT}/lh_training_fmri.npy", lambda p: p.unlink()),
    "cut-off": (f"{SPLIT}/rh_training_fmri.npy", lambda p: p.write_bytes(p.read_bytes()[:-8])),
    "doubles": (f"{SPLIT}/lh_training_fmri.npy", lambda p: resaved(p, lambda a: a.astype(np.float64))),
    "three-axes": (f"{SPLIT}/lh_training_fmri.npy", lambda p: resaved(p, lambda a: a[..., None])),
    "pickled": (f"{SPLIT}/lh_training_fmri.npy", lambda p: np.save(p, [{}, None], allow_pickle=True)),
    "unequal-sides": (f"{SPLIT}/rh_training_fmri.npy", lambda p: resaved(p, lambda a: a[:-1])),
    "no-pictures": (PICTURES, shutil.rmtree),
    "missing-picture": (FOURTH, lambda p: p.unlink()),
    "missing-last-picture": (f"{PICTURES}/train-0009_nsd-00101.png", lambda p: p.unlink()),
    "renamed-picture": (FOURTH, lambda p: p.rename(p.with_name("dog.png"))),
    "same-image-twice": (FOURTH, lambda p: p.rename(p.with_name("train-0004_nsd-00012.png"))),
    "id-out-of-range": (FOURTH, lambda p: p.rename(p.with_name("train-0004_nsd-73000.png"))),
    "no-picture-at-all": (FOURTH, lambda p: p.write_text("not a picture")),
    "mask-of-fewer": (f"{MASKS}/lh.all-vertices_fsaverage_space.npy", lambda p: resaved(p, lambda a: a * 0)),
    "mask-of-fsaverage5": (f"{MASKS}/lh.all-vertices_fsaverage_space.npy", lambda p: resaved(p, lambda a: a[:10_242])),
    "short-labels": (f"{MASKS}/rh.streams_challenge_space.npy", lambda p: resaved(p, lambda a: a[1:])),
    "unnamed-label": (f"{MASKS}/rh.streams_challenge_space.npy", lambda p: resaved(p, lambda a: a * 0 + 8)),
    "no-dict": (f"{MASKS}/mapping_streams.npy", lambda p: np.save(p, np.arange(3))),
    "names-as-keys": (f"{MASKS}/mapping_streams.npy", lambda p: np.save(p, {"early": 1}, allow_pickle=True)),
    "malicious": (f"{MASKS}/mapping_streams.npy", lambda p: np.save(p, {1: Malicious()}, allow_pickle=True)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_that_names_it_and_the_remedy(tree, kind, monkeypatch):
    monkeypatch.chdir(tree.parent)
    name, spoil = BAD[kind]
    spoil(tree / "subj01" / name)
    plan = planned(tree)
    assert plan.subjects == []
    assert plan.problems
    for problem in plan.problems:
        assert "\n" not in problem
        assert str(tree / "subj01") in problem
        assert "download" in problem or "remove" in problem
    assert not (tree.parent / "it-ran").exists()


def test_all_that_is_amiss_is_told_at_once(tree):
    make_algonauts_subject(tree, "subj02", IDS)
    for name, spoil in (BAD["no-left"], BAD["renamed-picture"]):
        spoil(tree / "subj01" / name)
    for name, spoil in (BAD["unnamed-label"], BAD["mask-of-fewer"], BAD["unequal-sides"], BAD["names-as-keys"]):
        spoil(tree / "subj02" / name)
    plan = planned(tree, choice=SessionChoice(n=2), design=tree / "absent.mat")
    told = [
        "session index",
        "absent.mat",
        "lh_training_fmri",
        "dog.png",
        "rh_training_fmri.npy 8",
        "lh.all-vertices",
        "mapping_streams",
    ]
    told[4] = "rh_training_fmri.npy 8"
    assert all(any(part in problem for problem in plan.problems) for part in told), plan.problems
    assert len(plan.problems) == len(told)


def test_masks_and_families_that_are_absent_are_left_out_with_a_warning(tree):
    for name in ("lh.all-vertices_fsaverage_space", "mapping_streams", "rh.floc-words_challenge_space"):
        (tree / "subj01" / MASKS / f"{name}.npy").unlink()
    plan = planned(tree)
    assert plan.problems == []
    assert plan.subjects[0].voxels.place is None
    assert set(plan.subjects[0].voxels.rois) == set(NAMES) - {"streams", "floc-words"}
    for name in ("lh.all-vertices", "mapping_streams", "rh.floc-words"):
        assert sum(name in warning for warning in plan.warnings) == 1


@pytest.mark.parametrize("subjects", [None, ("subj01", "subj05")], ids=["empty", "unknown"])
def test_a_subject_that_is_not_there_is_a_problem(tree, tmp_path, subjects):
    (tmp_path / "empty").mkdir()
    (problem,) = planned(tmp_path / "empty" if subjects is None else tree, subjects=subjects).problems
    assert ("none of subj01" if subjects is None else "'subj05' is not in") in problem


def test_a_response_that_is_not_a_number_leaves_nothing_half_written(tree):
    resaved(tree / "subj01" / SPLIT / "rh_training_fmri.npy", lambda a: np.where(a == a[5, 2], np.nan, a))
    (source,) = planned(tree).subjects
    store = PooledStore.create(tree.parent / "store.zarr", name="algonauts")
    with pytest.raises(ValueError, match=f"trial 5, voxel {COUNTS['lh'] + 2} is not finite"):
        store.write_subject(source)
    assert (store.subjects, store.n_images) == ([], 0)
