"""MLflow: runs and the model registry. Nothing outside this package knows it."""
