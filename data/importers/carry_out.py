"""Carrying out an import: conflicts found first, size and time told, then subject by subject, each whole or not."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.importers.plan import ImportPlan
from data.sources import SubjectSource
from data.store import PooledStore

Tell = Callable[[str], None]


def described(source: SubjectSource) -> str:
    """Return a line about a subject: what would come in."""
    sessions = "" if source.sessions[0].session is None else f"{len(source.sessions)} sessions, "
    images = f"{len(source.images.ids)} images" + ("" if source.images.read else " (without pictures)")
    return f"{source.name}: {sessions}{source.n_trials} trials, {source.voxels.n_voxels} voxels, {images}"


def n_response_bytes(source: SubjectSource, store: PooledStore | None = None) -> int:
    """Return the size, before compression, of a subject's responses that aren't in `store` yet."""
    sessions = source.sessions if store is None else store.new_sessions(source)
    return sum(s.n_trials for s in sessions) * source.voxels.n_voxels * source.dtype.itemsize


def n_picture_bytes(source: SubjectSource, store: PooledStore | None = None) -> int:
    """Return the size, before compression, of a subject's pictures that aren't in `store` yet."""
    if source.images.read is None or source.images.shape is None or n_response_bytes(source, store) == 0:
        return 0
    there = set() if store is None else set(store.image_ids())
    return len(set(source.images.ids) - there) * source.images.shape[0] * source.images.shape[1] * 3


def n_bytes(source: SubjectSource, store: PooledStore | None = None) -> int:
    """Return the size of both."""
    return n_response_bytes(source, store) + n_picture_bytes(source, store)


def conflicts(plan: ImportPlan, store_path: str) -> list[str]:
    """Return what stands against a plan beside its own problems: contradictions within it, with the store, no room."""
    if not plan.subjects:
        return [] if plan.problems else ["no subject is named, so there is nothing to import"]
    try:
        store = PooledStore.open_if_there(store_path)
    except ValueError as error:
        return [str(error)]
    found: list[str] = []
    roles: dict[str, str] = {}
    for source in plan.subjects:
        try:
            source.check()
            for identity, role in zip(source.images.ids, source.images.roles, strict=True):
                if roles.setdefault(identity, role) != role:
                    raise ValueError(
                        f"image {identity!r} has role {roles[identity]!r} for one subject and {role!r} for another; "
                        f"roles are global, so make the sources agree"
                    )
            if store is not None:
                store.check_images(source.images)
                store.new_sessions(source)
        except ValueError as error:
            found.append(str(error))
    if "://" not in store_path and not found and (room := _no_room(plan, store_path, store)):
        found.append(room)
    return found


def _no_room(plan: ImportPlan, store_path: str, store: PooledStore | None) -> str | None:
    """Return that a local disk is too small for what isn't there yet, by sizes before compression."""
    place = next(parent for parent in Path(store_path).absolute().parents if parent.exists())
    needed, free = sum(n_bytes(source, store) for source in plan.subjects), shutil.disk_usage(place).free
    if store is not None:
        needed -= store.draft_bytes()  # what an interrupted import has written already
    if needed <= free:
        return None
    return (
        f"{place} has {free / 1e9:.1f} GB free, but up to {needed / 1e9:.1f} GB are needed; make room, import fewer "
        f"sessions or leave pictures out (--no-pixels)"
    )


def estimate(plan: ImportPlan, store_path: str) -> str:
    """Return how much disk and time an import may take: sizes, and the rates of reading a block and some pictures."""
    store = PooledStore.open_if_there(store_path)
    total = sum(n_bytes(source, store) for source in plan.subjects)
    if not total:
        return "all there already, nothing to read"
    first = next(source for source in plan.subjects if n_bytes(source, store))
    seconds = sum(n_response_bytes(s, store) for s in plan.subjects) / _rate(lambda: next(first.sessions[0].read()))
    read = first.images.read
    if read is not None:
        few = np.arange(min(8, len(first.images.ids)))
        seconds += sum(n_picture_bytes(s, store) for s in plan.subjects) / _rate(lambda: read(few))
    told = "less than a minute" if seconds < 60 else f"about {seconds / 60:.0f} minutes"
    size = f"{total / 1e9:.1f} GB" if total >= 1e8 else f"{total / 1e6:.1f} MB"
    return f"up to {size} on disk; reading takes {told} at the rate of the first trials and pictures"


def _rate(read: Callable[[], np.ndarray]) -> float:
    """Return bytes per second."""
    started = time.perf_counter()
    return read().nbytes / max(time.perf_counter() - started, 1e-6)


def carry_out(
    plan: ImportPlan,
    store_path: str,
    *,
    importer: str,
    tell: Tell = print,
    progress: Callable[[int], None] = lambda n: None,
) -> PooledStore:
    """Write a plan's subjects into a store, made if it is missing; what is there already is passed over.

    `tell` gets a line per subject, `progress` the bytes as they are written. An import that was interrupted can be run
    again and goes on where it stopped.

    Raises
    ------
    ValueError
        If the plan has problems or stands against the store; then nothing was written.
    """
    problems = plan.problems + conflicts(plan, store_path)
    if problems:
        others = f" ({len(problems) - 1} more; --check lists all)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + others)
    store = PooledStore.open_or_create(store_path, name=Path(store_path).stem, provenance={"importer": importer})
    for source in plan.subjects:
        before = source.name in store.subjects
        new = store.write_subject(source, progress=progress)
        if not new:
            tell(f"{source.name}: there already")
        elif before:
            added = "1 session" if len(new) == 1 else f"{len(new)} sessions"
            tell(f"{source.name}: {added} added, {sum(s.n_trials for s in new)} trials")
        else:
            tell(described(source))
    return store
