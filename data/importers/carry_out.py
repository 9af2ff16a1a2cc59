"""Carrying out an import: conflicts found first, size and time told, then subject by subject, each whole or not."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from data.importers.plan import ImportPlan
from data.sources import SubjectSource
from data.store import PooledStore

Tell = Callable[[str], None]


def described(source: SubjectSource) -> str:
    """Return a line about a subject: what would come in."""
    sessions = "" if source.sessions[0].session is None else f"{len(source.sessions)} sessions, "
    images = f"{len(source.images.ids)} images" + ("" if source.images.read else " (without pictures)")
    return f"{source.name}: {sessions}{source.n_trials} trials, {source.voxels.n_voxels} voxels, {images}"


def n_bytes(source: SubjectSource) -> int:
    """Return the size of a subject's responses and pictures before compression."""
    height, width = source.images.shape or (0, 0)
    pictures = len(source.images.ids) * height * width * 3 if source.images.read else 0
    return source.n_bytes + pictures


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
    if room := _no_room(plan, store_path):
        found.append(room)
    return found


def _no_room(plan: ImportPlan, store_path: str) -> str | None:
    if "://" in store_path:
        return None
    place = next(parent for parent in Path(store_path).absolute().parents if parent.exists())
    needed, free = sum(map(n_bytes, plan.subjects)), shutil.disk_usage(place).free
    if needed <= free:
        return None
    return (
        f"{place} has {free / 1e9:.1f} GB free, but up to {needed / 1e9:.1f} GB are needed; make room, import fewer "
        f"sessions or leave pictures out (--no-pixels)"
    )


def estimate(plan: ImportPlan) -> str:
    """Return how much disk and time an import may take, from its sizes and the reading of one block of responses."""
    total = sum(map(n_bytes, plan.subjects))
    started = time.perf_counter()
    block = next(plan.subjects[0].sessions[0].read())
    rate = block.nbytes / max(time.perf_counter() - started, 1e-6)
    minutes = sum(source.n_bytes for source in plan.subjects) / rate / 60
    told = "less than a minute" if minutes < 1 else f"about {minutes:.0f} minutes"
    return f"up to {total / 1e9:.2f} GB on disk; reading the responses takes {told} at the rate of the first block"


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
