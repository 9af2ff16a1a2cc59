"""What runs keep of scores: headline metrics, every row as JSON, figures; and the baselines as runs of their own."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from data.voxels import Surface, Volume
from foundation.evaluation.baselines import BASELINES
from foundation.evaluation.compare import headline
from foundation.evaluation.curve import curve_rows, write_curve
from foundation.evaluation.figures import bars_per_roi, learning_curve, maps
from foundation.evaluation.protocols import ProtocolStep
from foundation.evaluation.score import CEILING, FLOORS, Measured, Row, Scores
from foundation.evaluation.table import write_rows_csv, write_rows_json, write_whole
from foundation.tracking.runs import TrackedRun, find_runs, quoted

DATA_TAGS = (
    "subject",
    "subjects",
    "sessions",
    "seed",
    "store",
    "store_digest",
    "split_digest",
    "preprocessing",
    "preprocessing_digest",
    "code_version",
)
"""Tags of a run that tell what its baselines learned from; the others are of its model."""


def log_evaluation(
    run: TrackedRun,
    scores: Mapping[str, Scores],
    *,
    systems: Mapping[str, str],
    part: str = "test",
    steps: Sequence[ProtocolStep] = (),
    further: Sequence[Row] = (),
) -> None:
    """Log an evaluation: by protocol, the headline of one of `systems` and every row and note.

    Strict scores are logged as a training run's are; on other images than test ones their metrics begin with the
    part's name. Those of ``chasm-legacy`` begin with that, so that nobody compares them with strict ones by mistake.
    `further` rows, of permutations and folds, are kept in ``further-rows.json``.
    """
    for protocol, of_protocol in scores.items():
        found = headline(of_protocol, systems[protocol])
        if protocol != "strict":
            found = {f"{protocol}/{key}": value for key, value in found.items()}
        if part != "test":
            found = {key.replace("test/", f"{part}/", 1): value for key, value in found.items()}
        run.log(found)
        suffix = "" if protocol == "strict" else f"-{protocol}"
        with _kept(run) as directory:
            write_rows_json(of_protocol.rows, directory / f"scores{suffix}.json")
            write_rows_csv(of_protocol.rows, directory / f"scores{suffix}.csv")
            write_rows_json(of_protocol.comparisons, directory / f"comparisons{suffix}.json")
            write_whole(json.dumps(of_protocol.notes, indent=1) + "\n", directory / f"notes{suffix}.json")
            bars_per_roi(of_protocol, directory / f"scores{suffix}.png")
    with _kept(run) as directory:
        for name, rows in (("protocol-steps", steps), ("further-rows", further)):
            if rows:
                write_rows_json(rows, directory / f"{name}.json")


def log_scores(run: TrackedRun, scores: Scores, *, system: str = "manybrains") -> None:
    """Log the headline of `system`, ``scores.json``, ``comparisons.json`` and ``scores.png``."""
    run.log(headline(scores, system))
    with _kept(run) as directory:
        write_rows_json(scores.rows, directory / "scores.json")
        write_rows_json(scores.comparisons, directory / "comparisons.json")
        bars_per_roi(scores, directory / "scores.png")


def log_curve(
    run: TrackedRun, points: Sequence[tuple[int, Scores]], *, n_train: Mapping[int, int] | None = None
) -> None:
    """Log a learning curve: headlines with sessions as their step, ``curve.json``, ``curve.csv`` and ``curve.png``.

    Parameters
    ----------
    points
        Numbers of sessions, and the scores of systems that learned from so many.
    n_train
        Training images by number of sessions.
    """
    rows = curve_rows(points, n_train=n_train)
    run.log_steps([(n_sessions, headline(scores)) for n_sessions, scores in points])
    with _kept(run) as directory:
        write_curve(rows, directory / "curve.json")
        write_curve(rows, directory / "curve.csv")
        learning_curve(points, directory / "curve.png", n_train=n_train)


def log_maps(
    run: TrackedRun,
    predicted: Float32[np.ndarray, "image voxel"],
    measured: Measured,
    *,
    images: Sequence[str],
    place: Volume | Surface | None,
) -> None:
    """Log ``maps-<subject>.png``: predicted beside measured responses to three test images (`images`: their names)."""
    with _kept(run) as directory:
        maps(
            predicted,
            measured.mean,
            directory / f"maps-{measured.subject}.png",
            images=images,
            place=place,
            families=measured.families,
            title=f"{measured.subject}: mean of an image's repeats, and the prediction",
        )


def log_baselines(
    scores: Scores, *, tags: Mapping[str, str], parent: str | None = None, uri: str | None = None
) -> list[str]:
    """Log each baseline in `scores` as a run of kind ``baseline``, with the metrics that a model's run has.

    A baseline that was logged before, with the same data, split, seed and code, isn't logged again.

    Parameters
    ----------
    tags
        Those of the run that the baselines were scored in; of them, `DATA_TAGS` are kept.
    parent
        Run to stand under, if any.
    uri
        Server that has that run; default: ours.

    Returns
    -------
    run_ids
        A run for each baseline, new or found, in the order of `BASELINES`.
    """
    scored = {row.system for row in scores.rows}
    subjects = list(dict.fromkeys(row.subject for row in scores.rows))
    of_data = {key: tags[key] for key in DATA_TAGS if key in tags}
    who = subjects[0] if len(subjects) == 1 else f"{len(subjects)}-subjects"
    amount = f"-{tags['sessions']}s" if "sessions" in tags else ""
    run_ids = []
    for name in (name for name in BASELINES if name in scored):
        lineage = {"baseline": name} | of_data
        known = _finished_baseline(lineage, uri)
        if known is not None:
            run_ids.append(known)
            continue
        run = TrackedRun.start(
            f"{name}-{who}{amount}", kind="baseline", config=lineage, tags=lineage, parent=parent, uri=uri
        )
        try:
            log_scores(run, _of_system(scores, name), system=name)
        except BaseException as error:
            run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        run.finish()
        run_ids.append(run.id)
    return run_ids


def _finished_baseline(lineage: Mapping[str, str], uri: str | None) -> str | None:
    """Return the newest finished run with exactly this lineage."""
    wanted = {"kind": "baseline", **lineage}
    same = " and ".join(f"tags.`manybrains.{key}` = {quoted(value)}" for key, value in wanted.items())
    for run in find_runs(f"attributes.status = 'FINISHED' and {same}", uri=uri):
        if not any(f"manybrains.{key}" in run.data.tags for key in DATA_TAGS if key not in lineage):
            return run.info.run_id
    return None


def _of_system(scores: Scores, system: str) -> Scores:
    """Return what is said of one system, the floors and the ceiling; a baseline's run is no single model's."""
    beside = {system, *FLOORS, CEILING}
    return replace(
        scores,
        rows=tuple(row for row in scores.rows if row.system in beside),
        comparisons=tuple(c for c in scores.comparisons if {c.system, c.versus} <= beside),
    )


@contextmanager
def _kept(run: TrackedRun) -> Iterator[Path]:
    """Give a directory whose files the run keeps."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            run.artifact(file)
