"""What a model's scores say beside a baseline's, subject by subject, in a sentence that claims no more (rule 10)."""

from collections.abc import Sequence

from foundation.evaluation.report.tables import with_interval
from foundation.evaluation.score import Comparison

_MEASURE = ("all", "voxel", "mean", "r")
"""ROI, axis, target and metric of the headline."""


def headline_comparisons(comparisons: Sequence[Comparison], system: str, versus: str) -> list[Comparison]:
    """Return the paired differences of voxel r over all voxels, against repeat means, one a subject."""
    return [
        c
        for c in comparisons
        if (c.system, c.versus) == (system, versus) and (c.roi, c.axis, c.target, c.metric) == _MEASURE
    ]


def verdict(comparisons: Sequence[Comparison], system: str, versus: str) -> str | None:
    """Return whether `system` is above `versus`, and on which subjects; None where they weren't compared.

    Above and below are said where the 95 % interval of the paired difference leaves out 0. Subjects are counted and
    named, never pooled.
    """
    found = headline_comparisons(comparisons, system, versus)
    if not found:
        return None
    above = [c for c in found if c.low is not None and c.low > 0]
    below = [c for c in found if c.high is not None and c.high < 0]
    undefined = [c for c in found if c.low is None or c.high is None]
    level = [c for c in found if c not in above and c not in below and c not in undefined]
    told = [f"{system} is above {versus} on {len(above)} of {len(found)} subjects{_each(above)}"]
    if below:
        told.append(f"it is below {versus} on {len(below)}{_each(below)}")
    if level:
        told.append(f"it does not beat {versus} on {_names(level)}: the interval includes 0{_each(level)}")
    if undefined:
        told.append(f"no interval could be made on {_names(undefined)}")
    return "; ".join(told) + "."


def _names(found: Sequence[Comparison]) -> str:
    return ", ".join(c.subject for c in found)


def _each(found: Sequence[Comparison]) -> str:
    """Return each subject's difference, in brackets."""
    told = [f"{c.subject} {with_interval(c.difference, c.low, c.high, signed=True)}" for c in found]
    return f" ({'; '.join(told)})" if told else ""
