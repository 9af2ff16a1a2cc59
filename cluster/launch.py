"""Run a training plan on a Ray cluster: join one or start one, place the workers, wait, and pass on a stop."""

import logging
import math
import os
import socket
import threading
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.config import ClusterConfig
from data.home import VARIABLE, home
from foundation.training.course import start_run, train_run
from foundation.training.reporter import Reporter, follow
from foundation.training.run import Plan, describe_run, set_threads

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
    rank = context.get_world_rank()
    reporter = Reporter(TrackedRun(plan.tracking_run, plan.tracking_uri) if rank == 0 else None, plan.directory)
    status = train_run(plan, lambda model, optim: DeepSpeedEngine(model, optim, told.cluster), reporter)
    reporter.flush()
    if rank == 0:
        describe_run(plan.directory, status=status)


def train_on_ray(plan: Plan, cluster: ClusterConfig) -> None:
    """Train on Ray workers; returns when they have finished or stopped, the outcome is in the run's ``run.json``.

    Raises
    ------
    ValueError
        If a worker failed (its message, in one line), or Ray itself.
    """
    connect(cluster)
    _check_room(cluster)
    start_run(plan)  # here, so that workers find it and don't write it side by side
    environment = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    environment[VARIABLE] = str(home())
    setting = Setting(plan=plan, cluster=cluster, environment=environment)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"setting": setting},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(cluster),
        ),
        run_config=RunConfig(name=plan.directory.name, storage_path=str(home() / "ray")),
    )
    # Ray installs its own Ctrl-C, which drops the workers at once, unless fit() is called outside the main thread; ours
    # lets them write a checkpoint first. A daemon, so that a second Ctrl-C needn't wait for it.
    errors: list[Exception] = []
    fitting = threading.Thread(target=_fit, args=(trainer, errors), daemon=True)
    fitting.start()
    with follow(plan.directory) as told:
        while fitting.is_alive():
            fitting.join(0.2)
            told()
    if errors and isinstance(errors[0], TrainingFailedError):
        raise ValueError(f"a worker failed: {_cause(errors[0])}") from errors[0]
    if errors and isinstance(errors[0], RayError):
        first_line = str(errors[0]).strip().splitlines()[0]
        raise ValueError(f"Ray lost the run ({first_line}); --resume goes on from its last checkpoint") from errors[0]
    if errors:
        raise errors[0]


def _fit(trainer: TorchTrainer, errors: list[Exception]) -> None:
    """Fit, and leave what went wrong in `errors` for the thread that waits."""
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001  (raised again by the caller)
        errors.append(error)


def _check_room(cluster: ClusterConfig) -> None:
    """Raise ValueError where the cluster could never place the workers: waiting for it would look like work."""
    have = ray.cluster_resources()
    for resource, each in _resources(cluster).items():
        if have.get(resource, 0) < each * cluster.workers:
            raise ValueError(
                f"{cluster.workers} workers with {each:g} {resource} each don't fit the Ray cluster, which has "
                f"{have.get(resource, 0):g}; lower --cluster.workers or --cluster.{resource.lower()}s-per-worker"
            )


def _cause(error: TrainingFailedError) -> str:
    """Return what the first worker that failed had to say, in a line."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    first = next(iter(failures.values()))
    lines = [line for line in str(first).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(first).__name__


def _resources(cluster: ClusterConfig) -> dict[str, float]:
    wanted = {"CPU": cluster.cpus_per_worker}
    return wanted | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
