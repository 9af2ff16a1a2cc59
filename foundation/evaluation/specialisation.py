"""Whether interventions show that a stream matters more for early or for higher areas, and the sentence that says so.

The rule. A stream matters more for early areas of a subject if, for every replacement (zero, mean, shuffled), three
differences, early less higher, are positive: of losses of r; of losses as shares of the family's intact r, because
families differ in how well they are predicted at all; and of losses beyond those that a random subspace costs. For
higher areas all of them are negative. The p of this is the largest of the nine, as all must hold (intersection-union
test), adjusted over subjects and streams by Holm's method, and at most `ALPHA`.

If the rule isn't met, the first of these is its reason: the replacements disagree in sign; shares are undefined, or
their order is another than the losses'; the random subspace takes nearly all directions, so that it controls for
nothing; random directions make as large a difference; the p isn't small enough, or so few resamples could never make
it so.

Sentences speak of what a trained model uses, of the subjects that were looked at, and of nothing else: interventions
on a model show no cause in a brain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from foundation.evaluation.area_losses import Differential
from foundation.evaluation.interventions import BRANCHES

ALPHA = 0.05
MOST_REMOVED = 0.8
"""Share of all directions above which a random subspace is the whole, and no control."""
REPLACEMENTS = ("zero", "mean", "shuffled")
Favoured = Literal["early", "higher"]
CAVEAT = "This is what the trained model uses; it shows no cause in a brain and speaks of no other subject."
_NAMES = {"cls": "CLS", "patch": "patch"}
_OTHER: dict[Favoured, Favoured] = {"early": "higher", "higher": "early"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the rule makes of one stream in one subject."""

    subject: str
    branch: str
    favours: Favoured | None
    """Where the stream matters more; None: there is no evidence that it does."""
    reason: str | None
    """Why there is none."""
    p_adjusted: float | None
    mean: Differential
    """The differential of the replacement by the mean, which is what the random subspace is matched to."""


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Return p values adjusted for the chance of any false claim among them (Holm 1979)."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def bootstraps_needed(n_tests: int, *, n_units: int | None = None) -> float:
    """Return the fewest resamples whose smallest p, that of `bootstrap_p`, can reach `ALPHA` after Holm.

    Of many images and parcels the smallest p is ``2 / (B + 1)``. Of `n_units` it is larger: the share ``1 / (B + 1)``
    has to be ``Phi(sqrt(n / (n - 1)) T^-1(ALPHA / (2 n_tests)))`` or less. Infinite above a million.
    """
    if n_units is None:
        return np.ceil(2 * n_tests / ALPHA) - 1
    t = stats.t.ppf(ALPHA / (2 * n_tests), n_units - 1) if n_units > 1 else -np.inf
    share = float(stats.norm.cdf(np.sqrt(n_units / max(n_units - 1, 1)) * t))
    return float(np.ceil(1 / share)) - 1 if share > 1e-6 else np.inf


def findings(differentials: Iterable[Differential]) -> list[Finding]:
    """Apply the rule to each subject and stream; all of them are one family of tests."""
    by_case: dict[tuple[str, str], dict[str, Differential]] = {}
    for d in differentials:
        if d.intervention in REPLACEMENTS:
            by_case.setdefault((d.subject, d.branch), {})[d.intervention] = d
    largest = np.array([max(p for d in case.values() for p in _p_values(d)) for case in by_case.values()])
    return [
        _finding(case, float(p), len(by_case))
        for case, p in zip(by_case.values(), holm(largest) if len(largest) else largest, strict=True)
    ]


def _p_values(d: Differential) -> list[float]:
    return [1.0 if p is None else p for p in (d.p_value, d.share_p_value, d.versus_p_value)]


def _finding(case: dict[str, Differential], p: float, n_tests: int) -> Finding:
    mean = case["mean"]
    toward: Favoured = "early" if mean.difference > 0 else "higher"
    sign = 1 if toward == "early" else -1
    reason = None
    if any(sign * d.difference <= 0 for d in case.values()):
        values = ", ".join(f"{name} {_signed(case[name].difference)}" for name in REPLACEMENTS)
        reason = f"the replacements disagree ({values})"
    elif any(d.share_difference is None for d in case.values()):
        reason = "shares are n/a, as an area's intact r isn't clear of 0"
    elif any(sign * (d.share_difference or 0) <= 0 for d in case.values()):
        reason = f"as a share of what is predicted at all, {_OTHER[toward]} areas lose as much or more"
    elif mean.n_removed is not None and mean.n_directions and mean.n_removed > MOST_REMOVED * mean.n_directions:
        reason = f"the control isn't informative: matching takes {mean.n_removed} of {mean.n_directions} directions"
    elif any(d.versus_control is None or sign * d.versus_control <= 0 for d in case.values()):
        reason = "random directions make as large a difference"
    elif p > ALPHA:
        name, worst = max(case.items(), key=lambda named: max(_p_values(named[1])))
        which = ("loss", "share of the intact r", "beyond random directions")[int(np.argmax(_p_values(worst)))]
        reason = f"adjusted p {p:.2g}, of {name}, {which}{_too_few_resamples(mean, n_tests)}"
    return Finding(
        subject=mean.subject,
        branch=mean.branch,
        favours=None if reason else toward,
        reason=reason,
        p_adjusted=p,
        mean=mean,
    )


def _too_few_resamples(d: Differential, n_tests: int) -> str:
    if d.n_units is None or d.n_resamples is None:
        return ""
    needed = bootstraps_needed(n_tests, n_units=d.n_units)
    if d.n_resamples >= needed:
        return ""
    remedy = "only more of those could" if np.isinf(needed) else f"{needed:.0f} could"
    return (
        f"; {d.n_resamples} resamples of {d.n_units} images or parcels can't tell {n_tests} tests from chance, {remedy}"
    )


def sentences(found: Sequence[Finding], *, looked_at: tuple[int, int] | None = None) -> list[str]:
    """Return a sentence for each stream, one on both together, and what none of them says.

    Parameters
    ----------
    looked_at
        How many subjects were looked at, and how many the model has; said if they differ.
    """
    fewer = []
    if looked_at is not None and looked_at[0] < looked_at[1]:
        n, n_all = looked_at
        fewer = [f"{n} of the model's {n_all} subjects {'was' if n == 1 else 'were'} looked at."]
    if not found:
        return ["Whether streams serve different areas: n/a, see the notes.", *fewer]
    subjects = list(dict.fromkeys(f.subject for f in found))
    said = [_of_branch(branch, [f for f in found if f.branch == branch]) for branch in BRANCHES]
    favours = {(f.subject, f.branch): f.favours for f in found}
    opposite = [s for s in subjects if {favours.get((s, branch)) for branch in BRANCHES} == {"early", "higher"}]
    count = f"{len(opposite)} of {len(subjects)} subjects"
    both = (
        f"Evidence that the two streams serve opposite ends of the hierarchy in {count}."
        if opposite
        else f"No evidence that the two streams serve opposite ends of the hierarchy ({count})."
    )
    tests = (
        f"Intervals: 95 % over test images and parcels; Holm over {len(found)} tests; "
        f"smallest adjusted p {min(f.p_adjusted for f in found if f.p_adjusted is not None):.2g}."
    )
    return [*said, both, " ".join([tests, *fewer, CAVEAT])]


def _of_branch(branch: str, found: Sequence[Finding]) -> str:
    name, n = _NAMES[branch], len(found)
    parts = []
    for favoured in ("early", "higher"):
        these = [f for f in found if f.favours == favoured]
        if these:
            parts.append(
                f"Intervention-based evidence that the {name} stream matters more for {favoured} than for "
                f"{_OTHER[favoured]} areas in {len(these)} of {n} subjects (loss of r, early less higher, beyond "
                f"random directions': {'; '.join(map(_number, these))}; zero, mean and shuffled agree)."
            )
    against = [f for f in found if f.favours is None]
    if against:
        listed = "; ".join(f"{_number(f)}: {f.reason}" for f in against)
        parts.append(
            f"None in {len(against)} of {n} ({listed})."
            if parts
            else f"No intervention-based evidence that the {name} stream matters more for early or for higher areas in "
            f"any of {n} subjects (loss of r, early less higher, beyond random directions': {listed})."
        )
    return " ".join(parts)


def _number(f: Finding) -> str:
    d = f.mean
    if d.versus_control is None or d.versus_low is None or d.versus_high is None:
        return f"{f.subject} n/a"
    return f"{f.subject} {_signed(d.versus_control)} [{_signed(d.versus_low)} {_signed(d.versus_high)}]"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}".replace("0.", ".", 1)
