"""``python -m foundation.ui`` (``make ui``): MLflow's own UI on our runs."""

import os
import subprocess
import sys

from data.command_line import CommonOptions, Session, begin, run
from foundation.tracking.runs import experiment_id, tracking_uri

# MLflow's server starts workers for jobs that we don't have.
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def ui(*, port: int = 5000, host: str = "127.0.0.1", session: CommonOptions = Session()) -> None:
    """Open MLflow's UI on the runs and the registry.

    Args:
        port: port to listen on.
        host: address to listen on.
        session: common options.
    """
    begin(session)
    uri = tracking_uri()
    if uri.startswith("http"):
        print(f"the runs are tracked by a server; open {uri}")
        return
    page = f"http://{host}:{port}/#/experiments/{experiment_id()}/runs?workflowType=machine_learning"
    print(f"runs of {uri}\nopen {page}\nCtrl-C ends it", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    raise SystemExit(subprocess.run(command, env=os.environ | ENVIRONMENT, check=False).returncode)


def main() -> None:
    """Run the command line."""
    run(ui, program="python -m foundation.ui", description=__doc__)


if __name__ == "__main__":
    main()
