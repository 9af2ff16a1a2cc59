"""The split: by image, the same for every subject, and never moved by what is added."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.splits import TEST_SHARE, VALIDATION_SHARE, fold_split, hash_fold, hash_part, split_images, split_of

identities = st.lists(st.text(min_size=1, max_size=12), unique=True, min_size=1, max_size=30)


@given(old=identities, new=identities)
def test_adding_images_moves_none(old, new):
    together = old + [identity for identity in new if identity not in old]
    before = split_images(old, [""] * len(old))
    after = split_images(together, [""] * len(together))
    np.testing.assert_array_equal(after.parts[: len(old)], before.parts)


@given(ids=identities, data=st.data())
def test_the_part_is_the_identitys_whatever_its_row(ids, data):
    order = data.draw(st.permutations(range(len(ids))))
    split = split_images(ids, [""] * len(ids))
    shuffled = split_images([ids[k] for k in order], [""] * len(ids))
    np.testing.assert_array_equal(shuffled.parts, split.parts[list(order)])
    assert shuffled.digest == split.digest


def test_the_shares_are_those_announced():
    parts = np.array([hash_part(f"image {k}") for k in range(20_000)])
    assert np.mean(parts == "test") == pytest.approx(TEST_SHARE, abs=0.01)
    assert np.mean(parts == "validation") == pytest.approx(VALIDATION_SHARE, abs=0.01)


def test_the_hash_is_the_same_in_every_version():
    found = {part: [k for k in range(24) if hash_part(f"sha256:{k}") == part] for part in ("test", "validation")}
    assert found == {"test": [1], "validation": [9, 14, 15, 16, 22]}


def test_a_prescribed_split_has_the_first_word():
    ids = [f"image {k}" for k in range(50)]
    roles = ["test", "validation", "train"] + [""] * 47
    split = split_images(ids, roles)
    assert split.parts[:3].tolist() == ["test", "validation", "train"]
    assert split.parts[3:].tolist() == [hash_part(identity) for identity in ids[3:]]
    assert split.rule == "design, else hash"
    assert split_images(ids[:3], roles[:3]).rule == "design"
    assert split_images(ids, [""] * 50).rule == "hash"


def test_the_digest_names_what_is_held_out():
    ids = ["a", "b", "c"]
    base = split_images(ids, ["train", "test", "validation"]).digest
    assert split_images(["other", "b", "c"], ["train", "test", "validation"]).digest == base
    assert split_images(ids, ["train", "validation", "test"]).digest != base


def test_the_digest_of_what_a_subject_saw_stays_when_another_subject_is_added(store, make_block, make_subject):
    seen, before = store.subject("subj01").image, split_of(store)
    rows = store.add_images(make_block([f"new-{k}" for k in range(40)], ["test", "train"] * 20))
    store.add_subject(make_subject("subj03", rows))
    after = split_of(store)
    assert after.digest != before.digest
    assert after.digest_of(seen) == before.digest_of(seen) == before.digest_of(np.unique(seen)[::-1])
    assert after.digest_of(rows) != after.digest_of(seen)


def test_the_digest_of_images_follows_their_parts_and_identities_and_not_their_rows():
    ids, roles = ["a", "b", "c"], ["train", "test", "validation"]
    rows = np.arange(3)
    base = split_images(ids, roles).digest_of(rows)
    assert split_images(["x", "c", "a", "b"], ["test", "validation", "train", "test"]).digest_of(rows + 1) == base
    for k, role in enumerate(("test", "train", "train")):
        assert split_images(ids, [*roles[:k], role, *roles[k + 1 :]]).digest_of(rows) != base
    assert split_images(["other", "b", "c"], roles).digest_of(rows) != base


def test_a_store_without_images_has_an_empty_split():
    split = split_images([], [])
    assert len(split.parts) == 0
    assert (split.parts == "train").sum() == 0


def test_trials_are_selected_by_their_images_part(store):
    split = split_of(store)
    image = store.subject(1).image
    parts = [split.select(image, part) for part in ("train", "validation", "test")]
    np.testing.assert_array_equal(np.sum(parts, axis=0), 1)
    np.testing.assert_array_equal(split.select(image, "train", "test"), parts[0] | parts[2])


# -- folds -------------------------------------------------------------------------------------------------------------


@given(ids=identities, n_folds=st.integers(2, 7))
def test_folds_are_disjoint_and_cover_every_image_whatever_its_prescribed_part(ids, n_folds):
    split = split_images(ids, ["test"] * len(ids))
    tested = [fold_split(split, k, n_folds).parts == "test" for k in range(n_folds)]
    np.testing.assert_array_equal(np.sum(tested, axis=0), 1)


@given(old=identities, new=identities)
def test_adding_images_moves_none_to_another_fold(old, new):
    together = old + [identity for identity in new if identity not in old]
    for k in range(3):
        before, after = (fold_split(split_images(ids, [""] * len(ids)), k, 3) for ids in (old, together))
        np.testing.assert_array_equal(after.parts[: len(old)], before.parts)


def test_outside_the_fold_the_hash_says_who_validates_and_all_others_train():
    ids = [f"image {k}" for k in range(400)]
    split = split_images(ids, ["validation"] * 200 + ["test"] * 200)
    folds = [fold_split(split, k, 4) for k in range(4)]
    for fold in folds:
        assert fold.ids == split.ids
        for identity, part in zip(ids, fold.parts.tolist(), strict=True):
            assert part in ("test", "validation" if hash_part(identity) == "validation" else "train")
    assert sum((fold.parts == "validation").sum() for fold in folds) > 3 * 0.05 * len(ids)


def test_folds_are_of_one_size_and_independent_of_the_hashed_part():
    ids = [f"image {k}" for k in range(20_000)]
    fold = np.array([hash_fold(identity, 5) for identity in ids])
    tests = np.array([hash_part(identity) == "test" for identity in ids])
    for k in range(5):
        assert np.mean(fold == k) == pytest.approx(0.2, abs=0.01)
        assert np.mean(tests[fold == k]) == pytest.approx(TEST_SHARE, abs=0.02)


def test_the_folds_hash_is_the_same_in_every_version():
    assert [hash_fold(f"sha256:{k}", 5) for k in range(12)] == [4, 2, 2, 3, 3, 4, 2, 2, 1, 0, 1, 4]


def test_the_digest_tells_the_folds_rule():
    split = split_images(["a", "b", "c", "d"], [""] * 4)
    folds = [fold_split(split, k, n) for n in (2, 3) for k in range(n)]
    assert len({fold.digest for fold in folds} | {split.digest}) == 6
    assert folds[0].rule == "fold 0 of 2 by hash, manybrains folds 1"
    assert fold_split(split_images(["a", "b", "c", "d"], ["train"] * 4), 0, 2).digest == folds[0].digest


def test_a_fold_that_does_not_exist_is_refused():
    split = split_images(["a", "b"], ["", ""])
    with pytest.raises(ValueError, match="n_folds is 1; cross-validation needs at least 2"):
        fold_split(split, 0, 1)
    for k in (-1, 5):
        with pytest.raises(ValueError, match=f"fold {k} doesn't exist; 5 folds are counted from 0 to 4"):
            fold_split(split, k, 5)
