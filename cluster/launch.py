"""Run a training plan on a Ray cluster: join one or start one, place the workers, wait, and pass on a stop."""

import json
import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.config import ClusterConfig
from data.home import VARIABLE, home
from foundation.checkpoint import StorageError, write_json
from foundation.config import Recipe
from foundation.model.encoding_model import EncodingModel
from foundation.training.checkpoints import newest_step
from foundation.training.course import start_run, train_run
from foundation.training.engine import Engine
from foundation.training.reporter import Reporter, follow
from foundation.training.run import Plan, describe_run, set_threads

REFUSAL = "refusal.json"
"""Where a worker leaves what it had to say for people, in the run's directory."""
HEALTH_CHECK_VARIABLE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
NEW = "local"
"""Ray's own word for the address of a cluster that is yet to be started; ``auto`` is that for one on this machine."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a worker is told besides its plan."""

    plan: Plan
    cluster: ClusterConfig
    environment: dict[str, str]


def connect(cluster: ClusterConfig) -> None:
    """Join the Ray cluster that the settings or ``$RAY_ADDRESS`` (set in a job) name; else start one for this process.

    One that merely runs on this machine isn't joined: it may be another run's own, and end with it.

    Raises
    ------
    ValueError
        If the one that is named doesn't answer.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = cluster.address or os.environ.get("RAY_ADDRESS") or NEW
    if address == NEW:
        n_cpus = max(os.cpu_count() or 1, math.ceil(cluster.workers * cluster.cpus_per_worker))
        ray.init(address=NEW, num_cpus=n_cpus, include_dashboard=False, **options)
        return
    _check_answers(address)
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster answers at {address}: {error}") from error


def _check_answers(address: str) -> None:
    """Raise ValueError where nobody listens at ``host:port``: Ray itself tries for minutes, then ends the process."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at {address} ({error}); start it, or leave the address out"
        ) from error


def _worker(setting: dict[str, Any]) -> None:
    """Be one worker: everything from reading the store to the last checkpoint."""
    told: Setting = setting["setting"]
    os.environ.update(told.environment)
    if told.cluster.gpus_per_worker == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from cluster.deepspeed_engine import DeepSpeedEngine
    from foundation.tracking.runs import TrackedRun

    context = ray.train.get_context()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    set_threads(context.get_local_world_size())
    plan = told.plan

    def make_engine(model: EncodingModel, recipe: Recipe) -> Engine:
        return DeepSpeedEngine(model, recipe, told.cluster)

    if context.get_world_rank() != 0:
        with _refusing(plan):
            train_run(plan, make_engine, lambda metrics, step: None)
        return
    with (
        closing(Reporter(TrackedRun(plan.tracking_run, plan.tracking_uri), plan.directory)) as reporter,
        _refusing(plan),
    ):
        status = train_run(plan, make_engine, reporter, tell=reporter.tell)
    describe_run(plan.directory, status=status)


@contextmanager
def _refusing(plan: Plan) -> Iterator[None]:
    """Leave the message of an error that wouldn't go better another time, for whoever waits."""
    try:
        yield
    except (ValueError, StorageError, FileNotFoundError, PermissionError) as error:
        with suppress(OSError):
            write_json(plan.directory / REFUSAL, str(error))
        raise


def train_on_ray(plan: Plan, cluster: ClusterConfig) -> None:
    """Train on Ray workers; returns when they have finished or stopped, the outcome is in the run's ``run.json``.

    A worker that dies or hangs is replaced, and training goes on from the newest checkpoint: Ray's own restarts would
    also try again what can't go well, such as settings that don't fit.

    Raises
    ------
    ValueError
        If a worker refused (its message, in one line), or died or hung `retries` times without a new checkpoint.
    """
    connect(cluster)
    check_room(cluster)
    describe_run(plan.directory, cluster=cluster.kept())
    start_run(plan)  # here, so that workers find it and don't write it side by side
    refusal = plan.directory / REFUSAL
    refusal.unlink(missing_ok=True)
    with follow(plan.directory) as told:
        n_failures, newest = 0, newest_step(plan.directory)
        while (error := _fit_once(plan, cluster, told)) is not None:
            told()
            if refusal.exists():
                raise ValueError(f"a worker failed: {json.loads(refusal.read_text())}") from error
            if not isinstance(error, (TrainingFailedError, RayError)):
                raise error
            what = _what_happened(error)
            reached = newest_step(plan.directory)
            n_failures = 1 if reached > newest else n_failures + 1
            newest = reached
            if n_failures > cluster.retries:
                again = f", {n_failures} times in a row" if n_failures > 1 else ""
                raise ValueError(f"{what}{again}; --resume goes on from the last checkpoint") from error
            if (plan.directory / "stop").exists():
                print(f"{what}; not started again, for a stop was asked for", flush=True)
                describe_run(plan.directory, status="interrupted")
                return
            again = f"attempt {n_failures} of {cluster.retries}"
            print(f"{what}; training goes on from step {newest} ({again})", flush=True)


def _fit_once(plan: Plan, cluster: ClusterConfig, told: Callable[[], None]) -> BaseException | None:
    """Have workers train, and return what went wrong."""
    environment = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    environment[VARIABLE] = str(home())
    setting = Setting(plan=plan, cluster=cluster, environment=environment)
    os.environ[HEALTH_CHECK_VARIABLE] = str(math.ceil(cluster.timeout_s))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"setting": setting},
        torch_config=TorchConfig(timeout_s=math.ceil(cluster.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(cluster),
            placement_strategy=cluster.placement.upper(),
        ),
        run_config=RunConfig(
            name=plan.directory.name,
            storage_path=str(home() / "ray"),
            failure_config=FailureConfig(controller_failure_limit=0),  # workers that don't even start: we try again
        ),
    )
    # Ray installs its own Ctrl-C, which drops the workers at once, unless fit() is called outside the main thread; ours
    # lets them write a checkpoint first. A daemon, so that a second Ctrl-C needn't wait for it.
    errors: list[BaseException] = []
    fitting = threading.Thread(target=_fit, args=(trainer, errors), daemon=True)
    fitting.start()
    while fitting.is_alive():
        fitting.join(0.2)
        told()
    return errors[0] if errors else None


def _fit(trainer: TorchTrainer, errors: list[BaseException]) -> None:
    """Fit, and leave what went wrong in `errors` for the thread that waits."""
    try:
        trainer.fit()
    except BaseException as error:  # noqa: BLE001  (raised again by the caller)
        errors.append(error)


def _what_happened(error: Exception) -> str:
    """Return why workers failed, in a line. Who waits for a dead worker fails too, so those that died go first."""
    if not isinstance(error, TrainingFailedError):
        return f"Ray lost the run ({_last_line(error)})"
    failures = sorted((getattr(error, "worker_failures", None) or {}).items())
    for rank, failure in failures:
        cause = getattr(failure, "health_check_failure", failure)
        if isinstance(cause, RayActorError):
            return f"worker {rank} died"
        if "Timeout" in type(failure).__name__:
            return f"worker {rank} doesn't answer"
    return f"worker {failures[0][0]} failed: {_last_line(failures[0][1])}" if failures else _last_line(error)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def check_room(cluster: ClusterConfig) -> None:
    """Raise ValueError where the cluster could never place the workers: waiting for it would look like work."""
    have = ray.cluster_resources()
    for resource, each in _resources(cluster).items():
        if have.get(resource, 0) < each * cluster.workers:
            raise ValueError(
                f"{cluster.workers} workers with {each:g} {resource} each don't fit the Ray cluster, which has "
                f"{have.get(resource, 0):g}; lower --cluster.workers or --cluster.{resource.lower()}s-per-worker"
            )


def _resources(cluster: ClusterConfig) -> dict[str, float]:
    wanted = {"CPU": cluster.cpus_per_worker}
    return wanted | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
