"""Models beside baselines on the same subject, tokens, sessions and split; and the numbers that a run is known by."""

from collections.abc import Mapping, Sequence

import numpy as np

from data.preprocess import Preprocessing
from data.splits import Split
from data.store import SubjectStore, TokenReader
from foundation.evaluation.baselines import BASELINES
from foundation.evaluation.evaluated import Course, System, evaluate_subject
from foundation.evaluation.score import Scores
from foundation.model.encoding_model import EncodingModel


def score_subject(
    models: Mapping[str, EncodingModel],
    subject: SubjectStore,
    tokens: TokenReader,
    split: Split,
    *,
    pictures: dict[int, str],
    baselines: Sequence[str] = ("ridge",),
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    seed: int = 0,
    n_bootstraps: int = 1000,
    n_samples: int = 0,
) -> Scores:
    """Score models and baselines on a subject's test images, all with the same sessions to learn from.

    Parameters
    ----------
    pictures
        The store's (`PooledStore.picture_digests`), for the leakage audit, which comes before a baseline is fitted.
    baselines
        Names of `foundation.evaluation.baselines.BASELINES`; what they predict is kept in the home, fitted once.
    n_samples
        Single trials that each model draws for an image, to be scored as a distribution; 0: none.

    Raises
    ------
    ValueError
        If the audit finds a leak, a baseline is unknown, or a model has a baseline's name.
    """
    course = Course(
        baselines=tuple(baselines),
        n_sessions=n_sessions,
        preprocessing=preprocessing,
        seed=seed,
        n_bootstraps=n_bootstraps,
        n_samples=n_samples,
    )
    systems = {name: System(model=model, tokens=tokens) for name, model in models.items()}
    evaluated = evaluate_subject(systems, subject, split, course, baseline_tokens=tokens, pictures=pictures)
    return evaluated.scores["strict"]


NAMES = {
    ("voxel", "r"): "voxel_r",
    ("pattern", "r"): "pattern_r",
    ("voxel", "mse"): "mse",
    ("voxel", "r2_ceiling"): "r2_ceiling",
}


def headline(scores: Scores, system: str = "manybrains") -> dict[str, float]:
    """Return the numbers that a run is known by, against repeat means; docs/mlflow.md lists them.

    Means over subjects: ``test/<metric>`` for voxel_r, pattern_r, mse and r2_ceiling, the others' beside it
    (``test/voxel_r_ridge``, ``test/voxel_r_ceiling``, ...), and ``test/voxel_r/roi/<roi>``. One subject's:
    ``test/voxel_r/subject/<subject>``. What is undefined is left out.
    """
    values: dict[str, list[float]] = {}
    for row in scores.rows:
        metric = NAMES.get((row.axis, row.metric))
        if row.target != "mean" or metric is None or row.value is None:
            continue
        ours = row.system == system
        if row.system == "ceiling" and metric == "r2_ceiling":  # 1 by definition
            continue
        if row.roi == "all" and (ours or row.system in (*BASELINES, "ceiling")):
            values.setdefault(f"test/{metric}" + ("" if ours else f"_{row.system}"), []).append(row.value)
        if ours and metric == "voxel_r":
            place = f"subject/{row.subject}" if row.roi == "all" else f"roi/{row.roi}"
            values.setdefault(f"test/{metric}/{place}", []).append(row.value)
    return {key: float(np.mean(found)) for key, found in values.items()}
