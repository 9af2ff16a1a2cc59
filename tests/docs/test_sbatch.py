"""The SLURM script, run with stand-ins for SLURM, Ray and the training, which write down what is asked of them."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.scripts.scripts import start

SCRIPT = Path(__file__).parents[2] / "docs/manifests/pretrain.sbatch"

STAND_IN = """#!{python}
import os, pathlib, signal, socket, sys, time
name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
scene = pathlib.Path(os.environ["SCENE"])

def tell(*words):
    with open(scene / "told", "a") as file:
        file.write(" ".join(words) + "\\n")

def until_term(then, code):
    def end(number, frame):
        tell(*then)
        os._exit(code)
    signal.signal(signal.SIGTERM, end)
    tell(name, "ready", *args[:2])
    while not (scene / f"{{name}}-ends").exists():
        time.sleep(0.02)
    os._exit(int((scene / f"{{name}}-ends").read_text()))

if name == "srun":
    i = next(i for i, word in enumerate(args) if word in ("ray", "hostname"))
    tell(name, *args)
    os.execvp(args[i], args[i:])
elif name == "hostname":
    print("127.0.0.1 10.0.0.1")
elif name == "scontrol" and args[0] == "show" and args[1] == "hostnames":
    print("node1\\nnode2\\nnode3" if args[2] == "node[1-3]" else args[2])
elif name == "scontrol" and args[0] == "show":
    print("JobId=" + args[2] + " JobState=" + os.environ.get("STATE", "RUNNING") + " Reason=None")
elif name == "ray":
    if "--head" in args:
        port = next(int(word.split("=")[1]) for word in args if word.startswith("--port="))
        listening = socket.create_server(("127.0.0.1", port))
    until_term(("ray stopped", args[1]), 0)
elif name == "python" and args[0] == "-c":
    tell("nodes?", *args[2:])
    started = (scene / "told").read_text().count("ray ready")  # the other machines are one step
    sys.exit("NEVER_IN" in os.environ or started < min(int(args[-1]), 2))
elif name == "python":
    tell(name, *args)
    until_term(("checkpoint",), 130)
elif name == "sleep":
    time.sleep(0.02)
else:
    tell(name, *args)
"""


class Job:
    """A job of the script, on a machine where everything that it calls is a stand-in."""

    def __init__(self, scene: Path, **environment: str) -> None:
        self.scene = scene
        commands = scene / "bin"
        commands.mkdir(exist_ok=True)
        for name in ("srun", "scontrol", "hostname", "ray", "python", "sleep"):
            (commands / name).write_text(STAND_IN.format(python=sys.executable))
            (commands / name).chmod(0o755)
        (scene / ".ray").mkdir(exist_ok=True)
        (scene / ".ray/auth_token").write_text("token")
        self.environment = {
            "PATH": f"{commands}:/usr/bin:/bin",
            "HOME": str(scene),
            "SCENE": str(scene),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_MEM_PER_NODE": "1000",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURM_GPUS_ON_NODE": "4",
        } | environment
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> None:
        command = ["bash", str(SCRIPT), *options]
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def told(self) -> list[str]:
        path = self.scene / "told"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + 30
        while not any(found.startswith(line) for found in self.told()):
            assert time.monotonic() < deadline, f"no {line!r} in {self.told()}"
            time.sleep(0.02)

    def end(self, name: str, status: int) -> None:
        """Let the stand-in called `name` end."""
        temporary = self.scene / f".{name}-ends"
        temporary.write_text(str(status))
        temporary.rename(self.scene / f"{name}-ends")

    def outcome(self) -> tuple[int, str]:
        assert self.process is not None
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(**environment: str) -> Job:
        made.append(Job(tmp_path, **environment))
        return made[-1]

    yield make
    for job in made:
        if job.process is not None and job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def position(told: list[str], start: str) -> int:
    """Return where the only line that begins so is."""
    (found,) = (i for i, line in enumerate(told) if line.startswith(start))
    return found


def last(told: list[str], line: str) -> int:
    """Return where `line` is for the last time."""
    return max(i for i, found in enumerate(told) if found == line)


def ports(told: list[str]) -> set[str]:
    return set(re.findall(r"--port=(\d+)", "\n".join(told)))


def test_the_script_is_sound_shell():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck is not None
    subprocess.run([shellcheck, SCRIPT], check=True)


def test_the_head_comes_first_then_the_others_then_the_run_once_all_are_in(make_job):
    job = make_job()
    job.start("base", "--store", "/data/nsd.zarr", "--subjects", "1", "2")
    job.wait_for("python ready")
    job.end("python", 0)
    status, output = job.outcome()
    told = job.told()
    assert status == 0, output
    (port,) = ports(told)
    address = f"127.0.0.1:{port}"
    order = [
        position(told, "srun --nodes=1 --ntasks=1 --nodelist=node1 hostname"),
        position(told, "srun --export=ALL --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=node1"),
        position(told, "ray ready start --head"),
        position(told, "srun --export=ALL --nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=node2,node3"),
        position(told, f"ray ready start --address={address}"),
        last(told, f"nodes? {address} 3"),
        position(told, "python -m foundation.pretrain"),
        position(told, "ray stopped --head"),
    ]
    assert order == sorted(order)
    run = told[position(told, "python -m")]
    assert run == (
        "python -m foundation.pretrain base --store /data/nsd.zarr --subjects 1 2 --cluster.preset multi-node "
        f"--cluster.address {address} --cluster.workers 12 --cluster.gpus-per-worker 1 --cluster.cpus-per-worker 4"
    )
    position(told, f"ray stopped --address={address}")
    assert not any("requeue" in line for line in told)


def test_a_ray_node_has_the_job_s_share_of_its_machine(make_job):
    job = make_job()
    job.start()
    job.wait_for("python ready")
    job.end("python", 0)
    job.outcome()
    nodes = [line for line in job.told() if " ray start " in line]
    assert len(nodes) == 2
    for line in nodes:
        assert "--cpus-per-task=16 ray start" in line
        assert "--temp-dir=/tmp/ray-4711 " in line
        assert "--num-cpus=16 --num-gpus=4 --object-store-memory=104857600" in line


def test_without_gpus_a_worker_for_each_machine(make_job):
    job = make_job(SLURM_JOB_NODELIST="node1")
    del job.environment["SLURM_GPUS_ON_NODE"]
    job.start()
    job.wait_for("python ready")
    job.end("python", 0)
    job.outcome()
    run = job.told()[position(job.told(), "python -m")]
    assert "--cluster.workers 1 --cluster.gpus-per-worker 0 --cluster.cpus-per-worker 16" in run
    assert len([line for line in job.told() if " ray start " in line]) == 1


def test_on_term_the_run_writes_a_checkpoint_then_ray_ends_then_the_job_is_queued_again(make_job):
    job = make_job()
    job.start()
    job.wait_for("python ready")
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)  # as `--signal=B:TERM@120`: to the script alone
    status, output = job.outcome()
    told = job.told()
    assert status == 130, output
    assert told.index("checkpoint") < position(told, "ray stopped --head") < told.index("scontrol requeue 4711")
    assert told[-1] == "scontrol requeue 4711"


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED", "COMPLETING"])
def test_a_job_that_slurm_ends_itself_is_not_queued_again(make_job, state):
    job = make_job(STATE=state)
    job.start()
    job.wait_for("python ready")
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    status, _ = job.outcome()
    assert status == 130
    assert "checkpoint" in job.told()
    assert "scontrol requeue 4711" not in job.told()


def test_a_run_that_fails_ends_the_job_with_its_status_and_is_not_queued_again(make_job):
    job = make_job()
    job.start()
    job.wait_for("python ready")
    job.end("python", 7)
    assert job.outcome()[0] == 7
    assert "scontrol requeue 4711" not in job.told()
    position(job.told(), "ray stopped --head")


def test_a_job_that_was_queued_again_resumes_and_a_first_start_does_not(make_job):
    for count, resumes in (("0", False), ("1", True), ("12", True)):
        job = make_job(SLURM_RESTART_COUNT=count)
        job.start("base")
        job.wait_for("python ready")
        job.end("python", 0)
        job.outcome()
        run = job.told()[position(job.told(), "python -m")]
        assert run.endswith(" --resume") is resumes
        for name in ("told", "python-ends"):
            (job.scene / name).unlink()


def test_two_jobs_on_a_machine_have_ports_of_their_own(make_job):
    found = []
    with socket.create_server(("127.0.0.1", 24713)) as taken:
        for job_id in ("4711", "4712", "4713"):
            job = make_job(SLURM_JOB_ID=job_id, SLURM_JOB_NODELIST="node1")
            job.start()
            job.wait_for("python ready")
            job.end("python", 0)
            job.outcome()
            found += ports(job.told())
            for name in ("told", "python-ends"):
                (job.scene / name).unlink()
        assert taken.getsockname()[1] == 24713
    assert found == ["24711", "24712", "24714"]


def test_a_ray_node_that_ends_while_others_are_waited_for_ends_the_job(make_job):
    job = make_job(NEVER_IN="yes")
    job.start()
    job.wait_for("nodes?")
    job.end("ray", 1)
    status, output = job.outcome()
    assert status == 1
    assert "pretrain.sbatch: a Ray node ended" in output
    assert not any(line.startswith("python") for line in job.told())


def test_term_before_the_run_began_ends_what_was_started(make_job):
    job = make_job(NEVER_IN="yes")
    job.start()
    job.wait_for("nodes?")
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    status, output = job.outcome()
    assert status == 1
    assert "stopped before the run began" in output
    position(job.told(), "ray stopped --head")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("SLURM_MEM_PER_NODE", "submit with --mem"),
        ("SLURM_CPUS_PER_TASK", "submit with --cpus-per-task"),
        ("token", "ray get-auth-token --generate"),
        ("ray", "activate the environment"),
    ],
)
def test_what_is_missing_is_named_before_anything_starts(make_job, missing, message):
    job = make_job()
    job.environment.pop(missing, None)
    if missing == "token":
        (job.scene / ".ray/auth_token").unlink()
    if missing == "ray":
        (job.scene / "bin/ray").unlink()
    job.start()
    status, output = job.outcome()
    assert status == 1
    assert message in output
    assert job.told() == []


def test_ray_start_has_the_options_that_the_script_uses():
    text = SCRIPT.read_text()
    body = text[text.index("ray start") :]
    used = set(re.findall(r"(?<!srun )--(?:head|node-ip-address|port|include-dashboard|address)\b", body))
    used |= set(re.findall(r"--[a-z-]+", body[: body.index("&\n")]))
    known = {option for parameter in start.params for option in parameter.opts}
    assert len(used) > 8
    assert used <= known, used - known


def test_slurm_signals_the_script_and_may_queue_it_again():
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))
    assert directives["signal"] == "B:TERM@120"
    assert "requeue" in directives
    assert directives["open-mode"] == "append"
    assert directives["ntasks-per-node"] == "1"
    assert {"mem", "cpus-per-task"} <= set(directives)
