"""Who may lead: no lower strict score on the same test images, unless forced; else it is said that nothing is known."""

import itertools

import pytest

from foundation.tracking.promotion import promote
from foundation.tracking.registry import Registered, aliases, find_version, register
from foundation.tracking.runs import TrackedRun

NAMES = (f"promoted{i}" for i in itertools.count())
SCORED = {"split_digest": "sha256:a", "protocol": "strict", "validation_voxel_r": "0.3", "sessions": "3"}


@pytest.fixture
def name() -> str:
    """A name that no other test registers."""
    return next(NAMES)


def registered(name: str, *, validation: str = "0.1", **scores: float | str) -> Registered:
    """Register a version that doesn't lead by itself, but for the first."""
    run = TrackedRun.start("run", kind="pretrain", config={}, tags={})
    tags = SCORED | {"validation_voxel_r": validation}
    for key, value in scores.items():
        tags |= {key: value} if isinstance(value, str) else {f"test_voxel_r.{key}": str(value)}
    return register(name, run, "model", kind="backbone", tags=tags, unproven_leads=False)


def test_a_version_that_scores_no_lower_takes_over_and_is_no_candidate_any_more(name):
    first = registered(name, validation="0.3", subj01=0.4, subj02=0.5)
    second = registered(name, subj01=0.5, subj02=0.4)
    assert aliases(second) == ["candidate"]
    told = promote(f"{name}@candidate")
    assert f"{name}/2 is champion now: it scores 0.4500 and the champion {name}/1 0.4500" in told
    assert "strict test voxel r, same split, subj01, subj02" in told
    assert (aliases(first), aliases(second)) == ([], ["champion"])


def test_a_version_that_scores_lower_is_refused_with_both_numbers_unless_forced(name):
    registered(name, validation="0.3", subj01=0.4)
    second = registered(name, subj01=0.39)
    with pytest.raises(ValueError, match=rf"{name}/2 scores 0\.3900 and the champion {name}/1 0\.4000 .*--force") as no:
        promote(f"{name}/2")
    assert "\n" not in str(no.value)
    assert aliases(second) == ["candidate"]
    assert "by force: it scores 0.3900" in promote(f"{name}/2", force=True)
    assert aliases(second) == ["champion"]


def test_only_subjects_that_both_were_scored_on_count(name):
    registered(name, validation="0.3", subj01=0.4, subj02=0.9)
    registered(name, subj01=0.5, subj07=0.0)
    assert "scores 0.5000 and the champion" in promote(f"{name}/2")


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"subj01": 0.1, "split_digest": "sha256:b"}, "they were scored on other splits"),
        ({"subj02": 0.1}, "they were scored on no common subject"),
        ({}, "/2 has no strict score"),
        ({"subj01": 0.1, "protocol": "chasm-legacy"}, "/2 has no strict score"),
        ({"test_voxel_r.subj01": "nan"}, "/2 has no strict score"),
    ],
    ids=["split", "subjects", "score", "protocol", "undefined"],
)
def test_what_can_not_be_compared_is_promoted_and_says_so(name, tags, why):
    registered(name, validation="0.3", subj01=0.4)
    registered(name, **tags)
    told = promote(f"{name}/2")
    assert f"in place of {name}/1, though the two can't be compared: " in told
    assert told.endswith(why)
    assert find_version(name).version == 2


def test_promoting_the_champion_says_that_it_is_champion_already(name):
    registered(name, subj01=0.4)
    assert promote(f"{name}/1") == promote(f"{name}@champion") == f"{name}/1 is champion already"


def test_other_aliases_are_free(name):
    registered(name, validation="0.3", subj01=0.4)
    second = registered(name, subj01=0.1)
    assert promote(f"{name}/2", alias="paper") == f"{name}/2 is paper now"
    assert aliases(second) == ["candidate", "paper"]
    assert find_version(f"{name}@paper").version == 2


@pytest.mark.parametrize("alias", ["latest", "Latest", "v3", "a/b", "", "a.b"])
def test_an_alias_that_mlflow_refuses_is_a_clear_error(name, alias):
    registered(name, subj01=0.4)
    with pytest.raises(ValueError, match="alias"):
        promote(f"{name}/1", alias=alias)


def test_a_name_alone_does_not_say_which_version_to_promote(name):
    registered(name, subj01=0.4)
    with pytest.raises(ValueError, match=f"'{name}' names no version; write {name}/VERSION"):
        promote(name)
