"""From a fitted model to a registered version: card, package, upload, registration."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundation.checkpoint import read_description
from foundation.evaluation.score import Scores
from foundation.tracking.cards import card_text, checked_card, make_card, tags_of, write_card
from foundation.tracking.packaging import package
from foundation.tracking.registry import Registered, register
from foundation.tracking.runs import TrackedRun

FOLDER = "model"
"""Where a run keeps the version that it registered."""
_LONGEST = 5000  # characters that MLflow's tables have for a description


def publish(
    tracked: TrackedRun,
    *,
    name: str,
    kind: str,
    backbone: Path,
    adapter: Path | None,
    lineage: Mapping[str, Any],
    scores: Scores,
) -> Registered:
    """Register a backbone, or an adapter together with its backbone, under `name`.

    Parameters
    ----------
    tracked : the run that made it, which keeps its files.
    backbone, adapter : model directories (`foundation.checkpoint.save_model`).
    lineage : what it was made from, as JSON; what is plain of it becomes tags.
    scores : strict scores of the model, under the name manybrains, and of what stands beside it.

    Raises
    ------
    ValueError
        If one of the directories isn't what it should be, or `name` is a model of another kind.
    TrackingError
        If the server doesn't take it; nothing is then registered.
    """
    subjects = read_description(backbone if adapter is None else adapter)["subjects"]
    card = make_card(name=name, kind=kind, subjects=subjects, lineage=lineage, scores=scores)
    return publish_card(tracked, card, name=name, backbone=backbone, adapter=adapter)


def publish_card(
    tracked: TrackedRun,
    card: Mapping[str, Any],
    *,
    name: str,
    backbone: Path,
    adapter: Path | None,
    further_tags: Mapping[str, str] | None = None,
    unproven_leads: bool = True,
) -> Registered:
    """Register what a card describes; `publish` for what has a card already.

    Parameters
    ----------
    further_tags : of the version, beside those that the card gives.
    unproven_leads : as in `register`.
    """
    checked_card(card, f"the card of {name}")
    with tempfile.TemporaryDirectory() as scratch:
        written, packaged = Path(scratch) / "card", Path(scratch) / "package"
        write_card(card, written)
        package(packaged, backbone=backbone, card=written, adapter=adapter)
        tracked.artifact(packaged, FOLDER)
    return register(
        name,
        tracked,
        FOLDER,
        kind=card["kind"],
        tags=tags_of(card) | dict(further_tags or {}),
        description=_fitting(card_text(card)),
        unproven_leads=unproven_leads,
    )


def _fitting(text: str) -> str:
    """Return what of a text fits a description."""
    if len(text) <= _LONGEST:
        return text
    end = "\n\n(The whole card is `card.md` in the artifacts.)\n"
    return text[: text.rindex("\n", 0, _LONGEST - len(end))] + end
