"""Ray Train and DeepSpeed against the local engine, on a Ray cluster that the tests start themselves."""

import threading
import time
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import ray
from safetensors.torch import load_file

from cluster.config import ClusterConfig
from cluster.launch import connect, train_on_ray
from foundation.config import ComputeConfig
from foundation.tracking.runs import TrackedRun, client
from foundation.training.checkpoints import checkpoints
from foundation.training.course import train_run
from foundation.training.engine import LocalEngine
from foundation.training.reporter import Reporter, read_metrics
from foundation.training.run import Plan, describe_run
from tests.tiny_store import tiny_recipe
from tests.tracked_plan import tracked_plan

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_cluster", "module_home"),
    # Ray's client closes its sockets and log files when it is collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def metric(plan: Plan, name: str) -> list[float]:
    history = client(plan.tracking_uri).get_metric_history(plan.tracking_run, name)
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def losses(plan: Plan) -> list[float]:
    return metric(plan, "train/loss")


def newest_weights(plan: Plan) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in load_file(checkpoints(plan.directory)[-1] / "model.safetensors").items()}


def train_here(plan: Plan, *, parts: int = 1) -> None:
    with closing(Reporter(TrackedRun(plan.tracking_run, plan.tracking_uri), plan.directory)) as reporter:
        train_run(plan, partial(LocalEngine, compute=ComputeConfig(accumulate=parts)), reporter)


def stop_at(plan: Plan, step: int) -> None:
    """Ask a run to stop once it has come to a step."""
    while max([at for at, _ in read_metrics(plan.directory)], default=0) < step:
        time.sleep(0.005)
    (plan.directory / "stop").touch()


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_workers_have_the_losses_of_one_process_that_takes_each_step_in_two_parts(store, zero_stage):
    # A field that is solved may be smaller than a cell: Adam would make steps out of its gradient's rounding errors.
    recipe = tiny_recipe(store, epochs=2, start="random")
    recipe = replace(recipe, optim=replace(recipe.optim, stage1_share=0.5))
    local, remote = tracked_plan(recipe), tracked_plan(recipe)
    train_here(local, parts=2)
    train_on_ray(remote, ClusterConfig(workers=2, zero_stage=zero_stage))
    assert describe_run(remote.directory)["status"] == "trained"
    assert len(losses(local)) == 10
    np.testing.assert_allclose(losses(remote), losses(local), rtol=1e-5)
    np.testing.assert_allclose(metric(remote, "train/grad_norm"), metric(local, "train/grad_norm"), rtol=1e-4)
    np.testing.assert_allclose(metric(remote, "validation/voxel_r"), metric(local, "validation/voxel_r"), atol=1e-5)
    ours, theirs = newest_weights(local), newest_weights(remote)
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        np.testing.assert_allclose(theirs[name], weights, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_run_moves_between_stages_numbers_of_workers_and_engines_and_ends_as_if_it_had_not(store):
    recipe = tiny_recipe(store, epochs=10, start="random")
    recipe = replace(recipe, backbone=replace(recipe.backbone, dropout=0.0, latent=None))  # which differ by rank
    whole, moved = tracked_plan(recipe), tracked_plan(recipe)
    train_here(whole)
    for until, cluster in ((3, ClusterConfig(workers=2, zero_stage=2)), (20, ClusterConfig(workers=1, zero_stage=3))):
        stopper = threading.Thread(target=stop_at, args=(moved, until), daemon=True)
        stopper.start()
        train_on_ray(moved, cluster)
        stopper.join()
        assert describe_run(moved.directory)["status"] == "interrupted"
        (moved.directory / "stop").unlink()
    train_here(moved)
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-5)
    ours, theirs = newest_weights(whole), newest_weights(moved)
    for name, weights in ours.items():
        np.testing.assert_allclose(theirs[name], weights, rtol=1e-3, atol=1e-5, err_msg=name)


def test_what_a_worker_says_when_it_refuses_reaches_the_caller_in_a_line_and_is_not_tried_again(store):
    recipe = tiny_recipe(store)
    odd = replace(recipe, optim=replace(recipe.optim, batch_size=25))
    with pytest.raises(ValueError, match=r"^a worker failed: .*batch size 25 is not a multiple of 2 workers"):
        train_on_ray(tracked_plan(odd), ClusterConfig(workers=2))


def test_workers_that_never_fit_the_cluster_are_refused_at_once(store):
    with pytest.raises(ValueError, match=r"64 workers with 1 CPU each don't fit the Ray cluster.*--cluster.workers"):
        train_on_ray(tracked_plan(tiny_recipe(store)), ClusterConfig(workers=64))


def test_an_address_that_does_not_answer_is_named():
    ray.shutdown()
    with pytest.raises(ValueError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*leave the address out"):
        connect(ClusterConfig(address="127.0.0.1:1"))
