"""A sentence about a model counts and names subjects, and says where it doesn't beat a baseline."""

from foundation.evaluation.report.verdicts import verdict
from foundation.evaluation.score import Comparison


def compared(subject: str, difference: float, low: float | None, high: float | None, **other: str) -> Comparison:
    place = {"roi": "all", "axis": "voxel", "target": "mean", "metric": "r"} | other
    return Comparison(
        system="ours", versus="ridge", subject=subject, difference=difference, low=low, high=high, p_value=0.5,
        test="bootstrap over images", **place,
    )  # fmt: skip


def test_above_on_all_subjects():
    found = [compared("subj01", 0.1, 0.05, 0.15), compared("subj02", 0.2, 0.1, 0.3)]
    assert verdict(found, "ours", "ridge") == (
        "ours is above ridge on 2 of 2 subjects (subj01 +.100 [+.050 +.150]; subj02 +.200 [+.100 +.300])."
    )


def test_a_subject_whose_interval_includes_zero_is_named_as_not_beaten():
    found = [compared("subj01", 0.1, 0.05, 0.15), compared("subj02", 0.01, -0.02, 0.04)]
    told = verdict(found, "ours", "ridge")
    assert told is not None
    assert "above ridge on 1 of 2 subjects" in told
    assert "does not beat ridge on subj02: the interval includes 0 (subj02 +.010 [-.020 +.040])" in told


def test_below_is_said_as_plainly():
    told = verdict([compared("subj01", -0.1, -0.2, -0.05)], "ours", "ridge")
    assert told == ("ours is above ridge on 0 of 1 subjects; it is below ridge on 1 (subj01 -.100 [-.200 -.050]).")


def test_without_intervals_nothing_is_claimed():
    told = verdict([compared("subj01", 0.1, None, None)], "ours", "ridge")
    assert told == "ours is above ridge on 0 of 1 subjects; no interval could be made on subj01."


def test_other_rois_axes_and_systems_have_no_say():
    others = [compared("subj01", 0.1, 0.05, 0.15, roi="early"), compared("subj01", 0.1, 0.05, 0.15, axis="pattern")]
    assert verdict(others, "ours", "ridge") is None
    assert verdict([compared("subj01", 0.1, 0.05, 0.15)], "ours", "zero") is None
