"""The arrays importer: what is in the files is in the store, and a bad file is one clear error and no store."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.encoders.gabor import GaborEncoder
from data.features import compute_features
from data.importers.arrays import plan_arrays
from data.importers.carry_out import carry_out, described
from data.importers.plan import SessionChoice
from data.noise_ceiling import ncsnr
from data.preprocess import n_sessions_of
from data.schema import pixel_identity
from data.splits import split_of
from data.store import PooledStore
from data.store.validate import validate

V4 = Path(__file__).resolve().parents[2] / "recordings" / "v4.json"
N, VOXELS = 12, 4


def pictures(n: int, *, first: int = 0, side: int = 6) -> np.ndarray:
    return np.stack([np.random.default_rng(first + k).integers(0, 256, (side, side, 3), np.uint8) for k in range(n)])


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_zip(path: Path, images: np.ndarray, name: str = "image{:04d}.png") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for k in reversed(range(len(images))):  # the order in the archive is not the order of the names
            archive.writestr(name.format(k + 1), png(images[k]))


def responses(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def source(tmp_path) -> Path:
    """One recording of twelve images, a row each."""
    path = tmp_path / "source"
    path.mkdir()
    np.save(path / "responses.npy", responses(N, VOXELS))
    write_zip(path / "images.zip", pictures(N))
    describe(path)
    return path


def describe(source: Path, *more: dict[str, Any], **entry: Any) -> None:
    first = {"subject": "A", "responses": "responses.npy", "images": "images.zip"} | entry
    (source / "recordings.json").write_text(json.dumps([first, *more]))


def target(source: Path) -> str:
    return str(source.parent / "store.zarr")


def imported(
    source: Path, *, store: str | None = None, tell: Callable[[str], None] = print, **options: Any
) -> PooledStore:
    return carry_out(plan_arrays(source, **options), store or target(source), importer="arrays 1", tell=tell)


# -- what comes in -----------------------------------------------------------------------------------------------------


def test_row_i_shows_image_i(source):
    store = imported(source)
    subject = PooledStore.open(target(source)).subject("A")
    np.testing.assert_array_equal(subject.responses(), responses(N, VOXELS))
    ids = store.image_ids()
    assert [ids[row] for row in subject.image] == [pixel_identity(p) for p in pictures(N)]
    assert subject.session is None
    assert subject.upstream_preprocessing is None


@pytest.mark.parametrize("kind", ["directory", "npy"])
def test_a_directory_or_an_array_of_pictures_is_the_same_as_a_zip(source, kind):
    if kind == "npy":
        np.save(source / "pictures.npy", pictures(N))
    else:
        (source / "pictures").mkdir()
        for k, picture in enumerate(pictures(N)):
            (source / "pictures" / f"{k:02d}.png").write_bytes(png(picture))
        (source / "pictures" / "notes.txt").write_text("not a picture")
        (source / "pictures" / "._00.png").write_text("left by macOS")
    before = imported(source).subject("A").digest
    describe(source, images="pictures.npy" if kind == "npy" else "pictures")
    assert imported(source, store=target(source) + "-2").subject("A").digest == before


def test_the_same_picture_in_two_recordings_is_one_image(source):
    other = np.concatenate([pictures(3, first=100), pictures(2)])
    write_zip(source / "other.zip", other)
    np.save(source / "other.npy", responses(5, 2, seed=1))
    describe(source, {"subject": "B", "responses": "other.npy", "images": "other.zip"})
    store = imported(source)
    assert store.n_images == N + 3
    ids = store.image_ids()
    assert [ids[row] for row in store.subject("B").image] == [pixel_identity(p) for p in other]


def test_the_same_picture_twice_in_a_recording_is_a_repeat(source):
    doubled = np.concatenate([pictures(N - 1), pictures(1)])
    write_zip(source / "images.zip", doubled)
    store = imported(source)
    assert store.n_images == N - 1
    image = store.subject("A").image
    assert image[0] == image[-1]


def test_a_table_of_trials_says_which_row_is_which(source):
    image, session, run = [3, 3, 0, 11], [1, 1, 2, 2], [1, 2, 1, 2]
    np.save(source / "responses.npy", responses(4, VOXELS))
    rows = zip(image, session, run, [1, 2, 1, 1], strict=True)
    text = "\n".join(",".join(map(str, row)) for row in rows)
    (source / "trials.csv").write_text("image,session,run,repeat\n" + text)
    describe(source, trials="trials.csv")
    store = imported(source)
    subject, ids = store.subject("A"), store.image_ids()
    assert [ids[row] for row in subject.image] == [pixel_identity(pictures(N)[k]) for k in image]
    np.testing.assert_array_equal(subject.session, session)
    np.testing.assert_array_equal(subject.trial_column("run"), run)
    np.testing.assert_array_equal(subject.trial_column("repeat"), [1, 2, 1, 1])


def test_a_named_column_counts_the_sessions(source):
    (source / "trials.csv").write_text("image,day\n" + "\n".join(f"{k},{1 + k // 6}" for k in range(N)))
    describe(source, trials="trials.csv", session_column="day")
    np.testing.assert_array_equal(imported(source).subject("A").session, np.repeat([1, 2], 6))


def test_an_axis_of_repeats_becomes_trials_without_the_missing_ones(source):
    cube = responses(N, VOXELS, 3)
    cube[0, :, 1:] = cube[5] = np.nan
    np.save(source / "responses.npy", cube)
    subject = imported(source).subject("A")
    assert subject.n_trials == N * 3 - 5
    np.testing.assert_array_equal(np.bincount(subject.image, minlength=N)[[0, 5, 6]], [1, 0, 3])
    for trial in (0, 4, 20):
        image, repeat = subject.image[trial], subject.trial_column("repeat")[trial]
        np.testing.assert_array_equal(subject.responses()[trial], cube[image, :, repeat])


@pytest.mark.parametrize(("size", "expected"), [(4, [4, 4, 4]), (5, [5, 7]), (8, [8, 4]), (9, [12]), (100, [12])])
def test_blocks_of_images_stand_in_for_sessions(source, size, expected):
    describe(source, blocks_of=size)
    subject = imported(source).subject("A")
    np.testing.assert_array_equal(np.unique(subject.session, return_counts=True)[1], expected)
    assert f"successive blocks of {size} images, not scan sessions" in subject.provenance["sessions"]


def test_averaged_data_say_so(source):
    describe(source, n_averaged=14, unit="spikes / 100 ms", upstream_preprocessing="averaged over about 14 repeats")
    subject = imported(source).subject("A")
    np.testing.assert_array_equal(subject.trial_column("n_averaged"), 14)
    assert subject.attrs["unit"] == "spikes / 100 ms"
    assert subject.upstream_preprocessing == "averaged over about 14 repeats"


def test_labels_are_text_and_an_empty_one_is_none(source):
    (source / "rois.csv").write_text("area,flag\nV1,1\n,2\nNA,\nV1,1\n")
    describe(source, rois="rois.csv")
    rois = imported(source).subject("A").rois
    np.testing.assert_array_equal(rois["area"].mask("V1"), [True, False, False, True])
    np.testing.assert_array_equal(rois["area"].mask("NA"), [False, False, True, False])
    np.testing.assert_array_equal(rois["flag"].mask("1"), [True, False, False, True])


def test_a_lone_family_may_have_voxels_without_a_label(source):
    (source / "rois.csv").write_text("area\nV1\n\n\nV2\n")
    describe(source, rois="rois.csv")
    rois = imported(source).subject("A").rois
    np.testing.assert_array_equal(rois["area"].labels, [1, 0, 0, 2])


def test_positions_come_in(source):
    np.save(source / "xyz.npy", np.arange(3 * VOXELS).reshape(VOXELS, 3))
    describe(source, coordinates="xyz.npy")
    np.testing.assert_array_equal(imported(source).subject("A").coordinates, np.arange(3 * VOXELS).reshape(VOXELS, 3))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int16, np.uint8])
def test_any_real_numbers_will_do(source, dtype):
    values = (responses(N, VOXELS) * 10 + 100).astype(dtype)
    np.save(source / "responses.npy", values)
    np.testing.assert_allclose(imported(source).subject("A").responses(), values, rtol=1e-6)


@pytest.mark.parametrize("repeats_axis", [1, 2])
def test_the_axis_of_repeats_may_come_second_as_in_the_papers_arrays(source, repeats_axis):
    cube = responses(N, VOXELS, 3).astype(np.float64)
    np.save(source / "responses.npy", cube.swapaxes(1, 2) if repeats_axis == 1 else cube)
    describe(source, repeats_axis=repeats_axis)
    subject = imported(source).subject("A")
    assert (subject.n_trials, subject.n_voxels) == (3 * N, VOXELS)
    np.testing.assert_allclose(subject.responses()[4], cube[1, :, 1], rtol=1e-6)


def in_pieces(source: Path, **entry: Any) -> np.ndarray:
    """The arrays of the paper's code: training and test images apart, (image, repeat, voxel) in double precision."""
    cube = responses(N, VOXELS, 3).swapaxes(1, 2).astype(np.float64)
    for name, part in (("train", slice(0, 8)), ("test", slice(8, None))):
        np.save(source / f"{name}_fmri.npy", cube[part])
        np.save(source / f"{name}_stim.npy", pictures(N)[part])
    pieces = {"responses": ["train_fmri.npy", "test_fmri.npy"], "images": ["train_stim.npy", "test_stim.npy"]}
    describe(source, **({"repeats_axis": 1} | pieces | entry))
    return cube


def test_training_and_test_images_may_come_in_files_of_their_own(source):
    cube = in_pieces(source, roles=["train", "test"])
    store = imported(source)
    subject = store.subject("A")
    assert store.image_roles() == ["train"] * 8 + ["test"] * 4
    assert [store.image_ids()[row] for row in subject.image] == [
        pixel_identity(p) for p in np.repeat(pictures(N), 3, 0)
    ]
    np.testing.assert_allclose(subject.responses(), cube.reshape(3 * N, VOXELS), rtol=1e-6)
    pixels = np.concatenate([found for _, _, found in store.pixels()])
    np.testing.assert_array_equal(pixels, pictures(N))


def by_session(source: Path) -> None:
    trials(source, "image,session\n" + "\n".join(f"{k},{1 + k // 4}" for k in range(N)))


def test_the_first_sessions_or_some_of_them_come_in_and_the_others_later(source):
    by_session(source)
    store = imported(source, sessions=SessionChoice(n=1))
    np.testing.assert_array_equal(store.subject("A").session, np.repeat(1, 4))
    imported(source, sessions=SessionChoice(numbered=(3,)))
    told: list[str] = []
    whole = imported(source, tell=told.append).subject("A")
    assert told == ["A: 1 session added, 4 trials"]
    np.testing.assert_array_equal(whole.responses(), responses(N, VOXELS))
    assert whole.digest == imported(source, store=target(source) + "-2").subject("A").digest


def test_sessions_that_are_not_there_are_refused(source):
    with pytest.raises(ValueError, match="A has no session index, so sessions can't be chosen"):
        imported(source, sessions=SessionChoice(n=1))
    by_session(source)
    with pytest.raises(ValueError, match=r"A has 3 sessions \(1-3\); --sessions 4 asks for more"):
        imported(source, sessions=SessionChoice(n=4))
    with pytest.raises(ValueError, match="A has no session 9; it has 1-3"):
        imported(source, sessions=SessionChoice(numbered=(1, 9)))


def test_pictures_may_stay_out(source):
    store = imported(source, pixels=False)
    assert store.image_ids() == [pixel_identity(p) for p in pictures(N)]
    with pytest.raises(ValueError, match="without pixels"):
        next(store.pixels())


def test_everything_works_on_a_store_that_is_a_url(source, request):
    url = f"memory://{request.node.name}/s.zarr"
    by_session(source)
    imported(source, store=url, sessions=SessionChoice(n=2))
    store = imported(source, store=url)
    compute_features(store, GaborEncoder(depths=(1,)))
    assert validate(url) == []
    local = imported(source)
    compute_features(PooledStore.open(target(source), writable=True), GaborEncoder(depths=(1,)))
    assert store.subject("A").digest == local.subject("A").digest
    rows = np.array([7, 0, 11])
    for there, here in zip(
        PooledStore.open(url).tokens("gabor").read(rows), local.tokens("gabor").read(rows), strict=True
    ):
        np.testing.assert_array_equal(there, here)


# -- again and again ---------------------------------------------------------------------------------------------------


def two_subjects(source: Path) -> None:
    np.save(source / "other.npy", responses(N, 2, seed=1))
    describe(source, {"subject": "B", "responses": "other.npy", "images": "images.zip"})


def test_only_the_subjects_asked_for_come_in_and_the_others_later(source):
    two_subjects(source)
    assert imported(source, subjects=("B",)).subjects == ["B"]
    told: list[str] = []
    store = imported(source, tell=told.append)
    assert store.subjects == ["A", "B"]
    assert told == ["A: 12 trials, 4 voxels, 12 images", "B: there already"]
    assert store.n_images == N


def test_an_import_that_died_can_be_run_again(source, monkeypatch):
    def dying(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data.store.pooled.commit_part", dying)
        with pytest.raises(KeyboardInterrupt):
            imported(source)
    died = PooledStore.open(target(source))
    assert (died.subjects, died.n_images) == ([], 0)
    store = imported(source)
    assert (store.subjects, store.n_images) == (["A"], N)
    np.testing.assert_array_equal(store.subject("A").responses(), responses(N, VOXELS))


def test_other_data_under_a_name_that_is_taken_are_refused(source):
    imported(source)
    two_subjects(source)
    np.save(source / "responses.npy", responses(N, VOXELS, seed=5))
    with pytest.raises(ValueError, match=r"'A' is in .* already with other data"):
        imported(source)
    assert PooledStore.open(target(source)).subjects == ["A"]


def test_a_conflict_with_the_store_is_found_before_anything_is_added(source, make_block):
    two_subjects(source)
    write_zip(source / "images2.zip", pictures(N, first=50))
    describe(source, {"subject": "B", "responses": "other.npy", "images": "images2.zip"})
    store = PooledStore.create(target(source), name="old")
    from data.sources import ImageBlock

    shared = pictures(1, first=50)
    store.add_images(ImageBlock(ids=[pixel_identity(shared[0])], roles=["test"], pixels=shared))
    with pytest.raises(ValueError, match="with role 'test', not ''"):
        imported(source)
    assert (store.subjects, store.n_images) == ([], 1)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_path_that_is_something_else_is_left_alone(source, kind):
    path = Path(target(source))
    if kind == "file":
        path.write_text("hello")
    else:
        path.mkdir()
        (path / "thesis.tex").write_text("hello")
    with pytest.raises(ValueError, match="is there but is not a manybrains store"):
        imported(source)
    assert path.is_file() or [f.name for f in path.iterdir()] == ["thesis.tex"]


def test_a_check_tells_good_from_bad_and_writes_nothing(source):
    describe(source, {"subject": "B", "responses": "absent.npy", "images": "images.zip"})
    plan = plan_arrays(source)
    assert [described(subject) for subject in plan.subjects] == ["A: 12 trials, 4 voxels, 12 images"]
    assert len(plan.problems) == 1
    assert "absent.npy does not exist" in plan.problems[0]
    assert not Path(target(source)).exists()


# -- bad input ---------------------------------------------------------------------------------------------------------


def trials(source: Path, text: str, **entry: Any) -> None:
    (source / "trials.csv").write_text(text)
    describe(source, trials="trials.csv", **entry)


def table(source: Path, text: str) -> None:
    (source / "recordings.json").write_text(text)


def saved(name: str, array: Any, **entry: Any) -> Callable[[Path], None]:
    def save(source: Path) -> None:
        np.save(source / name, array, allow_pickle=True)
        describe(source, **entry)

    return save


def zip_of(name: str) -> Callable[[Path], None]:
    return lambda source: write_zip(source / "images.zip", pictures(N), name)


def odd_size(source: Path) -> None:
    with zipfile.ZipFile(source / "images.zip", "a") as archive:
        archive.writestr("image9999.png", png(pictures(1, side=9)[0]))


def not_a_picture(source: Path) -> None:
    with zipfile.ZipFile(source / "images.zip", "a") as archive:
        archive.writestr("image9999.png", b"hello")


def truncated(source: Path) -> None:
    whole = (source / "responses.npy").read_bytes()
    (source / "responses.npy").write_bytes(whole[:-20])


def in_two_sizes(source: Path) -> None:
    write_zip(source / "other.zip", pictures(N, side=8))
    describe(source, {"subject": "B", "responses": "responses.npy", "images": "other.zip"})


def npz(source: Path) -> None:
    np.savez(source / "two.npz", a=np.ones(2))
    describe(source, responses="two.npz")


def rois(source: Path, text: str) -> None:
    (source / "rois.csv").write_text(text)
    describe(source, rois="rois.csv")


COLUMN = "".join(f"\n{k}" for k in range(N))
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no table": (lambda s: (s / "recordings.json").unlink(), r"recordings.json does not exist; .* needs it"),
    "not JSON": (lambda s: table(s, "[{"), "recordings.json is not JSON"),
    "not a list": (lambda s: table(s, '{"subject": "A"}'), "recordings.json must hold a list of objects"),
    "empty list": (lambda s: table(s, "[]"), "recordings.json must hold a list of objects"),
    "a key lacks": (lambda s: table(s, '[{"subject": "A"}]'), "recordings.json: a recording lacks 'images'"),
    "a key unknown": (lambda s: describe(s, respones="x"), "recordings.json: .*'respones' is unknown; known are"),
    "a name twice": (
        lambda s: describe(s, {"subject": "A", "responses": "responses.npy", "images": "images.zip"}),
        "recordings.json: a subject occurs more than once .*; join its trials",
    ),
    "a numeric name": (lambda s: describe(s, subject=5), "recordings.json: .*'subject' must be text, got 5; put it in"),
    "a dotted name": (
        lambda s: describe(s, subject="sub.1"),
        "responses.npy: .* must not contain a dot; write 'sub-1'",
    ),
    "a path as name": (
        lambda s: describe(s, subject="a/b"),
        "subject 'a/b' must start with a letter or digit and hold",
    ),
    "blocks of 0": (lambda s: describe(s, blocks_of=0), "recordings.json: .*'blocks_of' must be a whole number"),
    "blocks of text": (lambda s: describe(s, blocks_of="200"), "recordings.json: .*'blocks_of' must be .*got '200'"),
    "averaged 0": (lambda s: describe(s, n_averaged=0), "recordings.json: .*'n_averaged' must be a number of repeats"),
    "averaged how": (lambda s: describe(s, n_averaged=9), "responses.npy: .*upstream_preprocessing must say how"),
    "column alone": (lambda s: describe(s, session_column="day"), "recordings.json: .*give both or none"),
    "no responses": (lambda s: (s / "responses.npy").unlink(), "responses.npy does not exist; 'A' .* names it"),
    "no images": (lambda s: (s / "images.zip").unlink(), "images.zip does not exist; 'A' .* names it"),
    "truncated": (truncated, "responses.npy is not a readable .npy of numbers"),
    "pickled": (saved("responses.npy", np.array([{}])), "responses.npy is not a readable .npy of numbers"),
    "several arrays": (npz, "two.npz is an .npz of several arrays; save the one"),
    "text": (saved("responses.npy", np.full((N, VOXELS), "a")), "responses.npy must hold integers or floats, got <U1"),
    "complex": (saved("responses.npy", np.ones((N, VOXELS), complex)), "responses.npy must hold .* got complex128"),
    "one axis": (saved("responses.npy", np.ones(N)), r"responses.npy must be \(trial, voxel\) or .* got shape \(12,\)"),
    "no voxels": (saved("responses.npy", np.ones((N, 0))), "responses.npy: A: responses are empty"),
    "not finite": (saved("responses.npy", np.full((N, 2), np.inf)), "responses.npy: .* is not finite; drop or mask it"),
    "beyond single": (saved("responses.npy", np.full((N, 2), 1e300)), "responses.npy: .* is not finite"),
    "all repeats missing": (saved("responses.npy", np.full((N, 2, 3), np.nan)), "responses.npy: .*responses are empty"),
    "rows and images": (
        saved("responses.npy", np.ones((N - 1, 2))),
        "responses.npy has 11 rows but there are 12 images;",
    ),
    "repeats and images": (saved("responses.npy", np.ones((N - 1, 2, 3))), "responses.npy has responses to 11 images"),
    "roles too few": (
        lambda s: in_pieces(s, roles=["train"]),
        "'roles' must be a list of train, validation, test, one",
    ),
    "a role unknown": (lambda s: in_pieces(s, roles=["train", "dev"]), "'roles' must be a list of train, validation"),
    "pieces alone": (lambda s: in_pieces(s, images="images.zip"), "must be lists of the same length, piece by piece"),
    "pieces and trials": (lambda s: in_pieces(s, trials="t.csv"), "'trials' goes with one file of responses"),
    "a piece is a number": (lambda s: in_pieces(s, images=["train_stim.npy", 3]), "'images' must be text or a list of"),
    "a piece is missing": (lambda s: (in_pieces(s), (s / "test_fmri.npy").unlink()), "test_fmri.npy does not exist"),
    "pieces disagree": (
        lambda s: (in_pieces(s), np.save(s / "test_fmri.npy", np.ones((4, 3, 9)))),
        "test_fmri.npy has 9 voxels, .*train_fmri.npy 4; they must",
    ),
    "a picture in two roles": (
        lambda s: (in_pieces(s, roles=["train", "test"]), np.save(s / "test_stim.npy", pictures(4))),
        "can't be 'test' as well as 'train'; an image has one role",
    ),
    "not a zip": (lambda s: (s / "images.zip").write_text("hello"), "images.zip is neither a directory, an .npy nor a"),
    "an empty zip": (lambda s: write_zip(s / "images.zip", pictures(1)[:0]), "images.zip holds no picture; put some"),
    "not a picture": (not_a_picture, "images.zip:image9999.png is not a readable picture; replace or remove it"),
    "another size": (odd_size, r"images.zip:image9999.png is \(9, 9\) but the others are \(6, 6\); crop them"),
    "two sizes": (in_two_sizes, r"different sizes \[\(6, 6\), \(8, 8\)\]; crop them"),
    "numbers unpadded": (zip_of("image{}.png"), "images.zip: 'image12.png' comes before 'image2.png'.*pad the numbers"),
    "float pictures": (
        saved("p.npy", np.ones((N, 6, 6, 3)), images="p.npy"),
        r"p.npy must be uint8 \(image, height, width, 3\), got float64",
    ),
    "trials short": (lambda s: trials(s, "image\n1\n2"), "trials.csv has 2 rows, but there are 12 rows of responses;"),
    "trials empty": (lambda s: trials(s, ""), "trials.csv is not a readable CSV"),
    "trials without image": (lambda s: trials(s, "picture" + COLUMN), r"trials.csv has no column 'image'; it has"),
    "trials without session": (
        lambda s: trials(s, "image" + COLUMN, session_column="day"),
        "trials.csv has no column 'day', which session_column names; it has",
    ),
    "image beyond": (
        lambda s: trials(s, "image" + COLUMN.replace("11", "12")),
        "trials.csv: image 12 is not among the",
    ),
    "image from the end": (
        lambda s: trials(s, "image" + COLUMN.replace("5", "-1")),
        "trials.csv: image -1 is not among",
    ),
    "image missing": (
        lambda s: trials(s, "image,x" + COLUMN.replace("\n5", "\n,5")),
        "'image' must hold whole numbers",
    ),
    "session 0": (
        lambda s: trials(s, "image,session" + "".join(f"\n{k},{k}" for k in range(N))),
        "responses.npy: A: sessions count from 1, got 0",
    ),
    "session a date": (
        lambda s: trials(s, "image,session" + "".join(f"\n{k},20190923" for k in range(N))),
        "trials.csv: column 'session' holds 20190923, beyond 32767; number them 1, 2, ... in order",
    ),
    "sessions and blocks": (
        lambda s: trials(s, "image,session" + "".join(f"\n{k},1" for k in range(N)), blocks_of=4),
        "trials.csv has a column 'session' of sessions, so 'blocks_of' must go",
    ),
    "labels short": (lambda s: rois(s, "area\nV1\nV2"), "rois.csv has 2 rows, but there are 4 voxels; give one row"),
    "a family's name": (lambda s: rois(s, "a/b\n1\n2\n3\n4"), "ROI family 'a/b' must start with"),
    "positions flat": (
        saved("xyz.npy", np.ones((VOXELS, 2)), coordinates="xyz.npy"),
        r"xyz.npy must be \(4, 3\), a position in mm for every voxel, got \(4, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_leaves_no_store(source, case):
    spoil, message = BAD[case]
    spoil(source)
    with pytest.raises(ValueError, match=message) as caught:
        imported(source)
    assert "\n" not in str(caught.value)
    assert not Path(target(source)).exists()


def test_a_bad_second_recording_leaves_no_store(source):
    describe(source, {"subject": "B", "responses": "absent.npy", "images": "images.zip"})
    with pytest.raises(ValueError, match=r"absent.npy does not exist"):
        imported(source)
    assert not Path(target(source)).exists()


def test_a_subject_that_is_not_listed_is_told_who_is(source):
    with pytest.raises(ValueError, match=r"subject 'C' is not in .*recordings.json; it has A"):
        imported(source, subjects=("A", "C"))
    with pytest.raises(ValueError, match="no subject is named"):
        imported(source, subjects=())
    assert not Path(target(source)).exists()


# -- real recordings ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_recordings_come_in(shared_data, tmp_path):
    store = imported(shared_data / "v4", store=str(tmp_path / "v4.zarr"), table=V4)
    assert store.subjects == ["PE201025", "PE210224", "PE210325", "WE190923"]
    shapes = {name: (store.subject(name).n_voxels, n_sessions_of(store.subject(name))) for name in store.subjects}
    assert shapes == {"WE190923": (33, 6), "PE201025": (89, 6), "PE210224": (67, 4), "PE210325": (50, 3)}
    assert store.n_images <= 1200 + 1200 + 800 + 640
    averaged = np.load(shared_data / "v4" / "responses_WE190923.npy")
    np.testing.assert_array_equal(store.subject("WE190923").responses(), averaged)
    single = store.subject("PE210325")
    assert set(np.bincount(single.image - single.image.min())) <= set(range(6, 11))
    assert np.nanmedian(ncsnr(single.responses(), single.image)) > 0.2, "neurons answer the pictures"
    means = np.load(shared_data / "v4" / "responses_PE210325.npy")
    first = single.responses()[single.image == single.image[0]].mean(0)
    np.testing.assert_allclose(first, means[0], atol=1e-4)
    parts = split_of(store).parts
    assert 0.12 < np.mean(parts == "test") < 0.18
    told: list[str] = []
    imported(shared_data / "v4", store=str(tmp_path / "v4.zarr"), table=V4, tell=told.append)
    assert all(line.endswith("there already") for line in told)
