"""``python -m data``: make, fill and inspect pooled stores."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import Positional, arg

from data.command_line import CommonOptions, Session, begin, run
from data.rois import families
from data.splits import split_of
from data.store import PooledStore

Store = Annotated[str, arg(metavar="STORE")]


def phantom(
    store: Positional[Store],
    /,
    *,
    preset: Literal["tiny", "standard"] = "tiny",
    subjects: int | None = None,
    sessions: int | None = None,
    trials_per_session: int | None = None,
    voxels: int | None = None,
    repeats: int | None = None,
    images: Path | None = None,
    seed: int = 0,
    session: CommonOptions = Session(),
) -> None:
    """Simulate subjects with known truth, and write them as a pooled store with gabor tokens.

    Args:
        store: where to write it.
        preset: the options that are not given come from it.
        subjects: how many subjects, subj01 and on.
        sessions: sessions per subject.
        trials_per_session: trials per session.
        voxels: voxels per subject.
        repeats: times a shared test image is shown to each subject.
        images: a directory of photographs to show in place of made ones (then only early voxels are simulated).
        seed: of everything random.
        session: common options.
    """
    begin(session)
    from data.phantom import PRESETS, write_phantom

    given = dict(subjects=subjects, sessions=sessions, trials_per_session=trials_per_session, voxels=voxels)
    given |= dict(repeats=repeats, images=images)
    config = replace(PRESETS[preset], seed=seed, **{k: v for k, v in given.items() if v is not None})
    write_phantom(store, config)
    features(store, encoder="gabor")
    info(store)


def import_(
    format: Positional[Literal["arrays"]],
    source: Positional[Path],
    store: Positional[Store],
    /,
    *,
    recordings: Path | None = None,
    subjects: tuple[str, ...] | None = None,
    check: bool = False,
    session: CommonOptions = Session(),
) -> None:
    """Import recordings into a store, made if it is missing.

    Args:
        format: layout of the source; `arrays` is a directory with a recordings.json (see docs/importing.md).
        source: the directory.
        store: the store to add them to.
        recordings: the table, where it is not SOURCE/recordings.json.
        subjects: only these.
        check: read everything and report, write nothing.
        session: common options.
    """
    begin(session)
    from data.importers.arrays import check_arrays, import_arrays

    console = Console()
    if check:
        good, bad = check_arrays(source, recordings)
        for line in good:
            console.print(f"ok   {line}", markup=False, soft_wrap=True)
        for line in bad:
            console.print(f"bad  {line}", markup=False, soft_wrap=True)
        if bad:
            raise ValueError(f"{len(bad)} of {len(good) + len(bad)} recordings can't be imported")
        return
    import_arrays(source, store, table=recordings, subjects=subjects, progress=console.print)


def features(
    store: Positional[Store],
    /,
    *,
    encoder: str,
    depths: tuple[int, ...] | None = None,
    name: str | None = None,
    session: CommonOptions = Session(),
) -> None:
    """Compute a frozen encoder's tokens of all images and keep them in the store.

    Args:
        store: the store.
        encoder: gabor, a directory, or a name on the Hugging Face hub (facebook/dinov2-base).
        depths: encoder blocks to keep, 1-based (default: four, evenly spaced).
        name: what to call them in the store (default: the last part of the encoder's name).
        session: common options.
    """
    begin(session)
    from data.features import compute_features, load_encoder

    opened = PooledStore.open(store, writable=True)
    loaded = load_encoder(encoder, depths=depths)
    done = 0

    def progress(n: int) -> None:
        nonlocal done
        done += n
        bar.advance(todo, n)

    with Progress() as bar:
        todo = bar.add_task(f"{loaded.name} tokens", total=opened.n_images)
        kept = compute_features(opened, loaded, name=name, progress=progress)
        bar.update(todo, completed=opened.n_images)
    how = f"{done} computed now" if done else "all there already, nothing to do"
    Console().print(
        f"{store}: {kept} tokens of {opened.n_images} images ({how}), depths {loaded.depths}, width {loaded.width}",
        markup=False,
        soft_wrap=True,
    )


def info(store: Positional[Store], /, *, session: CommonOptions = Session()) -> None:
    """Print what a store holds.

    Args:
        store: the store.
        session: common options.
    """
    begin(session)
    opened = PooledStore.open(store)
    split = split_of(opened)
    parts = {part: int((split.parts == part).sum()) for part in ("train", "validation", "test")}
    table = Table(title=f"{opened.name} ({store})")
    for column in ("subject", "sessions", "trials", "images", "voxels", "unit", "ROI families (voxels)"):
        table.add_column(column, justify="left" if column in ("subject", "unit") else "right")
    for name in opened.subjects:
        subject = opened.subject(name)
        sessions = "n/a" if subject.session is None else str(len(np.unique(subject.session)))
        found = ", ".join(f"{family} {mask.sum()}" for family, mask in families(subject).items()) or "n/a"
        shown = len(np.unique(subject.image))
        table.add_row(
            name, sessions, str(subject.n_trials), str(shown), str(subject.n_voxels), subject.attrs["unit"], found
        )
    console = Console()
    console.print(table)
    console.print(f"images: {opened.n_images}, split by {split.rule}: {parts}")
    for encoder in opened.encoders:
        if missing := opened.missing_tokens(encoder):
            console.print(f"tokens {encoder}: lacking for {len(missing)} image blocks; run `python -m data features`")
            continue
        tokens = opened.tokens(encoder)
        _, patch, width = tokens.shape
        console.print(f"tokens {encoder}: depths {tokens.depths}, {patch} patches, width {width}, {tokens.digest[:19]}")


def migrate(store: Positional[Store], /, *, session: CommonOptions = Session()) -> None:
    """Bring a store of an older format to the current one, in place.

    Args:
        store: the store.
        session: common options.
    """
    begin(session)
    from data.migrate import migrate as bring_up_to_date

    console = Console(soft_wrap=True)
    bring_up_to_date(store, tell=console.print)
    console.print(f"{store} has the current format")


def main() -> None:
    """Run the command line."""
    commands = {"phantom": phantom, "import": import_, "features": features, "info": info, "migrate": migrate}
    run(commands, program="python -m data", description=__doc__)


if __name__ == "__main__":
    main()
