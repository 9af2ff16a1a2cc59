"""The rule by which specialisation is claimed, and the words for it."""

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from foundation.evaluation.area_losses import Differential
from foundation.evaluation.specialisation import REPLACEMENTS, bootstraps_needed, findings, holm, sentences
from foundation.evaluation.statistics import bootstrap_p


def differentials(subject="subj01", branch="patch", *, p=0.002, **changes) -> list[Differential]:
    """Early loses .2 more under every replacement; `changes` by replacement."""
    numbers = dict(difference=0.2, low=0.1, high=0.3, p_value=p)
    numbers |= dict(share_difference=0.4, share_low=0.2, share_high=0.6, share_p_value=p)
    numbers |= dict(versus_control=0.21, versus_low=0.11, versus_high=0.31, versus_p_value=p)
    return [
        Differential(subject=subject, branch=branch, intervention=name, **(numbers | changes.get(name, {})))
        for name in REPLACEMENTS
    ]


def test_holm_is_statsmodels_holm():
    p = np.random.default_rng(0).random(20) ** 3
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


def test_all_nine_differences_have_to_agree():
    (found,) = findings(differentials())
    assert found.favours == "early"
    flipped = {"difference": -0.01}
    (found,) = findings(differentials(shuffled=flipped))
    assert found.favours is None
    assert found.reason == "the replacements disagree (zero +.200, mean +.200, shuffled -.010)"
    (found,) = findings(differentials(zero={"share_difference": -0.1}))
    assert found.reason == "as a share of what is predicted at all, higher areas lose as much or more"
    (found,) = findings(differentials(mean={"versus_control": -0.1}))
    assert found.reason == "random directions make as large a difference"
    (found,) = findings(differentials(mean={"versus_p_value": 0.2}))
    assert found.reason == "adjusted p 0.2, of mean, beyond random directions"


def test_a_claim_has_to_stand_among_all_subjects_and_streams():
    alone = findings(differentials(p=0.02))
    assert alone[0].favours == "early"
    among = findings([d for k in range(4) for d in differentials(f"subj{k:02d}", p=0.02)])
    assert [f.favours for f in among] == [None] * 4


def test_resamples_that_could_never_reach_the_level_are_counted():
    assert 2 / (bootstraps_needed(16) + 1) * 16 <= 0.05
    assert 2 / bootstraps_needed(16) * 16 > 0.05


@pytest.mark.parametrize("n_units", [10, 25, 120])
def test_of_few_parcels_more_resamples_are_needed_as_the_smallest_p_is_larger(n_units):
    needed = int(bootstraps_needed(6, n_units=n_units))
    assert 6 * bootstrap_p(np.ones(needed), n_images=n_units) <= 0.05
    assert 6 * bootstrap_p(np.ones(needed - 1), n_images=n_units) > 0.05
    assert needed > bootstraps_needed(6)
    assert bootstraps_needed(6, n_units=5) == np.inf  # 34 million


def test_the_reason_says_where_so_few_resamples_could_never_make_a_claim():
    few = {name: {"n_units": 10, "n_resamples": 100} for name in REPLACEMENTS}
    (found,) = findings(differentials(p=0.06, **few))
    assert found.reason is not None
    assert "; 100 resamples of 10 images or parcels can't tell 1 tests from chance, " in found.reason
    enough = {name: {"n_units": 10, "n_resamples": 1000} for name in REPLACEMENTS}
    (found,) = findings(differentials(p=0.06, **enough))
    assert found.reason == "adjusted p 0.06, of zero, loss"


def test_a_control_that_takes_nearly_all_directions_bears_no_claim():
    for n, favours in ((153, "early"), (190, None)):
        taken = {name: {"n_removed": n, "n_directions": 192} for name in REPLACEMENTS}
        (found,) = findings(differentials(**taken))
        assert found.favours == favours
    assert found.reason == "the control isn't informative: matching takes 190 of 192 directions"


def test_without_shares_there_is_no_claim_and_no_order_of_them():
    none = dict.fromkeys(("share_difference", "share_low", "share_high", "share_p_value"))
    (found,) = findings(differentials(**dict.fromkeys(REPLACEMENTS, none)))
    assert found.reason == "shares are n/a, as an area's intact r isn't clear of 0"


def test_subjects_that_were_not_looked_at_are_counted():
    found = findings(differentials())
    assert "1 of the model's 8 subjects was looked at." in sentences(found, looked_at=(1, 8))[-1]
    assert "looked at" not in sentences(found, looked_at=(1, 1))[-1]
    assert sentences([], looked_at=(2, 8))[-1] == "2 of the model's 8 subjects were looked at."


@pytest.mark.parametrize("n", [1, 2])
def test_sentences_count_the_subjects_they_are_about(n):
    told = [d for k in range(n) for d in differentials(f"subj{k}")]
    told += differentials("subj9", p=0.9)
    told += [d for k in (*range(n), 9) for d in differentials(f"subj{k}", "cls", p=0.9)]
    cls, patch, both, caveat = sentences(findings(told))
    assert cls.startswith("No intervention-based evidence that the CLS stream")
    assert f"early than for higher areas in {n} of {n + 1} subjects" in patch
    assert f"None in 1 of {n + 1} (subj9" in patch
    assert f"(0 of {n + 1} subjects)" in both
    assert f"Holm over {2 * (n + 1)} tests" in caveat
    assert "shows no cause" in caveat
