"""What the tests of the GLMsingle importer share: trees in each layout, their plans, stores and problems."""

from pathlib import Path

import pandas as pd

from data.importers.glmsingle import plan_glmsingle
from data.importers.plan import ImportPlan, SessionChoice
from data.store import PooledStore
from tests.glmsingle_tree import save_table, scan, write_glmsingle, write_laion

TRUTH = scan("sub-01")
ALL = SessionChoice()
LAYOUTS = {
    "hdf5": dict(kind="hdf5"),
    "hdf5-sessions": dict(kind="hdf5", per_session=True),
    "npy": dict(kind="npy"),
    "npy-sessions": dict(kind="npy", per_session=True),
    "laion": None,
}


def write(layout: str, source: Path, truths=(TRUTH,)) -> Path:
    options = LAYOUTS[layout]
    return write_laion(source, list(truths)) if options is None else write_glmsingle(source, list(truths), **options)


def plan(source: Path, **options) -> ImportPlan:
    return plan_glmsingle(source, **({"subjects": None, "sessions": ALL} | options))


def written(found: ImportPlan, path: Path) -> PooledStore:
    """The store that a plan without problems makes."""
    assert found.problems == []
    store = PooledStore.open_or_create(path, name="x")
    for subject in found.subjects:
        store.write_subject(subject)
    return store


def imported(source: Path, name: str = "store.zarr", **options) -> PooledStore:
    return written(plan(source, **options), source.parent / name)


def problems(source: Path, **options) -> list[str]:
    """The problems of a plan that plans nothing."""
    found = plan(source, **options)
    assert found.subjects == []
    assert all("\n" not in line for line in found.problems)
    return found.problems


def the_problem(source: Path, **options) -> str:
    (line,) = problems(source, **options)
    return line


def edit(path: Path, change) -> None:
    """Replace a table by what `change` makes of it."""
    save_table(path, change(pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)))


def all_tables(source: Path) -> list[Path]:
    return sorted(source.rglob("*_events.tsv"))


def with_ids(source: Path) -> None:
    for path in all_tables(source):
        edit(
            path,
            lambda table: table.assign(image_id=["n/a" if s == "n/a" else f"lab-{s[5:7]}" for s in table.stim_file]),
        )
