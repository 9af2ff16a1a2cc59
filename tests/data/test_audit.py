"""The leakage audit passes what the protocol makes, and names every leak that is put in."""

from dataclasses import replace

import numpy as np
import pytest

from data.audit import audit_fit, audit_pictures
from data.parcels import make_parcels, parse_parcels
from data.preprocess import samples
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
    return {"ids": store.image_ids(), "split": split, "train": train, "validation": validation}


def moved(fit, part: str, **change):
    return fit | {part: fit[part] | {"subj02": replace(fit[part]["subj02"], **change)}}


def with_image(found, row):
    image = found.image.copy()
    image[0] = row
    return image


def test_an_honest_fit_passes(fit):
    audit_fit(**fit)
    audit_fit(**(fit | {"validation": {}}))


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
    return fit | {"parcels": {"subj02": made}}


def test_parcels_of_training_images_pass_and_so_do_those_that_look_at_none(fit):
    audit_fit(**functional_parcels(fit, fit["train"]["subj02"]))
    audit_fit(**(fit | {"parcels": {"subj02": make_parcels(parse_parcels("sequential:2"), VoxelTable(n_voxels=3))}}))


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


# -- one picture under two identities ----------------------------------------------------------------------------------


def with_pictures(tmp_path, make_block, same: list[tuple[int, int]]):
    """Twelve images in two blocks with a block without pixels between; the pairs in `same` show one picture."""
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    ids, roles = [f"i{k}" for k in range(12)], ["train", "validation", "test"] * 4
    block = make_block(ids, roles)
    for one, other in same:
        block.pixels[other] = block.pixels[one]
    for rows in (range(6), range(6, 12)):
        part = slice(rows[0], rows[-1] + 1)
        store.add_images(replace(block, ids=ids[part], roles=roles[part], pixels=block.pixels[part]))
        store.add_images(make_block([f"blind-{rows[0]}"], ["test"], pixels=False))
    return store, split_of(store)


def test_different_pictures_pass_and_so_do_equal_ones_in_one_part(tmp_path, make_block):
    audit_pictures(*with_pictures(tmp_path, make_block, same=[(0, 9), (1, 4)]))


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ((0, 2), r"'i0' \(train\) and 'i2' \(test\)"),
        ((3, 10), r"'i3' \(train\) and 'i10' \(validation\)"),
        ((7, 11), r"'i7' \(validation\) and 'i11' \(test\)"),
    ],
    ids=["train and test", "train and validation in two blocks", "validation and test"],
)
def test_one_picture_under_two_identities_in_two_parts_is_named(tmp_path, make_block, pair, named):
    with pytest.raises(ValueError, match=f"leakage audit of .*: 1 found: images {named} are one picture"):
        audit_pictures(*with_pictures(tmp_path, make_block, same=[pair]))


def test_every_such_picture_is_listed(tmp_path, make_block):
    with pytest.raises(ValueError, match=r"2 found: .*'i0'.*'i2'.*; .*'i3'.*'i10'"):
        audit_pictures(*with_pictures(tmp_path, make_block, same=[(0, 2), (3, 10)]))
