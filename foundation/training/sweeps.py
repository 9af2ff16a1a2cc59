"""A sweep as a directory: what describes it, its trials, and which one may be resumed.

``run.json`` is like a training run's, with the search space as it was written; below are ``trial-000/`` and so on.
"""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from data.home import home
from foundation.config import Recipe, differences
from foundation.training.run import describe_run, run_named
from foundation.training.search_space import Settings, with_settings
from foundation.training.trials import Trial


def sweeps_dir() -> Path:
    """Return the directory of all sweeps."""
    return home() / "sweeps"


def new_sweep(recipe: Recipe) -> Path:
    """Make a directory for a new sweep."""
    path = sweeps_dir() / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    path.mkdir(parents=True)
    return path


def trials_of(sweep: Path, recipe: Recipe, settings: Sequence[Settings]) -> list[Trial]:
    """Return a sweep's trials."""
    described = describe_run(sweep)
    return [
        Trial(
            index=index,
            settings=of_trial,
            recipe=with_settings(recipe, of_trial),
            store=described["store"],
            directory=_trial_directory(sweep, index),
            parent=described["tracking_run"],
            tracking_uri=described["tracking_uri"],
        )
        for index, of_trial in enumerate(settings)
    ]


def sweep_to_resume(
    recipe: Recipe, space: Sequence[str], data_digest: str, *, early_stop: bool, name: str | None, n_trials: int | None
) -> Path:
    """Return the sweep called `name`, or the newest of the same recipe, space and data, where something is left to do.

    Parameters
    ----------
    n_trials : trials that it is to have; None: as many as it has.

    Raises
    ------
    ValueError
        If there is none, or the one named is done, has more trials, or other settings or data.
    """
    if name is None:
        found = [p.parent for p in sweeps_dir().glob("*/run.json")]
        found = [
            p for p in found if not _differences(p, recipe, space, data_digest, early_stop) and _is_left(p, n_trials)
        ]
        if not found:
            raise ValueError(
                f"no sweep of this recipe, space and data in {sweeps_dir()} has anything left to do; name one "
                "(--resume SWEEP takes its own settings), enlarge it with --trials, or start one without --resume"
            )
        return max(found, key=lambda p: describe_run(p)["created"])
    path = sweep_named(name)
    if different := _differences(path, recipe, space, data_digest, early_stop):
        raise ValueError(
            f"sweep {name!r} has other settings than those given: {'; '.join(different)}; leave them out, and its own "
            "are taken"
        )
    have = describe_run(path)["trials"]
    if n_trials is not None and n_trials < have:
        raise ValueError(f"sweep {name!r} has {have} trials; --trials {n_trials} can only enlarge it")
    if not _is_left(path, n_trials):
        raise ValueError(f"sweep {name!r} is finished; --trials above {have} enlarges it")
    return path


def sweep_named(name: str) -> Path:
    """Return the directory of a sweep.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    return run_named(name, among=sweeps_dir(), kind="sweep")


def _trial_directory(sweep: Path, index: int) -> Path:
    return sweep / f"trial-{index:03d}"


def _differences(sweep: Path, recipe: Recipe, space: Sequence[str], data_digest: str, early_stop: bool) -> list[str]:
    """Return where a sweep has other settings or data, each as a phrase."""
    described = describe_run(sweep)
    found = differences(recipe, Recipe.from_json(described["recipe"]))
    if described["space"] != list(space):
        found.append(f"--space {' '.join(described['space'])}")
    if described["early_stop"] != early_stop:
        found.append("--early-stop" if described["early_stop"] else "--no-early-stop")
    if described["data_digest"] != data_digest:
        found.append(f"the data in {described['store']} have changed since")
    return found


def _is_left(sweep: Path, n_trials: int | None) -> bool:
    """Return whether any of the trials that a sweep has, or is to have, isn't settled."""
    have = describe_run(sweep)["trials"]
    if n_trials is not None and n_trials < have:
        return False
    return not all((_trial_directory(sweep, i) / "result.json").exists() for i in range(n_trials or have))
