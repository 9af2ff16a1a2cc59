"""What MLflow runs to load a registered version: a model from code, copied into each by `foundation.tracking`."""

from mlflow.models import set_model

from foundation.tracking.pyfunc import VoxelResponses

set_model(VoxelResponses())
