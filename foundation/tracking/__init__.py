"""MLflow: runs and the model registry. Nothing outside this package knows it."""

import os

# Before any of our modules imports MLflow, which reads them then. By its own defaults it reports usage to its makers,
# and a call to a server that is down takes minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
