"""What a lab's machines do to a run on Ray: workers that die or hang, damaged checkpoints and stores."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from cluster.config import ClusterConfig
from cluster.launch import train_on_ray
from foundation.config import Recipe
from foundation.training.checkpoints import checkpoints, read_progress
from foundation.training.reporter import read_metrics
from foundation.training.run import Plan, describe_run
from tests.tiny_store import ENCODER, make_tiny_store, tiny_recipe
from tests.tracked_plan import tracked_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("ray_cluster", "module_home"),
    # Ray's client closes its sockets and log files when it is collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
INTERVAL, EPOCHS = 20, 40
CLUSTER = ClusterConfig(workers=2, timeout_s=20.0)


def workers() -> list[psutil.Process]:
    """The processes of this machine's Ray Train workers that are ours."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # gone meanwhile, or not yet taken note of by its parent
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def once_under_way(plan: Plan, harm: Callable[[], None]) -> threading.Thread:
    """Do `harm` once the run has its second checkpoint."""

    def wait_and_harm() -> None:
        while len(checkpoints(plan.directory)) < 2:
            time.sleep(0.02)
        harm()

    thread = threading.Thread(target=wait_and_harm, daemon=True)
    thread.start()
    return thread


def weights(plan: Plan) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in load_file(checkpoints(plan.directory)[-1] / "model.safetensors").items()}


def losses(plan: Plan) -> list[float]:
    return [metrics["train/loss"] for _, metrics in read_metrics(plan.directory)]


@pytest.fixture(scope="module")
def recipe(store: Path) -> Recipe:
    return tiny_recipe(store, epochs=EPOCHS, checkpoint_every=INTERVAL)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, session_home: Path, ray_cluster) -> Plan:
    """A run that nothing happened to."""
    plan = tracked_plan(recipe)
    train_on_ray(plan, CLUSTER)
    return plan


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "died"), (signal.SIGSTOP, "doesn't answer")],
    ids=["killed", "hung"],
)
def test_a_worker_that_dies_or_hangs_is_replaced_and_the_run_ends_as_if_it_had_not(recipe, whole, capfd, number, said):
    plan, harmed = tracked_plan(recipe), []

    def harm() -> None:
        victim = workers()[1]
        harmed.append((victim, checkpoints(plan.directory)[-1].name))
        os.kill(victim.pid, number)

    thread = once_under_way(plan, harm)
    train_on_ray(plan, CLUSTER)
    thread.join()
    ((victim, newest),) = harmed
    told = capfd.readouterr().out
    assert re.search(rf"^worker \d {said}; training goes on from step \d+ \(attempt 1 of 3\)$", told, re.MULTILINE)
    resumed_at = int(told.split("going on from step ")[1].split()[0])
    assert resumed_at >= int(newest.removeprefix("step-"))  # at most one interval is lost
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
    assert describe_run(plan.directory)["status"] == "trained"
    expected = weights(whole)
    for name, value in weights(plan).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert [step for step, _ in read_metrics(plan.directory)] == list(range(1, 5 * EPOCHS + 1))
    np.testing.assert_allclose(losses(plan), losses(whole), rtol=1e-6)


def test_a_worker_that_dies_again_and_again_ends_the_run_with_what_happened(recipe):
    plan = tracked_plan(recipe)
    stopped = threading.Event()

    def kill_every_worker() -> None:
        while not stopped.is_set():
            for worker in workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
            time.sleep(0.5)

    thread = threading.Thread(target=kill_every_worker)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r", 2 times in a row; --resume goes on from the last checkpoint"):
            train_on_ray(plan, replace(CLUSTER, retries=1))
    finally:
        stopped.set()
        thread.join()


def test_a_corrupted_newest_checkpoint_is_passed_over_and_said_so(recipe, whole, capfd):
    plan = tracked_plan(replace(recipe, keep_checkpoints=10))
    (plan.directory / "stop").touch()
    train_on_ray(plan, CLUSTER)  # starts, and stops before the first step
    (plan.directory / "stop").unlink()
    train_on_ray(plan, CLUSTER)
    *_, older, newest = checkpoints(plan.directory)
    data = (newest / "optimiser.safetensors").read_bytes()
    (newest / "optimiser.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capfd.readouterr()
    train_on_ray(plan, CLUSTER)
    told = capfd.readouterr().out
    assert f"passing over a damaged checkpoint: {newest / 'optimiser.safetensors'} is damaged" in told
    assert f"going on from step {read_progress(older).step}" in told
    expected = weights(whole)
    for name, value in weights(plan).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_damaged_chunk_of_the_store_ends_the_run_with_its_name_and_is_not_tried_again(tmp_path, capfd):
    store = tmp_path / "damaged.zarr"
    make_tiny_store(store)
    recipe = tiny_recipe(store, start="random")
    plan = tracked_plan(recipe)
    train_on_ray(replace(plan, recipe=replace(recipe, optim=replace(recipe.optim, epochs=1))), CLUSTER)
    chunk = max(
        (p for p in (store / "features" / ENCODER).rglob("*") if p.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 255
    chunk.write_bytes(data)
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"^a worker failed: .*(damaged|checksum|CRC)"):
        train_on_ray(plan, CLUSTER)
    assert "attempt" not in capfd.readouterr().out
