"""What a run keeps of its scores: headline metrics, every row as JSON, a figure."""

import tempfile
from pathlib import Path

from foundation.evaluation.compare import headline
from foundation.evaluation.figures import bars_per_roi
from foundation.evaluation.score import Scores
from foundation.evaluation.table import write_rows_json
from foundation.tracking.runs import TrackedRun


def log_scores(run: TrackedRun, scores: Scores) -> None:
    """Log the headline, ``scores.json``, ``comparisons.json`` and ``scores.png``."""
    run.log(headline(scores))
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_rows_json(scores.rows, directory / "scores.json")
        write_rows_json(scores.comparisons, directory / "comparisons.json")
        bars_per_roi(scores, directory / "scores.png")
        for file in sorted(directory.iterdir()):
            run.artifact(file)
