"""Ray Train and DeepSpeed against the local engine, on a Ray cluster that the tests start themselves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.torch import load_file

from cluster.config import ClusterConfig
from cluster.launch import NEW, connect, train_on_ray
from foundation.checkpoint import checkpoints
from foundation.config import Recipe
from foundation.tracking.runs import TrackedRun, client
from foundation.training.course import start_run, train_run
from foundation.training.engine import LocalEngine
from foundation.training.reporter import Reporter
from foundation.training.run import Plan, describe_run, new_run
from tests.tiny_store import make_tiny_store, tiny_recipe

pytestmark = [
    pytest.mark.timeout(600),
    # Ray's client closes its sockets and log files when it is collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    make_tiny_store(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    connect(ClusterConfig(address=NEW))
    yield
    ray.shutdown()


@pytest.fixture
def home(session_home: Path) -> Path:
    """One home for the module: its MLflow database is made once."""
    return session_home


def plan_of(recipe: Recipe) -> Plan:
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


def metric(plan: Plan, name: str) -> list[float]:
    history = client(plan.tracking_uri).get_metric_history(plan.tracking_run, name)
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def losses(plan: Plan) -> list[float]:
    return metric(plan, "train/loss")


def newest_weights(plan: Plan) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in load_file(checkpoints(plan.directory)[-1] / "model.safetensors").items()}


@pytest.mark.parametrize(("zero_stage", "stage1_share"), [(0, None), (1, 0.5)])
def test_one_deepspeed_worker_has_the_local_engines_losses(store, home, zero_stage, stage1_share):
    # A field that is solved may be smaller than a cell: Adam would make steps out of its gradient's rounding errors.
    recipe = tiny_recipe(store, epochs=2, start="random")
    recipe = replace(recipe, optim=replace(recipe.optim, stage1_share=stage1_share))
    local, remote = plan_of(recipe), plan_of(recipe)
    reporter = Reporter(TrackedRun(local.tracking_run, local.tracking_uri), local.directory)
    train_run(local, LocalEngine, reporter)
    reporter.flush()
    train_on_ray(remote, ClusterConfig(workers=1, zero_stage=zero_stage))
    assert describe_run(remote.directory)["status"] == "trained"
    assert len(losses(local)) == 10
    np.testing.assert_allclose(losses(remote), losses(local), rtol=1e-5)
    np.testing.assert_allclose(metric(remote, "train/grad_norm"), metric(local, "train/grad_norm"), rtol=1e-4)
    ours, theirs = newest_weights(local), newest_weights(remote)
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        np.testing.assert_allclose(theirs[name], weights, rtol=1e-3, atol=1e-5, err_msg=name)


def test_two_workers_stopped_and_resumed_end_as_if_they_had_not_been(store, home):
    recipe = tiny_recipe(store, epochs=2)
    cluster = ClusterConfig(workers=2)
    whole, stopped = plan_of(recipe), plan_of(recipe)
    for plan in (whole, stopped):
        start_run(plan)
    train_on_ray(whole, cluster)

    (stopped.directory / "stop").touch()
    train_on_ray(stopped, cluster)
    assert describe_run(stopped.directory)["status"] == "interrupted"
    assert [p.name for p in checkpoints(stopped.directory)] == ["step-0000000"]
    (stopped.directory / "stop").unlink()
    train_on_ray(stopped, cluster)
    assert describe_run(stopped.directory)["status"] == "trained"
    ours, theirs = newest_weights(whole), newest_weights(stopped)
    for name, weights in ours.items():
        np.testing.assert_allclose(theirs[name], weights, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_a_worker_says_when_it_fails_reaches_the_caller_in_a_line(store, home):
    recipe = tiny_recipe(store)
    odd = replace(recipe, optim=replace(recipe.optim, batch_size=25))
    with pytest.raises(ValueError, match=r"^a worker failed: .*batch size 25 is not a multiple of 2 workers"):
        train_on_ray(plan_of(odd), ClusterConfig(workers=2))


def test_workers_that_never_fit_the_cluster_are_refused_at_once(store, home):
    with pytest.raises(ValueError, match=r"64 workers with 1 CPU each don't fit the Ray cluster.*--cluster.workers"):
        train_on_ray(plan_of(tiny_recipe(store)), ClusterConfig(workers=64))


def test_an_address_that_does_not_answer_is_named():
    ray.shutdown()
    with pytest.raises(ValueError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*leave the address out"):
        connect(ClusterConfig(address="127.0.0.1:1"))
