"""A lab's own tables of trials: BIDS ``events.tsv``, GLMsingle's or LAION-fMRI's ``trials.tsv``, in the order of betas.

A row is a trial; ``n/a`` is an empty cell. The columns that are read::

    stim_file, stimulus_file, image_file, image, filename, label, stimulus or trial_type (the first that is there):
                 the picture that the trial showed; a row that has none (n/a, blank, baseline, fixation, rest) was not
                 modelled as a trial and is passed over
    image_id     optional: the data set's own id of the image
    session      optional: a number, or ses-01; without it, ses-01 in the path of the file
    run          optional: a number, or run-01; without it, run-01 in the name of the file
    beta_index   optional: the trial's place among the betas of its session, from 0
    onset        optional: seconds, in BIDS from the start of the run
    split        optional: train, validation or test

Betas are taken to be in the order of session, run and then beta_index, onset or row, whichever is there first.

A trial's time is in seconds from the first trial of its session. Onsets tell it where they never fall within a session,
as they do if they start anew with each of several runs, whose own starts a table doesn't have. Then times are left out
of all sessions, chosen or not, since all must have the same columns.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int16, Shaped

STIMULUS = ("stim_file", "stimulus_file", "image_file", "image", "filename", "label", "stimulus", "trial_type")
NO_PICTURE = {"", "n/a", "na", "nan", "none", "null", "blank", "baseline", "fixation", "rest"}


@dataclass(frozen=True, kw_only=True)
class TrialTable:
    """Trials that showed a picture, in the order of betas; what the table doesn't tell is None."""

    paths: tuple[Path, ...]
    stimulus: Shaped[np.ndarray, " trial"] | None
    image_id: Shaped[np.ndarray, " trial"] | None
    session: Int16[np.ndarray, " trial"] | None
    run: Int16[np.ndarray, " trial"] | None
    time_s: Float32[np.ndarray, " trial"] | None
    """Seconds from the first trial of the session."""
    role: Shaped[np.ndarray, " trial"] | None
    n_passed_over: int
    """Rows that showed no picture."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> Shaped[np.ndarray, " trial"]:
        """What tells one image from another: its id, else the name of its picture."""
        found = self.stimulus if self.image_id is None else self.image_id
        assert found is not None
        return found


def find_tables(directory: Path) -> list[Path]:
    """Return a subject's tables: ``trials.tsv`` or ``*_trials.tsv``, else ``events.tsv`` or ``*_events.tsv``.

    Raises
    ------
    ValueError
        If there is none, or there are events of several tasks.
    """
    for kind in ("trials", "events"):
        found = sorted(p for p in directory.rglob(f"*{kind}.tsv") if p.name == f"{kind}.tsv" or f"_{kind}." in p.name)
        tasks = sorted({task for p in found for task in re.findall(r"task-([A-Za-z0-9]+)", p.name)})
        if len(tasks) > 1:
            raise ValueError(
                f"{directory} has {kind} of several tasks ({', '.join(tasks)}); put those of the betas into a "
                f"directory and give it by --trials"
            )
        if found:
            return found
    raise ValueError(f"{directory} has no trials.tsv or events.tsv; put it there or give it by --trials")


def session_of(path: Path) -> int | None:
    """Return the session that a file's name or directories tell (``ses-03``), or None."""
    for part in reversed(path.parts):
        if told := re.search(r"ses-0*(\d+)(?![A-Za-z0-9])", part):
            return int(told[1])
    return None


def read_trials(paths: list[Path]) -> TrialTable:
    """Read tables that together have the trials of one subject.

    Raises
    ------
    ValueError
        If one can't be read, lacks a column that is needed or that others have, or holds a value that makes no sense.
    """
    tables: list[_Rows] = []
    errors: list[str] = []
    for path in paths:
        try:
            tables.append(_read(path))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors))
    for path, table in zip(paths, tables, strict=True):
        if odd := set(table.columns) ^ set(tables[0].columns):
            raise ValueError(f"{path} and {paths[0]} differ in their column {min(odd)!r}; make them alike")
    columns = {name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns}
    n_trials = len(next(iter(columns.values())))
    if n_trials == 0:
        raise ValueError(f"{paths[0]}: no row names a picture; fill in the column that should")
    keys = [columns[name] for name in ("beta_index", "onset") if name in columns][:1]
    keys += [columns[name] for name in ("run", "session") if name in columns]
    order = np.lexsort(keys) if keys else np.arange(n_trials)
    columns = {name: column[order] for name, column in columns.items()}
    _check_beta_index(paths[0], columns)

    def column(name: str, kind: type[np.generic]) -> np.ndarray | None:
        return columns[name].astype(kind) if name in columns else None

    return TrialTable(
        paths=tuple(paths),
        stimulus=columns.get("stimulus"),
        image_id=columns.get("image_id"),
        session=column("session", np.int16),
        run=column("run", np.int16),
        time_s=_times(columns),
        role=columns.get("split"),
        n_passed_over=sum(table.n_passed_over for table in tables),
    )


def _times(columns: dict[str, np.ndarray]) -> Float32[np.ndarray, " trial"] | None:
    """Return seconds from the first trial of each session; None where onsets are absent or fall within one."""
    if "onset" not in columns:
        return None
    onset = columns["onset"]
    session = columns.get("session", np.zeros(len(onset)))  # in order by now
    _, first, place = np.unique(session, return_index=True, return_inverse=True)
    fell = (np.diff(onset) < 0) & (np.diff(session) == 0)
    return None if fell.any() else (onset - onset[first][place]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of one file that show a picture, by column."""

    columns: dict[str, np.ndarray]
    n_passed_over: int


def _read(path: Path) -> _Rows:
    try:
        raw = pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t", dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; check --trials") from error
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} is not a readable table of tab-separated columns ({error}); save it anew") from error
    cells = {str(name): np.array([str(cell).strip() for cell in raw[name]], object) for name in raw.columns}
    named = next((name for name in STIMULUS if name in cells), None)
    if named is None and "image_id" not in cells:
        raise ValueError(
            f"{path} has the columns {', '.join(cells)}; one that names the picture is needed, such as stim_file"
        )
    shown = np.array([cell.casefold() not in NO_PICTURE for cell in cells[named or "image_id"]], bool)
    row = np.flatnonzero(shown) + 1
    cells = {name: column[shown] for name, column in cells.items()}
    columns: dict[str, np.ndarray] = {}
    if named is not None:
        columns["stimulus"] = cells[named]
    if "image_id" in cells:
        columns["image_id"] = cells["image_id"]
        if empty := [k for k, cell in zip(row, cells["image_id"], strict=True) if cell in ("", "n/a")]:
            raise ValueError(f"{path}, row {empty[0]}: no image_id for a picture; fill it in or drop the column")
    run = re.search(r"run-0*(\d+)", path.name)
    for name, told in (("session", session_of(path)), ("run", int(run[1]) if run else None)):
        if name in cells:
            columns[name] = _numbers(path, name, cells[name], row, whole=True)
        elif told is not None:
            columns[name] = np.full(len(row), float(told))
    for name in ("beta_index", "onset"):
        if name in cells:
            columns[name] = _numbers(path, name, cells[name], row, whole=name == "beta_index")
    if "split" in cells:
        columns["split"] = np.where(cells["split"] == "n/a", "", cells["split"])
    return _Rows(columns=columns, n_passed_over=int((~shown).sum()))


def _numbers(path: Path, name: str, cells: np.ndarray, row: np.ndarray, *, whole: bool) -> np.ndarray:
    """Return a column as numbers; a whole one may have its BIDS key before it, as in ses-01."""
    out = np.empty(len(cells))
    for k, cell in enumerate(cells):
        try:
            out[k] = float(re.sub(r"^[A-Za-z]+-", "", cell) if whole else cell)
        except ValueError:
            out[k] = np.nan
        if not np.isfinite(out[k]) or (whole and not (out[k] % 1 == 0 and 0 <= out[k] < 1 << 15)):
            what = "a whole number from 0" if whole else "a number"
            raise ValueError(f"{path}, row {row[k]}: {name} {cell!r} is not {what}; correct it")
    return out


def _check_beta_index(path: Path, columns: dict[str, np.ndarray]) -> None:
    if "beta_index" not in columns:
        return
    index = columns["beta_index"]
    session = columns.get("session", np.zeros(len(index)))
    for number in np.unique(session):
        here = index[session == number]
        if not np.array_equal(here, np.arange(len(here))):
            raise ValueError(
                f"{path}: beta_index of session {number:g} doesn't run from 0 to {len(here) - 1} in the order of runs; "
                f"correct it or drop the column"
            )
