"""Who leads: a version takes the alias ``champion`` if it isn't worse than the champion on the same test images.

Only people promote, and this is the one place where test scores decide anything; `register` goes by validation.
"""

import re
from dataclasses import dataclass

from data.schema import check_name
from foundation.tracking.registry import CANDIDATE, CHAMPION, Registered, aliases, find_version, models
from foundation.tracking.runs import answering, client, tracking_uri

SCORE = "test_voxel_r"
"""The tag of the mean over subjects; ``test_voxel_r.<subject>`` is one subject's."""
PROTOCOL = "strict"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two versions' strict scores on the test images that both were scored on, or why there are none."""

    score: float = float("nan")
    champion: float = float("nan")
    subjects: tuple[str, ...] = ()
    reason: str | None = None
    """Why they can't be compared."""


def compared(version: Registered, champion: Registered) -> Compared:
    """Compare two versions by their mean voxel r over the subjects that both were scored on, on the same split."""
    for one in (version, champion):
        if not _subject_scores(one):
            return Compared(reason=f"{one.label} has no {PROTOCOL} score")
    split = [one.tags.get("split_digest") for one in (version, champion)]
    if None in split or split[0] != split[1]:
        return Compared(reason="they were scored on other splits")
    if version.tags.get("preprocessing_digest") != champion.tags.get("preprocessing_digest"):
        return Compared(reason="their test responses are standardised otherwise")
    mine, theirs = _subject_scores(version), _subject_scores(champion)
    common = tuple(sorted(mine.keys() & theirs.keys()))
    if not common:
        return Compared(reason="they were scored on no common subject")
    score, other = (sum(found[name] for name in common) / len(common) for found in (mine, theirs))
    return Compared(score=score, champion=other, subjects=common)


def _subject_scores(version: Registered) -> dict[str, float]:
    """Return the voxel r of each subject, under the strict protocol; what is undefined is left out."""
    if version.tags.get("protocol") != PROTOCOL:
        return {}
    prefix = f"{SCORE}."
    found = {key.removeprefix(prefix): float(v) for key, v in version.tags.items() if key.startswith(prefix)}
    return {subject: score for subject, score in found.items() if score == score}


def promote(name: str, *, alias: str = CHAMPION, force: bool = False) -> str:
    """Give a version an alias, and return what to tell of it.

    For ``champion``, the version mustn't score lower than the present one; other aliases are labels, free for all.

    Parameters
    ----------
    name : NAME/VERSION or NAME@ALIAS.
    force : promote a version that scores lower, too.

    Raises
    ------
    ValueError
        If there is no such version, it scores lower, or the alias is none that MLflow allows.
    """
    _check_alias(alias)
    if "/" not in name and "@" not in name:
        raise ValueError(f"{name!r} names no version; write {name}/VERSION, or {name}@{CANDIDATE}")
    version = find_version(name)
    have = aliases(version)
    if alias in have:
        return f"{version.label} is {alias} already"
    told = f"{version.label} is {alias} now"
    if alias == CHAMPION:
        told += _judged(version, force=force)
    uri = tracking_uri()
    with answering(uri):
        mlflow = client(uri)
        mlflow.set_registered_model_alias(version.name, alias, str(version.version))
        if alias == CHAMPION and CANDIDATE in have:
            mlflow.delete_registered_model_alias(version.name, CANDIDATE)
    return told


def _judged(version: Registered, *, force: bool) -> str:
    """Return how `version` compares with the champion; a lower score is an error unless forced."""
    if CHAMPION not in models()[version.name].aliases:
        return "; there was none"
    champion = find_version(f"{version.name}@{CHAMPION}")
    found = compared(version, champion)
    if found.reason is not None:
        return f" in place of {champion.label}, though the two can't be compared: {found.reason}"
    on = f"({PROTOCOL} test voxel r, same split, {', '.join(found.subjects)})"
    numbers = f"{found.score:.4f} and the champion {champion.label} {found.champion:.4f} {on}"
    if found.score >= found.champion:
        return f": it scores {numbers}"
    if not force:
        raise ValueError(f"{version.label} scores {numbers}; promote it all the same with --force")
    return f", by force: it scores {numbers}"


def _check_alias(alias: str) -> None:
    if alias.lower() == "latest" or re.fullmatch(r"v\d+", alias.lower()) or "." in check_name(alias, "alias"):
        raise ValueError(f"alias {alias!r} isn't one that MLflow allows: no dots, not 'latest', not like 'v3'")
