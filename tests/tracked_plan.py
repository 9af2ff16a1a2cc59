"""A run that is tracked in the test's own MLflow database."""

from foundation.config import Recipe
from foundation.tracking.runs import TrackedRun
from foundation.training.run import Plan, new_run


def tracked_plan(recipe: Recipe) -> Plan:
    directory = new_run(recipe)
    tracked = TrackedRun.start(directory.name, kind="pretrain", config={}, tags={})
    assert recipe.data.store is not None
    return Plan(
        recipe=recipe,
        store=recipe.data.store,
        directory=directory,
        tracking_uri=tracked.uri,
        tracking_run=tracked.id,
    )
