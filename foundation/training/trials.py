"""One trial of a sweep: a run in a directory of its own that only ever sees training and validation images.

::

    trial-000/trial.json      settings and run in MLflow; written by who trains
    trial-000/metrics.jsonl   every step's metrics, among them each epoch's score; by who trains
    trial-000/result.json     what came of it, once nothing is left to do; by who waits for all trials
    trial-000/best/           the model of its best epoch; checkpoints are removed with the result

A trial that was stopped, killed or lost goes on from its newest checkpoint, and tells the epochs before it again.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foundation.checkpoint import write_json
from foundation.config import Recipe
from foundation.tracking.runs import TrackedRun
from foundation.training.course import START, train_run
from foundation.training.engine import LocalEngine
from foundation.training.reporter import Reporter, read_metrics
from foundation.training.run import Plan
from foundation.training.search_space import Settings, told_settings

SCORE = "validation/voxel_r"
"""What trials are compared by: the network's mean voxelwise correlation on validation images."""
BEST = "validation/best_voxel_r"
"""A trial's score at its best epoch; of a sweep, that of its best trial."""
Report = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a trial so far."""

    trial: int
    settings: Settings
    status: str
    epochs: int
    best: float | None
    best_epoch: int | None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried, and where."""

    index: int
    settings: Settings
    recipe: Recipe
    store: str
    directory: Path
    parent: str
    """The sweep's run in MLflow."""
    tracking_uri: str

    @property
    def stop(self) -> Path:
        """The file that asks it to stop after the step that it is in."""
        return self.directory / "stop"

    @property
    def result(self) -> Path:
        """The file that says what came of it."""
        return self.directory / "result.json"

    @property
    def known(self) -> dict[str, Any]:
        """What ``trial.json`` holds so far."""
        path = self.directory / "trial.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note(self, **entries: Any) -> None:
        """Add to ``trial.json``."""
        write_json(self.directory / "trial.json", {"settings": self.settings} | self.known | entries)

    @property
    def scores(self) -> dict[int, float]:
        """The score of each epoch so far, by step."""
        return {step: metrics[SCORE] for step, metrics in read_metrics(self.directory) if SCORE in metrics}

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to do."""
        return self.result.exists()

    @property
    def is_trained(self) -> bool:
        """Whether it came to its own end."""
        return bool(self.known.get("trained")) or len(self.scores) >= self.recipe.optim.epochs

    def outcome(self, status: str = "not started") -> Outcome:
        """Return what came of it; `status` is what to say of one that isn't settled."""
        if self.is_settled:
            return Outcome(**json.loads(self.result.read_text()))
        scores = list(self.scores.values())
        best = max(scores, default=None)
        return Outcome(
            trial=self.index,
            settings=self.settings,
            status=status,
            epochs=len(scores),
            best=best,
            best_epoch=None if best is None else scores.index(best) + 1,
        )

    def settle(self) -> Outcome:
        """Write what came of a trial that has ended, by itself or because it was behind the others."""
        outcome = self.outcome("finished" if self.is_trained else f"stopped at epoch {len(self.scores)}")
        write_json(self.result, asdict(outcome))
        for made in ("checkpoints", START):
            shutil.rmtree(self.directory / made, ignore_errors=True)
        self.track_end(outcome, "FINISHED")
        return outcome

    def track_end(self, outcome: Outcome, status: str) -> None:
        """End its run in MLflow: FINISHED, FAILED or KILLED."""
        if "tracking_run" not in self.known:
            return
        tracked = TrackedRun(self.known["tracking_run"], self.tracking_uri)
        tracked.tag({"status": outcome.status})
        if outcome.best is not None:
            tracked.log({BEST: outcome.best})
        tracked.finish(status)

    def tracked(self) -> TrackedRun:
        """Return its run in MLflow, a child of the sweep's, started or opened again."""
        if "tracking_run" in self.known:
            found = TrackedRun(self.known["tracking_run"], self.tracking_uri)
            found.reopen()
            return found
        name = f"{self.directory.parent.name}/{self.index:03d}"
        tags = {"recipe": self.recipe.name, "store": self.store, "settings": told_settings(self.settings)}
        started = TrackedRun.start(name, kind="trial", config=self.recipe.to_json(), tags=tags, parent=self.parent)
        self.note(tracking_run=started.id)
        return started


def train_trial(trial: Trial, report: Report) -> None:
    """Train a trial on from where it stands, in this process, until its end or until its `stop` is there.

    `report` is told epoch and score, those from before a restart first; it may raise SystemExit to end the trial.
    """
    scores = trial.scores
    for epoch, score in enumerate(scores.values(), 1):
        report(epoch, score)
    if trial.is_settled or trial.is_trained or trial.stop.exists():
        return
    tracked = trial.tracked()
    plan = Plan(
        recipe=trial.recipe,
        store=trial.store,
        directory=trial.directory,
        tracking_uri=trial.tracking_uri,
        tracking_run=tracked.id,
    )
    with closing(Reporter(tracked, trial.directory)) as reporter:

        def log(metrics: Mapping[str, float], step: int) -> None:
            reporter(metrics, step)
            if SCORE in metrics and step not in scores:  # one that is there was measured before a restart
                scores[step] = metrics[SCORE]
                report(len(scores), metrics[SCORE])

        status = train_run(plan, LocalEngine, log, tell=reporter.tell)
    if status == "trained":
        trial.note(trained=True)
