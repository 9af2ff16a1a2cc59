"""Run a sweep's trials on a Ray cluster with Ray Tune, some at once, and stop those that are behind (ASHA).

Tune gets trials by number and knows no search space: what a trial is, and how far it has come, is the trial's own
(`foundation.training.trials`). A resumed sweep therefore gives Tune all trials anew; those that are settled tell their
scores again, so that the scheduler knows what the others are up against.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from data.home import VARIABLE, home
from foundation.tracking.runs import TrackingError
from foundation.training.run import set_threads
from foundation.training.trials import SCORE, Outcome, Trial, train_trial

GRACE = 4
"""ASHA lets every trial run this part of its epochs (a quarter), then half of the trials go on, and again at twice
that, and so on."""
HALVING = 2
SETTINGS_OF_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a banner at any verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV and TensorBoard files
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may stop before its first score
}
"""Tune prints and writes nothing of its own, and takes reports without a score."""
_POLL_S = 0.2
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a trial's process is told."""

    trials: tuple[Trial, ...]
    at_once: int
    environment: dict[str, str]


def run_trials(
    trials: Sequence[Trial],
    *,
    at_once: int,
    early_stop: bool,
    gpus_per_trial: float,
    stop: Path,
    tell: Tell,
) -> list[Outcome]:
    """Run trials on the cluster that we are connected to; return what came of each once all ended, or `stop` is there.

    Parameters
    ----------
    at_once : trials that train at the same time, each in a process with its share of the cores.
    early_stop : stop trials that are behind the others after the same number of epochs.
    stop : a file that asks all trials to stop after their step.
    tell : is told a line per epoch and per trial that ends; Tune pickles it with its settings.

    Raises
    ------
    ValueError
        If the cluster has no room for a trial.
    """
    _check_room(gpus_per_trial)
    os.environ.update(SETTINGS_OF_TUNE)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    environment = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    environment |= {VARIABLE: str(home()), "MLFLOW_TRACKING_URI": trials[0].tracking_uri}
    for trial in trials:
        trial.directory.mkdir(parents=True, exist_ok=True)
        trial.stop.unlink(missing_ok=True)
    setting = Setting(trials=tuple(trials), at_once=at_once, environment=environment)
    watch = _Watch(trials, stop, tell)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_train, setting=setting), {"CPU": 1, "GPU": gpus_per_trial}),
        param_space={"trial": tune.grid_search([trial.index for trial in trials])},
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(trials, early_stop), max_concurrent_trials=at_once, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=trials[0].directory.parent.name, storage_path=str(home() / "ray"), verbose=0, callbacks=[watch]
        ),
    )
    _fit(tuner, trials, stop)
    return watch.outcomes()


def _train(config: dict[str, Any], *, setting: Setting) -> None:
    """Be a trial's process: Tune calls it with the trial's number."""
    os.environ.update(setting.environment)
    set_threads(setting.at_once)
    tune.report({"epoch": 0})  # Tune prints a line of its own about a trial that ends without any report
    train_trial(setting.trials[config["trial"]], lambda epoch, score: tune.report({"epoch": epoch, SCORE: score}))


def _scheduler(trials: Sequence[Trial], early_stop: bool) -> TrialScheduler:
    if not early_stop:
        return FIFOScheduler()
    epochs = max(trial.recipe.optim.epochs for trial in trials)
    return ASHAScheduler(
        time_attr="epoch",
        metric=SCORE,
        mode="max",
        max_t=epochs,
        grace_period=math.ceil(epochs / GRACE),
        reduction_factor=HALVING,
    )


class _Watch(tune.Callback):
    """Settles each trial that ends, and tells how it goes. Tune calls it, one call after the other."""

    def __init__(self, trials: Sequence[Trial], stop: Path, tell: Tell) -> None:
        self._trials, self._stop, self._tell = trials, stop, tell
        self._told = {trial.index: len(trial.scores) for trial in trials}
        self._left: dict[int, Outcome] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Mapping, **info: Any) -> None:
        """Tell an epoch's score, unless it was told before a restart."""
        index = trial.config["trial"]
        if SCORE in result and result["epoch"] > self._told[index]:
            self._told[index] = result["epoch"]
            self._tell(f"trial {index}: epoch {result['epoch']}, validation r {result[SCORE]:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Settle a trial that is over; leave one that was asked to stop, be it before it started."""
        ended = self._trials[trial.config["trial"]]
        if ended.is_settled or (self._stop.exists() and not ended.known):
            return
        if self._stop.exists() and not ended.is_trained:
            self._leave(ended, f"interrupted after epoch {len(ended.scores)}", tracked_as="KILLED")
            return
        try:
            self._tell(f"trial {ended.index}: {ended.settle().status}")
        except TrackingError as error:
            self._tell(f"trial {ended.index}: its run in MLflow stays as it was: {error}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Leave a trial that failed; it is tried again when the sweep is resumed."""
        failed = self._trials[trial.config["trial"]]
        lines = [line for line in str(trial.get_error()).splitlines() if line.strip()]
        self._leave(failed, f"failed: {lines[-1].strip()}", tracked_as="FAILED")

    def _leave(self, trial: Trial, status: str, *, tracked_as: str) -> None:
        self._left[trial.index] = trial.outcome(status)
        self._tell(f"trial {trial.index}: {status}")
        try:
            trial.track_end(self._left[trial.index], tracked_as)
        except TrackingError as error:
            self._tell(f"trial {trial.index}: its run in MLflow stays as it was: {error}")

    def outcomes(self) -> list[Outcome]:
        """Return what came of each trial."""
        return [self._left.get(trial.index) or trial.outcome() for trial in self._trials]


def _fit(tuner: tune.Tuner, trials: Sequence[Trial], stop: Path) -> None:
    """Wait for Tune; once `stop` is there, ask every trial to stop after its step.

    Tune has a Ctrl-C of its own, which drops trials at once, unless it is called outside the main thread. A daemon, so
    that a second Ctrl-C needn't wait for it.
    """
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # noqa: BLE001  (raised again by the caller)
            errors.append(error)

    fitting = threading.Thread(target=fit, daemon=True)
    fitting.start()
    while fitting.is_alive():
        fitting.join(_POLL_S)
        if stop.exists():
            for trial in trials:
                trial.stop.touch()
    if errors:
        raise errors[0]


def _check_room(gpus_per_trial: float) -> None:
    """Raise ValueError where the cluster could never place a trial: waiting for it would look like work."""
    have = ray.cluster_resources().get("GPU", 0)
    if have < gpus_per_trial:
        raise ValueError(
            f"--gpus-per-trial {gpus_per_trial:g} don't fit the Ray cluster, which has {have:g}; lower it, or join "
            f"another with --address"
        )
