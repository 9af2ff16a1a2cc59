"""Registered versions as files: written by one registry, read by another, whoever wrote them.

An import checks everything and builds the model before anything is registered, so a file that is refused leaves the
registry as it was.
"""

import json
import tempfile
from pathlib import Path

from data.schema import check_name
from foundation.bundle import Bundle, read_bundle, unpack, write_bundle
from foundation.checkpoint import file_digest, write_json
from foundation.tracking.cards import checked_card, read_card
from foundation.tracking.packaging import adapter_in, backbone_in, card_in, load_parts
from foundation.tracking.publish import publish_card
from foundation.tracking.registry import ADAPTER, IMPORTED, Registered
from foundation.tracking.runs import TrackedRun

SUFFIX = ".safetensors"


def export_version(version: Registered, out: Path) -> Path:
    """Write a version into one file, and a readable copy of its card beside it; return where the copy is.

    Raises
    ------
    ValueError
        If `out` or the copy is there already, or has another ending, or the version's files aren't whole.
    """
    if out.suffix != SUFFIX:
        raise ValueError(f"--out {out} must end in {SUFFIX}, which is what is written")
    copy = out.with_suffix(".card.json")
    for path in (out, copy):
        if path.exists():
            raise ValueError(f"{path} exists already; name another file, or remove it")
    directory = version.directory()
    if not backbone_in(directory).is_dir():
        raise ValueError(
            f"{version.label} was registered before versions were whole packages; train and register it anew"
        )
    card = read_card(card_in(directory))
    write_bundle(backbone_in(directory), out, adapter=adapter_in(directory), card=card)
    write_json(copy, card)
    return copy


def import_bundle(path: Path, *, name: str | None = None) -> Registered:
    """Register what `export_version` wrote, under the name that it had or another.

    It leads only where there was no champion, or by the same validation images with a score that is no lower.

    Raises
    ------
    ValueError
        If anything about the file isn't as it should be, or the name is that of a model of another kind.
    TrackingError
        If the server doesn't take it; nothing is then registered.
    """
    bundle = read_bundle(path)
    if bundle.card is None:
        raise ValueError(f"{path} has no model card; it must be written by `foundation.registry export`")
    card = checked_card(bundle.card, path)
    _check_card(card, bundle, path)
    name = check_name(card["name"] if name is None else name, "a model's name")
    digest = file_digest(path)
    with tempfile.TemporaryDirectory() as scratch:
        backbone, adapter = unpack(bundle, Path(scratch))
        load_parts(backbone, adapter)
        tags = {IMPORTED: digest, "imported_name": card["name"]}
        tracked = TrackedRun.start(
            f"import-{name}", kind="import", config={"file": path.name, "digest": digest}, tags=tags
        )
        try:
            found = publish_card(
                tracked,
                card,
                name=name,
                backbone=backbone,
                adapter=adapter,
                further_tags=tags,
                unproven_leads=False,
            )
        except BaseException as error:
            tracked.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    tracked.finish()
    return found


def _check_card(card: dict, bundle: Bundle, path: Path) -> None:
    """Check that a card speaks of the models that lie beside it."""
    described = (bundle.adapter or bundle.model).description
    if (card["kind"] == ADAPTER) != (bundle.adapter is not None) or card["subjects"] != described["subjects"]:
        raise ValueError(f"{path} is refused: its card is of another model than the one beside it")
    if card["kind"] == ADAPTER and card["lineage"].get("subject", card["subjects"][0]) != card["subjects"][0]:
        raise ValueError(f"{path} is refused: its card's lineage names another subject: {json.dumps(card['subjects'])}")
