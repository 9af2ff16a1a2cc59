"""Cards: what they say is what was given; tags are their numbers; a stranger's words stay words."""

import json
import re

import pytest

from foundation.evaluation.compare import headline
from foundation.evaluation.score import Scores
from foundation.tracking.cards import card_text, checked_card, differences, make_card, read_card, tags_of, write_card
from tests.planted_scores import planted_versions

LINEAGE = {
    "backbone": "tiny/1",
    "sessions": 3,
    "split_digest": "sha256:split",
    "encoder": {"name": "gabor", "source": "gabor", "spec": {"depths": [1]}, "revision": None},
    "recipe": {"optim": {"lr": 0.1, "notes": "x" * 400}},
    "composition": {"network": 0.4, "ridge": 0.6},
}


def card(noise: dict[str, float] | None = None, **lineage) -> dict:
    scores = planted_versions(noise or {"subj05": 0.3})
    subjects = list(noise or {"subj05": 0.3})
    kind = "adapter" if len(subjects) == 1 else "backbone"
    return make_card(name="tiny.subj05", kind=kind, subjects=subjects, lineage=LINEAGE | lineage, scores=scores)


def test_a_card_on_disk_is_what_was_given_with_a_figure(tmp_path):
    made = card()
    write_card(made, tmp_path / "card")
    assert read_card(tmp_path / "card") == made
    assert made["composition"] == LINEAGE["composition"]
    assert made["lineage"] == {key: value for key, value in LINEAGE.items() if key != "composition"}
    systems = {row["system"] for row in made["scores"]}
    assert systems == {"manybrains", "ridge", "zero", "mean", "ceiling"}
    assert all(row["value"] is not None for row in made["scores"])
    assert (tmp_path / "card" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "card" / "card.md").read_text() == card_text(made)


def test_a_model_that_was_not_scored_has_a_card_without_numbers(tmp_path):
    made = make_card(name="tiny", kind="backbone", subjects=["subj01"], lineage={}, scores=Scores((), ()))
    write_card(made, tmp_path / "card")
    assert "It was not scored." in (tmp_path / "card" / "card.md").read_text()
    assert not (tmp_path / "card" / "figure.png").exists()
    assert tags_of(made) == {"subjects": "subj01"}


def test_tags_are_the_headline_per_subject_and_over_them_and_the_plain_lineage():
    scores = planted_versions({"subj01": 0.3, "subj02": 0.9})
    made = make_card(name="tiny", kind="backbone", subjects=["subj01", "subj02"], lineage=LINEAGE, scores=scores)
    tags, numbers = tags_of(made), headline(scores)
    assert tags["protocol"] == "strict"
    assert float(tags["test_voxel_r"]) == pytest.approx(numbers["test/voxel_r"], abs=1e-6)
    assert float(tags["test_pattern_r"]) == pytest.approx(numbers["test/pattern_r"], abs=1e-6)
    for subject in ("subj01", "subj02"):
        expected = numbers[f"test/voxel_r/subject/{subject}"]
        assert float(tags[f"test_voxel_r.{subject}"]) == pytest.approx(expected, abs=1e-6)
    assert tags["backbone"] == "tiny/1"
    assert tags["sessions"] == "3"
    assert tags["encoder.name"] == "gabor"
    assert not {"recipe", "encoder", "composition", "encoder.revision"} & tags.keys()


def test_the_text_has_every_system_with_intervals_and_how_to_use_it():
    text = card_text(card())
    ours = next(line for line in text.splitlines() if "`all` | `manybrains`" in line)
    assert re.search(r"\| \d\.\d{3} \[\d\.\d{3} \d\.\d{3}\] \|", ours)
    for system in ("zero", "mean", "ridge", "ceiling"):
        assert f"| `subj05` | `early` | `{system}` |" in text
    assert "python -m foundation.predict --subject subj05 IMAGES... --adapter tiny.subj05 --out FILE.npy" in text
    assert "`network`: `0.4`" in text
    assert "`recipe`: in `card.json`" in text
    assert "their data set: see its terms" in text


def test_of_several_subjects_the_text_has_all_voxels_alone():
    text = card_text(card({"subj01": 0.3, "subj02": 0.5}))
    assert "| `subj02` | `all` | `manybrains` |" in text
    assert "`early`" not in text


def test_words_can_not_become_markup():
    hostile = card(store="![x](http://evil/pixel.png) <script> `code` | cell\nnew line")
    line = next(line for line in card_text(hostile).splitlines() if line.startswith("- `store`"))
    assert line == "- `store`: `![x](http://evil/pixel.png) <script> 'code' / cell new line`"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "no model card"),
        ({"format_version": 2}, "card format 2; this manybrains reads 1"),
        ({"kind": "virus"}, "kind of the card can't be read"),
        ({"name": "../up"}, "a model's name '../up' must start"),
        ({"name": 3}, "name of the card"),
        ({"subjects": ["a/b"]}, "must start with a letter"),
        ({"subjects": [5]}, "subjects of the card"),
        ({"lineage": {"../key": 1}}, "must start with a letter"),
        ({"lineage": []}, "lineage of the card"),
        ({"lineage": {"test_voxel_r.subj05": "0.9"}}, "a tag of another meaning"),
        ({"lineage": {"imported_from": "x"}}, "a tag of another meaning"),
        ({"lineage": {"validation_voxel_r": "high"}}, "validation_voxel_r is 'high', no number"),
        ({"lineage": {"validation_voxel_r": []}}, "validation_voxel_r is"),
        ({"composition": "x"}, "composition of the card"),
        ({"scores": [{"system": "x"}]}, "lacks an entry"),
        ({"scores": [[]]}, "lacks an entry"),
        ({"notes": [1]}, "notes of the card"),
    ],
)
def test_a_card_that_is_none_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        checked_card(card() | change, "x.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"value": "high"}, {"value": float("inf")}, {"n_images": -1}, {"system": "x" * 1000}, {"subject": "../x"}],
)
def test_a_score_that_is_none_is_refused(change):
    made = card()
    made["scores"][0] |= change
    with pytest.raises(ValueError, match=r"of a score is|must start with a letter"):
        checked_card(made, "x.safetensors")


def test_a_directory_without_a_card_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"card.json can't be read .*; register the model again"):
        read_card(tmp_path)


def test_only_what_differs_is_told():
    one, other = card(), json.loads(json.dumps(card(sessions=1, composition={"network": 0.1, "ridge": 0.6})))
    assert differences(one, one) == []
    assert differences(one, other) == [("sessions", "3", "1"), ("composition.network", "0.4", "0.1")]


def test_scores_that_differ_are_told_by_subject_roi_and_metric():
    found = differences(card({"subj05": 0.3}), card({"subj05": 0.9}))
    assert {what for what, *_ in found} >= {"subj05 all voxel r", "subj05 early voxel r", "subj05 all MSE"}
    assert not [what for what, *_ in found if "ridge" in what or "ceiling" in what]
    assert all(re.fullmatch(r"-?\d+\.\d{3}( \[.*\])?", text) for _, *texts in found for text in texts)
