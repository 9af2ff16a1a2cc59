"""The leakage audit passes what the protocol makes, and names every leak that is put in."""

from dataclasses import replace

import numpy as np
import pytest

from data.audit import audit_fit, audit_trials
from data.parcels import make_parcels, parse_parcels
from data.preprocess import Preprocessing, samples, standardised_trials
from data.splits import split_of
from data.store import PooledStore
from data.voxels import VoxelTable


@pytest.fixture
def fit(store):
    """What an honest fit of subj01 (two sessions) and subj02 is given."""
    split = split_of(store)
    asked = {"subj01": 2, "subj02": None}
    train, validation = (
        {name: samples(store.subject(name), split, part, n_sessions=n) for name, n in asked.items()}
        for part in ("train", "validation")
    )
    parcels = {name: make_parcels(parse_parcels("sequential:2"), store.subject(name).voxels) for name in asked}
    pictures = store.picture_digests()
    assert len(pictures) == len(split.parts)
    given = {"ids": store.image_ids(), "split": split, "train": train, "validation": validation}
    return given | {"parcels": parcels, "pictures": pictures}


def moved(fit, part: str, **change):
    return fit | {part: fit[part] | {"subj02": replace(fit[part]["subj02"], **change)}}


def with_image(found, row):
    image = found.image.copy()
    image[0] = row
    return image


def test_an_honest_fit_passes(fit):
    audit_fit(**fit)
    audit_fit(**(fit | {"validation": {}, "parcels": {}}))


@pytest.mark.parametrize("stranger", ["validation", "test"])
def test_a_held_out_image_among_the_training_samples_is_named(fit, stranger):
    row = int(np.flatnonzero(fit["split"].parts == stranger)[0])
    bad = moved(fit, "train", image=with_image(fit["train"]["subj02"], row))
    message = rf"subj02: train samples show 1 images of another part: 'image-{row}' \({stranger}\)"
    with pytest.raises(ValueError, match=message):
        audit_fit(**bad)


@pytest.mark.parametrize("stranger", ["train", "test"])
def test_an_image_of_another_part_among_the_validation_samples_is_named(fit, stranger):
    row = int(np.flatnonzero(fit["split"].parts == stranger)[0])
    bad = moved(fit, "validation", image=with_image(fit["validation"]["subj02"], row))
    with pytest.raises(ValueError, match=f"subj02: validation samples show .*'image-{row}'"):
        audit_fit(**bad)


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("stranger", ["validation", "test"])
def test_statistics_from_held_out_trials_are_named(fit, part, stranger):
    row = np.flatnonzero(fit["split"].parts == stranger)[:1]
    used = np.append(fit[part]["subj02"].standardised_by, row)
    with pytest.raises(ValueError, match=rf"subj02: {part} samples are standardised by .*\({stranger}\)"):
        audit_fit(**moved(fit, part, standardised_by=used))


def test_one_identity_in_two_parts_is_named(fit):
    ids, split = list(fit["ids"]), fit["split"]
    train, test = (int(np.flatnonzero(split.parts == part)[0]) for part in ("train", "test"))
    ids[test] = ids[train]
    with pytest.raises(ValueError, match=f"image 'image-{train}' is in test and train"):
        audit_fit(**(fit | {"ids": ids}))


def test_an_identity_that_two_subjects_learn_and_choose_by_is_named(fit):
    """The same picture on two rows, of which one subject trains on the first and another validates on the second."""
    ids = list(fit["ids"])
    row, other = fit["train"]["subj01"].image[0], fit["validation"]["subj02"].image[0]
    ids[other] = ids[row]
    with pytest.raises(ValueError, match=f"1 images are both learned from and chosen by, such as 'image-{row}'"):
        audit_fit(**(fit | {"ids": ids}))


def functional_parcels(fit, given):
    """Parcels of subj02's three voxels by their responses in `given`."""
    voxels = VoxelTable(n_voxels=3, coordinates=np.eye(3, dtype=np.float32))
    made = make_parcels(parse_parcels("functional:2"), voxels, responses=given, split_digest=fit["split"].digest)
    return fit | {"parcels": fit["parcels"] | {"subj02": made}}


def test_parcels_of_training_images_pass_and_so_do_those_that_look_at_none(fit):
    audit_fit(**functional_parcels(fit, fit["train"]["subj02"]))
    audit_fit(**fit)


@pytest.mark.parametrize("stranger", ["validation", "test"])
def test_parcels_that_look_at_held_out_responses_are_named(fit, stranger):
    row = int(np.flatnonzero(fit["split"].parts == stranger)[0])
    honest = fit["train"]["subj02"]
    shown = replace(honest, image=with_image(honest, row))
    standardised = replace(honest, standardised_by=np.append(honest.standardised_by, row))
    for given in (shown, standardised):
        asked = functional_parcels(fit, given)
        with pytest.raises(ValueError, match=rf"subj02: parcels look at responses to .*'image-{row}' \({stranger}\)"):
            audit_fit(**asked)


def test_every_leak_is_listed(fit):
    row = np.flatnonzero(fit["split"].parts == "test")[:1]
    bad = moved(fit, "train", image=with_image(fit["train"]["subj02"], row[0]), standardised_by=row)
    with pytest.raises(ValueError, match=r"leakage audit: 2 found: .*; .*"):
        audit_fit(**bad)


def test_a_split_of_another_store_is_refused(fit):
    with pytest.raises(ValueError, match="the split has 60 images but the store 59"):
        audit_fit(**(fit | {"ids": fit["ids"][:-1]}))


# -- what the audit isn't told is a leak -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "validation"])
def test_statistics_of_unknown_origin_are_named(fit, part):
    message = f"1 found: subj02: {part} samples are standardised by images of unknown origin"
    with pytest.raises(ValueError, match=message):
        audit_fit(**moved(fit, part, standardised_by=None))


def test_parcels_of_unknown_origin_are_named(fit):
    asked = functional_parcels(fit, fit["train"]["subj02"])
    asked["parcels"]["subj02"] = replace(asked["parcels"]["subj02"], used_images=None)
    with pytest.raises(ValueError, match="1 found: subj02: parcels look at responses to images of unknown origin"):
        audit_fit(**asked)
    with pytest.raises(ValueError, match="1 found: subj02: parcels are of unknown origin"):
        audit_fit(**(fit | {"parcels": {"subj01": fit["parcels"]["subj01"]}}))


def test_what_a_fit_must_tell_cannot_be_left_out(fit):
    for name in ("parcels", "pictures"):
        with pytest.raises(TypeError, match=name):
            audit_fit(**{key: value for key, value in fit.items() if key != name})


# -- what standardised the trials that are scored ----------------------------------------------------------------------


@pytest.mark.parametrize("later", ["session", "first-n"])
def test_trials_as_the_protocol_makes_them_pass(store, later):
    split, subject = split_of(store), store.subject("subj01")
    for n_sessions in (None, 1):
        trials = standardised_trials(
            subject, split, n_sessions=n_sessions, preprocessing=Preprocessing(later_sessions=later)
        )
        audit_trials(split, trials)
        assert set(split.parts[trials.standardised_by]) == {"train"}
        assert (len(trials.later_standardised_by) > 0) == (n_sessions == 1 and later == "session")


@pytest.mark.parametrize(
    ("told", "stranger", "message"),
    [
        ("standardised_by", "validation", r"first N sessions are standardised by 1 images of .*\(validation\)"),
        ("standardised_by", "test", r"first N sessions are standardised by 1 images of another part: .*\(test\)"),
        ("later_standardised_by", "test", r"later sessions are standardised by 1 images of another part: .*\(test\)"),
        ("standardised_by", None, "first N sessions are standardised by images of unknown origin"),
        ("later_standardised_by", None, "later sessions are standardised by images of unknown origin"),
    ],
)
def test_trials_standardised_by_what_they_test_are_named(store, told, stranger, message):
    split = split_of(store)
    trials = standardised_trials(store.subject("subj01"), split, n_sessions=1)
    used = None if stranger is None else np.append(getattr(trials, told), np.flatnonzero(split.parts == stranger)[0])
    with pytest.raises(ValueError, match=f"1 found: subj01: trials of {'the ' if told[0] == 's' else ''}{message}"):
        audit_trials(split, replace(trials, **{told: used}))


# -- one picture under two identities ----------------------------------------------------------------------------------

N_PICTURES = 36


def with_pictures(tmp_path, make_block, make_subject, same: list[tuple[int, int]]):
    """A fit of a subject that saw the even images, in a store where the pairs in `same` show one picture.

    Another subject saw the odd ones; three images have no pixels, so that rows and pictures aren't numbered alike.
    """
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.add_images(make_block([f"blind-{k}" for k in range(3)], ["test"] * 3, pixels=False))
    ids, roles = (
        [f"i{k}" for k in range(N_PICTURES)],
        ["train", "train", "validation", "validation", "test", "test"] * 6,
    )
    block = make_block(ids, roles)
    for one, other in same:
        block.pixels[other] = block.pixels[one]
    rows = store.add_images(block)
    for name, seen in {"subj01": rows[::2], "subj02": rows[1::2]}.items():
        store.add_subject(make_subject(name, np.tile(seen, 2)))
    split = split_of(store)
    given = {part: {"subj01": samples(store.subject("subj01"), split, part)} for part in ("train", "validation")}
    return {"ids": store.image_ids(), "split": split, "parcels": {}, "pictures": store.picture_digests()} | given


def test_different_pictures_pass_and_so_do_equal_ones_in_one_part_or_out_of_the_fit(tmp_path, make_block, make_subject):
    """Of those that differ in their part, subj01 saw neither: 1 trains, 3 validates and 5 tests subj02 alone."""
    audit_fit(**with_pictures(tmp_path, make_block, make_subject, same=[(0, 6), (2, 9), (0, 7), (1, 5), (3, 11)]))


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ((0, 4), r"'i0' \(train\) and 'i4' \(test\)"),
        ((0, 5), r"'i0' \(train\) and 'i5' \(test\)"),
        ((1, 4), None),
        ((0, 3), r"'i0' \(train\) and 'i3' \(validation\)"),
        ((1, 2), r"'i1' \(train\) and 'i2' \(validation\)"),
        ((8, 11), r"'i8' \(validation\) and 'i11' \(test\)"),
    ],
    ids=[
        "one subject's train and test",
        "train and another subject's test",
        "another's train and one's test, of which the fit has neither",
        "train and another's validation",
        "another's train and validation",
        "validation and another's test",
    ],
)
def test_one_picture_under_two_identities_in_two_parts_does_not_reach_a_fit(
    tmp_path, make_block, make_subject, pair, named
):
    fit = with_pictures(tmp_path, make_block, make_subject, same=[pair])
    if named is None:
        audit_fit(**fit)
        return
    with pytest.raises(ValueError, match=f"leakage audit: 1 found: images {named} are one picture"):
        audit_fit(**fit)


def test_of_many_equal_pictures_one_of_each_part_is_named(tmp_path, make_block, make_subject):
    fit = with_pictures(tmp_path, make_block, make_subject, same=[(0, 1), (0, 6), (0, 12), (0, 17)])
    with pytest.raises(ValueError, match=r"1 found: images 'i0' \(train\) and 'i17' \(test\) are one picture"):
        audit_fit(**fit)


def test_every_such_picture_is_listed(tmp_path, make_block, make_subject):
    fit = with_pictures(tmp_path, make_block, make_subject, same=[(0, 4), (2, 11)])
    with pytest.raises(ValueError, match=r"2 found: .*'i0'.*'i4'.*; .*'i2'.*'i11'"):
        audit_fit(**fit)
