"""``python -m data``: make, fill and inspect pooled stores."""

import time
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

from data.command_line import CommonOptions, Session, begin, progress_bar, run
from data.importers.command import import_
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
    specialised: bool = True,
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
        specialised: whether areas differ; without, ROI labels are dealt out to voxels at random.
        seed: of everything random.
        session: common options.
    """
    begin(session)
    from data.describe import describe, show_summary
    from data.phantom import PRESETS, write_phantom

    given = dict(subjects=subjects, sessions=sessions, trials_per_session=trials_per_session, voxels=voxels)
    given |= dict(repeats=repeats, images=images, specialised=specialised)
    config = replace(PRESETS[preset], seed=seed, **{k: v for k, v in given.items() if v is not None})
    write_phantom(store, config)
    features(store, encoder="gabor")
    show_summary(describe(PooledStore.open(store), ceilings=False), Console())


def features(
    store: Positional[Store],
    /,
    *,
    encoder: str,
    depths: tuple[int, ...] | None = None,
    name: str | None = None,
    session: CommonOptions = Session(),
) -> None:
    """Compute a frozen encoder's tokens of all images that have pixels and keep them in the store.

    Args:
        store: the store.
        encoder: gabor, a directory, or a name on the Hugging Face hub (facebook/dinov2-base).
        depths: encoder blocks to keep, 1-based (default: four, evenly spaced).
        name: what to call them in the store (default: the last part of the encoder's name).
        session: common options.
    """
    begin(session)
    from data.features import compute_features, load_encoder, n_without_pixels

    opened = PooledStore.open(store, writable=True)
    loaded = load_encoder(encoder, depths=depths)
    there, skipped = opened.n_encoded(name or loaded.name), n_without_pixels(opened)
    n_images = opened.n_images - skipped
    done, started = 0, time.monotonic()

    def progress(n: int) -> None:
        nonlocal done
        done += n
        bar.update(todo, advance=n, rate=f"{done / (time.monotonic() - started):.1f} images/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with progress_bar(*columns, TimeRemainingColumn()) as bar:
        todo = bar.add_task(f"{loaded.name} tokens", total=n_images, completed=there, rate="")
        kept = compute_features(opened, loaded, name=name, progress=progress)
    how = f"{done} computed now" if done else "all there already, nothing to do"
    lines = [f"{store}: {kept} tokens of {n_images} images ({how}), depths {loaded.depths}, width {loaded.width}"]
    if skipped:
        lines += [f"warn {skipped} images were skipped: they were stored without pixels (--no-pixels)"]
    Console().print("\n".join(lines), markup=False, soft_wrap=True)


def info(
    store: Positional[Store], /, *, json: bool = False, ceilings: bool = True, session: CommonOptions = Session()
) -> None:
    """Print what a store holds.

    Args:
        store: the store.
        json: print it as JSON.
        ceilings: estimate noise ceilings from the repeats, for which all responses are read.
        session: common options.
    """
    begin(session)
    from data.describe import describe, show

    found = describe(PooledStore.open(store), ceilings=ceilings)
    if json:
        print(dumps(found, indent=2))
    else:
        show(found, Console())


def validate(store: Positional[Store], /, *, quick: bool = False, session: CommonOptions = Session()) -> None:
    """Check a store: every byte, every digest, and that all its parts agree.

    Args:
        store: the store.
        quick: look at metadata, tables and the presence of shards only; read no responses, pictures or tokens.
        session: common options.
    """
    begin(session)
    from data.store.validate import validate as findings_of

    console = Console(soft_wrap=True, markup=False, highlight=False)
    remarks: list[str] = []
    with progress_bar() as bar:
        task = bar.add_task("reading")
        found = findings_of(
            store,
            deep=not quick,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            remark=remarks.append,
        )
    for line in remarks:
        console.print(f"note {line}")
    for line in found:
        console.print(f"bad  {line}")
    if found:
        raise ValueError(f"{store}: {len(found)} findings")
    opened = PooledStore.open(store)
    counts = f"{len(opened.subjects)} subjects, {opened.n_images} images, {len(opened.encoders)} encoders"
    console.print(f"{store}: valid ({counts}{'; chunks not read' if quick else ''})")


def export(
    store: Positional[Store],
    /,
    *,
    subject: str,
    map: str,
    out: Path,
    overwrite: bool = False,
    session: CommonOptions = Session(),
) -> None:
    """Write a map of a subject's voxels: NIfTI for volumes, GIFTI for surfaces, npy for either.

    Args:
        store: the store.
        subject: number or name.
        map: mean, sd, ncsnr, noise-ceiling, split-half, published:NAME, roi:FAMILY or parcels:SPEC.
        out: file to write; its ending (.nii, .nii.gz, .gii, .npy) says the format.
        overwrite: replace files that are there.
        session: common options.
    """
    begin(session)
    from data.export import export_map

    console = Console(soft_wrap=True)
    for path in export_map(PooledStore.open(store), subject, map, out, overwrite=overwrite):
        console.print(f"wrote {path}", markup=False)


def migrate(store: Positional[Store], /, *, session: CommonOptions = Session()) -> None:
    """Bring a store of an older format to the current one, in place.

    Args:
        store: the store.
        session: common options.
    """
    begin(session)
    from data.store.migrate import migrate as bring_up_to_date

    console = Console(soft_wrap=True)
    bring_up_to_date(store, tell=console.print)
    console.print(f"{store} has the current format")


def main() -> None:
    """Run the command line."""
    commands = {
        "phantom": phantom,
        "import": import_,
        "features": features,
        "info": info,
        "validate": validate,
        "export": export,
        "migrate": migrate,
    }
    run(commands, program="python -m data", description=__doc__)


if __name__ == "__main__":
    main()
