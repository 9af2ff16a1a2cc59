"""Model cards: what a registered version is, what it was made from, how well it predicts; for programs and people.

``card.json`` is the whole card, ``card.md`` the same for people, ``figure.png`` its scores per ROI. Whatever a card
says in words stands in Markdown as code, so that a stranger's card can't bring links, pictures or HTML along.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.schema import check_name
from foundation.checkpoint import write_json
from foundation.evaluation.compare import NAMES, headline
from foundation.evaluation.figures import bars_per_roi
from foundation.evaluation.score import CEILING, FLOORS, Comparison, Row, Scores

FORMAT, FORMAT_VERSION = "manybrains-card", 1
OURS = "manybrains"
LICENCE = "Responses and images belong to their data set: see its terms. The weights were learned from both."
_TEXT_LIMIT = 300
_LARGEST = 1e9
_TAKEN = ("kind", "protocol", "imported_from", "imported_name")
_HEADINGS = {"voxel_r": "voxel r", "pattern_r": "pattern r", "mse": "MSE", "r2_ceiling": "r²/c"}


def make_card(
    *, name: str, kind: str, subjects: list[str], lineage: Mapping[str, Any], scores: Scores
) -> dict[str, Any]:
    """Return the card of a version.

    Parameters
    ----------
    lineage : what it was made from, as JSON; its `composition` is what a prediction is made of.
    scores : strict, of all the subjects that it was scored on.
    """
    lineage = dict(lineage)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "name": name,
        "subjects": subjects,
        "lineage": {key: value for key, value in lineage.items() if key != "composition"},
        "composition": lineage.get("composition"),
        "scores": [row.to_json() for row in scores.rows if row.value is not None],
        "comparisons": [
            c.to_json() for c in scores.comparisons if (c.axis, c.metric, c.target) == ("voxel", "r", "mean")
        ],
        "notes": list(scores.notes),
        "licence": LICENCE,
        "use": _use(name, kind, subjects),
    }


def _use(name: str, kind: str, subjects: list[str]) -> list[str]:
    """Return the lines that use a version."""
    notebook = f'mlflow.pyfunc.load_model("models:/{name}@champion")'
    if kind == "backbone":
        return [f"adapt --subject SUBJECT --sessions 3 --backbone {name}", notebook]
    return [f"python -m foundation.predict --subject {subjects[0]} IMAGES... --adapter {name} --out FILE.npy", notebook]


def scores_of(card: Mapping[str, Any]) -> Scores:
    """Return the scores that a card holds."""
    rows = tuple(Row(**row) for row in card["scores"])
    return Scores(rows, tuple(Comparison(**c) for c in card["comparisons"]), tuple(card["notes"]))


def tags_of(card: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a version: its lineage, as far as it is plain, and the scores that versions compete by.

    ``test_voxel_r`` and ``test_pattern_r`` are means over subjects, ``test_voxel_r.<subject>`` is one subject's; all
    are against repeat means and under the `protocol` that is named beside them.
    """
    tags = {k: str(v)[:500] for k, v in card["lineage"].items() if isinstance(v, str | int | float | bool)}
    if isinstance(card["lineage"].get("encoder"), dict):
        tags |= {f"encoder.{k}": v[:500] for k, v in card["lineage"]["encoder"].items() if isinstance(v, str)}
    tags.setdefault("subjects", " ".join(card["subjects"]))
    scores = scores_of(card)
    found = headline(scores, OURS)
    subject = "test/voxel_r/subject/"
    named = {"test/voxel_r": "test_voxel_r", "test/pattern_r": "test_pattern_r"}
    named |= {key: f"test_voxel_r.{key.removeprefix(subject)}" for key in found if key.startswith(subject)}
    tags |= {tag: f"{found[key]:.6f}" for key, tag in named.items() if key in found}
    protocols = {row.protocol for row in scores.rows}
    return tags | ({"protocol": protocols.pop()} if len(protocols) == 1 else {})


# -- on disk -----------------------------------------------------------------------------------------------------------


def write_card(card: Mapping[str, Any], directory: Path) -> None:
    """Write ``card.json``, ``card.md`` and, where there are scores, ``figure.png`` into a new directory."""
    directory.mkdir(parents=True)
    write_json(directory / "card.json", dict(card))
    (directory / "card.md").write_text(card_text(card))
    if card["scores"]:
        bars_per_roi(scores_of(card), directory / "figure.png")


def read_card(directory: Path) -> dict[str, Any]:
    """Return the card of a directory.

    Raises
    ------
    ValueError
        If there is none, or a newer version wrote it.
    """
    path = directory / "card.json"
    try:
        return checked_card(json.loads(path.read_text()), path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} can't be read ({error}); register the model again") from error


def checked_card(card: Any, where: object) -> dict[str, Any]:
    """Return a card whose every entry is what it should be, whoever wrote it.

    Raises
    ------
    ValueError
        If one isn't.
    """
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"{where} is no model card of manybrains")
    if card.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where} has card format {card.get('format_version')}; this manybrains reads {FORMAT_VERSION}"
        )
    types = {"subjects": list, "lineage": dict, "scores": list, "comparisons": list, "notes": list, "use": list}
    wrong = [key for key, kind in types.items() if not isinstance(card.get(key), kind)]
    wrong += [key for key in ("notes", "use", "subjects") if not all(isinstance(x, str) for x in card.get(key) or [])]
    wrong += [] if card.get("kind") in ("backbone", "adapter") else ["kind"]
    wrong += [key for key in ("name", "licence") if not isinstance(card.get(key), str)]
    wrong += [] if isinstance(card.get("composition"), dict | None) else ["composition"]
    if wrong:
        raise ValueError(f"{where} is damaged: {', '.join(dict.fromkeys(wrong))} of the card can't be read")
    check_name(card["name"], "a model's name")
    for name in (*card["subjects"], *card["lineage"]):
        check_name(name, "a name in the card")
    _check_lineage(card["lineage"], where)
    for kind, entries in ((Row, card["scores"]), (Comparison, card["comparisons"])):
        for entry in entries:
            _check_row(entry, kind, where)
    return card


def _check_lineage(lineage: Mapping[str, Any], where: object) -> None:
    """Raise ValueError where what a lineage says would be taken for a score, or its score is none."""
    taken = [key for key in lineage if key.startswith("test_") or key in _TAKEN]
    if taken:
        raise ValueError(
            f"{where} is refused: the lineage has an entry {taken[0]!r}, which is a tag of another meaning"
        )
    score = lineage.get("validation_voxel_r", 0.0)
    try:
        float(score)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where} is damaged: validation_voxel_r is {str(score)[:40]!r}, no number") from error


def _check_row(entry: Any, kind: type[Row] | type[Comparison], where: object) -> None:
    """Raise ValueError where an entry isn't what `kind` says."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(entry, dict) or entry.keys() != fields.keys():
        raise ValueError(f"{where} is damaged: a score of the card lacks an entry or has one too many")
    for key, value in entry.items():
        if fields[key] == "str":
            good = isinstance(value, str) and len(value) < _TEXT_LIMIT
        elif fields[key] == "int":
            good = isinstance(value, int) and value >= 0
        else:
            good = value is None or (isinstance(value, float | int) and abs(value) < _LARGEST)  # NaN isn't, either
        if not good:
            raise ValueError(f"{where} is damaged: {key} of a score is {str(value)[:40]!r}")
    if "system" in fields:
        check_name(entry["subject"], "a subject in the card")


# -- for people --------------------------------------------------------------------------------------------------------


def card_text(card: Mapping[str, Any]) -> str:
    """Return a card as Markdown: its facts, the main scores, how to use it."""
    lines = [
        f"# {_code(card['name'])}",
        "",
        f"A manybrains {card['kind']} of {', '.join(map(_code, card['subjects']))}.",
        "",
        "## Scores on test images",
        "",
        *_score_table(card),
        "",
        "Against the mean of an image's repeats; [ ]: 95 % bootstrap interval over images. zero and mean are floors, "
        "ceiling is what the measured repeats allow. All numbers are in `card.json`, ROIs in `figure.png`, beside "
        "this card in the artifacts.",
        "",
    ]
    if card["composition"]:
        lines += ["## What a prediction is made of", "", *_facts(card["composition"]), ""]
    lines += ["## Made from", "", *_facts(card["lineage"]), "", "## Use", ""]
    lines += [f"- {_code(line)}" for line in card["use"]]
    return "\n".join([*lines, "", "## Terms", "", _code(card["licence"]), ""])


def _score_table(card: Mapping[str, Any]) -> Iterator[str]:
    """Give a line per subject, ROI and system; of several subjects, all voxels alone."""
    rows = [row for row in scores_of(card).rows if row.target == "mean" and (row.axis, row.metric) in NAMES]
    if len({row.subject for row in rows}) > 1:
        rows = [row for row in rows if row.roi == "all"]
    if not rows:
        yield "It was not scored."
        return
    yield "| subject | ROI | system | " + " | ".join(_HEADINGS.values()) + " |"
    yield "|---|---|---|" + "---:|" * len(_HEADINGS)
    found = {(row.subject, row.roi, row.system, NAMES[row.axis, row.metric]): row for row in rows}
    systems = list(dict.fromkeys((*FLOORS, *(r.system for r in rows if r.system != CEILING), CEILING)))
    for subject, roi in dict.fromkeys((row.subject, row.roi) for row in rows):
        for system in systems:
            numbers = [_number(found.get((subject, roi, system, metric))) for metric in _HEADINGS]
            yield f"| {_code(subject)} | {_code(roi)} | {_code(system)} | {' | '.join(numbers)} |"


def _number(row: Row | None) -> str:
    if row is None or row.value is None:
        return "n/a"
    interval = "" if row.low is None or row.high is None else f" [{row.low:.3f} {row.high:.3f}]"
    return f"{row.value:.3f}{interval}"


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    """Give a line per entry; long ones are left to ``card.json``."""
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        yield f"- {_code(key)}: {_code(text)}" if len(text) <= _TEXT_LIMIT else f"- {_code(key)}: in `card.json`"


def _code(text: str) -> str:
    """Return text as a Markdown code span of one line, which nothing in it can end."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "/").split()) + "`"


# -- compared ----------------------------------------------------------------------------------------------------------


def differences(card: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what two cards say otherwise, as (what, one, other): lineage, composition, our scores against means."""
    facts = [_flat_facts(each) for each in (card, other)]
    return [
        (key, facts[0].get(key, "–"), facts[1].get(key, "–"))
        for key in dict.fromkeys((*facts[0], *facts[1]))
        if facts[0].get(key) != facts[1].get(key)
    ]


def _flat_facts(card: Mapping[str, Any]) -> dict[str, str]:
    """Return everything that cards are compared by."""
    facts = {key: str(card[key]) for key in ("kind", "name")} | {"subjects": " ".join(card["subjects"])}
    facts |= dict(_leaves("", card["lineage"])) | dict(_leaves("composition.", card["composition"] or {}))
    for row in scores_of(card).rows:
        metric = NAMES.get((row.axis, row.metric))
        if row.system == OURS and row.target == "mean" and metric is not None:
            facts[f"{row.subject} {row.roi} {_HEADINGS[metric]}"] = _number(row)
    return facts


def _leaves(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)
