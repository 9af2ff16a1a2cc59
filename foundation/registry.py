"""``python -m foundation.registry``: what is registered, who leads, and versions as files to share."""

import time
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from data.command_line import CommonOptions, Session, begin, run
from foundation.tracking.promotion import promote as promoted
from foundation.tracking.registry import CHAMPION, Registered, aliases, find_version, models, versions
from foundation.tracking.runs import tracking_uri

PROGRAM = "python -m foundation.registry"
WIDTH = 132
Version = Annotated[str, arg(metavar="NAME[@ALIAS|/VERSION]")]


def list_(*, session: CommonOptions = Session()) -> None:
    """List all versions, the newest first.

    Args:
        session: common options.
    """
    begin(session)
    known, console = models(), _console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("name", "version", "aliases", "kind", "subject", "sessions"):
        table.add_column(heading)
    for heading in ("test r", "validation r", "created"):
        table.add_column(heading, justify="right")
    found = versions()
    for version in found:
        labels = sorted(a for a, number in known[version.name].aliases.items() if int(number) == version.version)
        tags = version.tags
        row = [version.name, str(version.version), ", ".join(labels), version.kind]
        row += [tags.get("subject") or tags.get("subjects", ""), tags.get("sessions", "")]
        row += [_score(tags.get("test_voxel_r")), _score(tags.get("validation_voxel_r")), _time(version)]
        table.add_row(*row)
    if not found:
        console.print(f"nothing is registered in {tracking_uri()}; run `python -m foundation.pretrain` first")
    else:
        console.print(table)


def show(version: Positional[Version], /, *, session: CommonOptions = Session()) -> None:
    """Show a version's model card.

    Args:
        version: NAME is its champion.
        session: common options.
    """
    begin(session)
    from foundation.tracking.cards import card_text, read_card
    from foundation.tracking.packaging import card_in

    found, console = find_version(version), _console()
    labels, directory = ", ".join(aliases(found)) or "no alias", found.directory()
    card = read_card(card_in(directory))
    console.print(f"{found.label} ({labels}), registered {_time(found)}, run {found.run_id}\nfiles: {directory}\n")
    console.print(card_text(card))


def promote(
    version: Positional[Version],
    /,
    *,
    alias: str = CHAMPION,
    force: bool = False,
    session: CommonOptions = Session(),
) -> None:
    """Give a version an alias; for champion it must score no lower than the present one on the same test images.

    Args:
        version: NAME/VERSION, or NAME@ALIAS.
        alias: champion, candidate or one of your own.
        force: promote a version that scores lower, too.
        session: common options.
    """
    begin(session)
    _console().print(promoted(version, alias=alias, force=force))


def diff(a: Positional[Version], b: Positional[Version], /, *, session: CommonOptions = Session()) -> None:
    """Show what differs between two versions: lineage, composition of the prediction, scores.

    Args:
        a: one version.
        b: the other.
        session: common options.
    """
    begin(session)
    from foundation.tracking.cards import differences, read_card
    from foundation.tracking.packaging import card_in

    one, other = find_version(a), find_version(b)
    cards = [read_card(card_in(version.directory())) for version in (one, other)]
    found, console = differences(*cards), _console()
    if not found:
        console.print(f"{one.label} and {other.label} differ in nothing that their cards tell")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("what differs", one.label, other.label):
        table.add_column(heading, overflow="fold")
    for row in found:
        table.add_row(*row)
    console.print(table)


def export(version: Positional[Version], /, *, out: Path, session: CommonOptions = Session()) -> None:
    """Write a version into one file that another registry can import, and its card beside it.

    Args:
        version: NAME is its champion.
        out: file to write, NAME.safetensors.
        session: common options.
    """
    begin(session)
    from foundation.sharing import export_version

    found = find_version(version)
    copy = export_version(found, out)
    _console().print(f"{out}: {found.kind} {found.label}, {out.stat().st_size / 1e6:.1f} MB; its card is in {copy}")


def import_(
    file: Positional[Annotated[Path, arg(metavar="FILE.safetensors")]],
    /,
    *,
    name: str | None = None,
    session: CommonOptions = Session(),
) -> None:
    """Check a file that `export` wrote, and register what it holds; a file from a stranger is safe to import.

    Args:
        file: the file.
        name: name to register it under (default: the one that it had).
        session: common options.
    """
    begin(session)
    from foundation.sharing import import_bundle

    found = import_bundle(file, name=name)
    _console().print(f"registered {found.kind} {found.label} as {aliases(found)[0]}, from {file}")


def _console() -> Console:
    """Return a console that neither reads markup nor cuts a table where output goes to a file."""
    return Console(width=max(Console().width, WIDTH), soft_wrap=True, markup=False, highlight=False)


def _score(text: str | None) -> str:
    return "" if text is None else f"{float(text):.4f}"


def _time(version: Registered) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created_ms / 1000))


def main() -> None:
    """Run the command line."""
    commands: dict[str, Any] = {
        "list": list_,
        "show": show,
        "promote": promote,
        "diff": diff,
        "export": export,
        "import": import_,
    }
    run(commands, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    main()
