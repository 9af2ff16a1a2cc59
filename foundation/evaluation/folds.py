"""K-fold cross-validation of baselines on one subject: every image tests once, by a split that a hash decides.

Each fold is scored as a test set is (:func:`foundation.evaluation.compare.score_subject`: own standardisation from the
fold's training images, own tuning, own leakage audit). The error bar is the standard error over folds,

    sd(values, ddof=1) / sqrt(n_folds),

which takes folds for independent. They share training images, so it's somewhat too small, and no unbiased estimate
exists (Bengio & Grandvalet 2004): it tells how much a score depends on the images, and replaces no test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.preprocess import Preprocessing
from data.splits import Split, fold_split
from data.store import SubjectStore, TokenReader
from foundation.evaluation.compare import score_subject
from foundation.evaluation.score import Row, Scores


@dataclass(frozen=True)
class CrossValidated:
    """Scores of the folds, and their means."""

    rows: tuple[Row, ...]
    """`value`: mean over folds; `low`, `high`: the mean less and plus one standard error; `n_images`: of all folds."""
    folds: tuple[Scores, ...]
    """Each fold's own rows, without intervals."""
    notes: tuple[str, ...]

    def values(self, row: Row) -> tuple[float | None, ...]:
        """The folds' own values behind a row of `rows`."""
        key = _key(row)
        return tuple(next(r.value for r in fold.rows if _key(r) == key) for fold in self.folds)


def cross_validate(
    subject: SubjectStore,
    tokens: TokenReader,
    split: Split,
    *,
    pictures: dict[int, str],
    baselines: Sequence[str] = ("ridge",),
    n_folds: int = 5,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> CrossValidated:
    """Cross-validate baselines, floors and ceiling beside them.

    Parameters
    ----------
    split
        Any split of the store, for its images; folds are of all of them (:func:`data.splits.fold_split`), so images
        that the store's own split holds out train here. A model that was chosen on these is no honest contestant.
    pictures, baselines, n_sessions, preprocessing, seed
        As in :func:`foundation.evaluation.compare.score_subject`.
    tell
        Told a line when a fold begins.

    Raises
    ------
    ValueError
        If a fold can't be scored: the audit finds a leak, or the subject saw no image of the fold or none beside it.
    """
    folds = []
    for k in range(n_folds):
        tell(f"{subject.name}: fold {k + 1} of {n_folds}")
        of_fold = fold_split(split, k, n_folds)
        folds.append(
            score_subject(
                {},
                subject,
                tokens,
                of_fold,
                pictures=pictures,
                baselines=baselines,
                n_sessions=n_sessions,
                preprocessing=preprocessing,
                seed=seed,
                n_bootstraps=0,
            )
        )
    return average_folds(folds)


def average_folds(folds: Sequence[Scores]) -> CrossValidated:
    """Mean and standard error over folds of every row, in the first fold's order.

    Undefined where any fold is: a mean over the others would be of other images than its neighbours in the table.

    Raises
    ------
    ValueError
        If there are fewer than two folds, or their rows differ in more than their numbers.
    """
    if len(folds) < 2:
        raise ValueError(f"a standard error over folds needs at least 2 of them, got {len(folds)}")
    tables = [{_key(row): row for row in fold.rows} for fold in folds]
    if any(table.keys() != tables[0].keys() for table in tables):
        raise ValueError("folds hold rows of other systems, ROIs or metrics than the first; score them alike")
    rows = tuple(_average([table[key] for table in tables]) for key in tables[0])
    subject = folds[0].rows[0].subject if folds[0].rows else ""
    own = f"{subject}: mean over {len(folds)} folds of all images, [ ]: less and plus one standard error over folds"
    # What is said of every fold; counts of voxels differ and belong to the folds' own notes.
    shared = [note for note in folds[0].notes if all(note in fold.notes for fold in folds)]
    return CrossValidated(rows, tuple(folds), (own, *shared))


def _key(row: Row) -> tuple[str, ...]:
    return row.system, row.subject, row.roi, row.protocol, row.axis, row.target, row.metric


def _average(rows: list[Row]) -> Row:
    n_images, n_voxels = sum(row.n_images for row in rows), min(row.n_voxels for row in rows)
    values = [row.value for row in rows if row.value is not None]
    if len(values) < len(rows):
        return replace(rows[0], value=None, low=None, high=None, n_images=n_images, n_voxels=n_voxels)
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return replace(rows[0], value=mean, low=mean - error, high=mean + error, n_images=n_images, n_voxels=n_voxels)
