"""A registered version as MLflow loads and serves it: a table of pictures in, voxel responses out.

It needs neither Ray nor DeepSpeed. Whatever is wrong with a request is the caller's, and named by its row: over HTTP
the answer is a 400, and the server goes on.
"""

import base64
import binascii
import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

from foundation.image_files import MAX_PIXELS, Pixels, as_rgb, decode
from foundation.prediction import BATCH, Predictor, encoder_of
from foundation.tracking.packaging import ENCODER, IMAGE, load_parts

_LARGEST_REQUEST = 2**30  # bytes of pixels
_LARGEST_ANSWER = 1 << 28
"""Numbers; as JSON some five gigabytes, and more than any server sends."""


def refused(message: str) -> MlflowException:
    """Return the error of a request that can't be answered, HTTP status 400."""
    return MlflowException(message, error_code=BAD_REQUEST)


class VoxelResponses(PythonModel):
    """Predicts the voxels of an adapter's subject, or of any subject that a backbone was trained on."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load model and encoder.

        `context.model_config` may have `encoder`: a directory or hub name to take the encoder from.

        Raises
        ------
        ValueError
            If a part of the version is damaged, or its encoder isn't to be had or not the one that it was trained on.
        """
        adapter = context.artifacts.get("adapter")
        model, lineage = load_parts(Path(context.artifacts["backbone"]), None if adapter is None else Path(adapter))
        self._model, self._encoder = model, encoder_of(lineage, (context.model_config or {}).get(ENCODER))
        self._subject = model.subjects[0] if adapter is None else lineage["subject"]
        self._is_backbone = adapter is None
        Predictor(
            model, self._encoder, self._subject
        )  # whether they fit each other shows now, not at the first request
        self._one_at_a_time = threading.Lock()  # an encoder's hooks are shared by the threads of a server

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  MLflow's own returns nothing
        self, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Return responses (image, voxel), or with `n_samples` above 0 simulated trials (image, sample, voxel).

        Parameters
        ----------
        model_input : in its column ``image`` a picture per row: the bytes of a picture file, the same as base64 text,
            an array (height, width, 3) uint8 or an image of Pillow.
        params : `n_samples` and `seed`; of a backbone also `subject`.

        Raises
        ------
        MlflowException
            If a row holds no picture, or an option can't be; the message names it.
        """
        options = params or {}
        n_samples, seed = options.get("n_samples") or 0, options.get("seed") or 0
        predictor = self._predictor(options.get("subject"))
        _check_sizes(len(model_input), predictor.n_voxels, n_samples, seed)
        images: list[np.ndarray] = []
        for row, value in enumerate(_column(model_input)):
            images.append(picture_of(value, row))
            if sum(image.nbytes for image in images) > _LARGEST_REQUEST:
                raise refused(f"{row + 1} of {len(model_input)} pictures fill the memory for one; send fewer at a time")
        rows = predictor.batch_size(BATCH, n_samples)
        batches = (images[start : start + rows] for start in range(0, len(images), rows))
        with self._one_at_a_time:
            try:
                return np.concatenate(list(predictor.stream(batches, n_samples=n_samples or None, seed=seed)))
            except ValueError as error:  # no noise fitted, tokens out of range
                raise refused(str(error)) from error

    def _predictor(self, subject: str | None) -> Predictor:
        wanted = subject if self._is_backbone and subject is not None else self._subject
        try:
            return Predictor(self._model, self._encoder, wanted)
        except ValueError as error:
            raise refused(str(error)) from error


def _column(table: pd.DataFrame) -> list[Any]:
    if IMAGE not in table.columns:
        raise refused(f"the request has no column {IMAGE!r}; it has {', '.join(map(str, table.columns)) or 'none'}")
    return list(table[IMAGE])


def _check_sizes(n_images: int, n_voxels: int, n_samples: int, seed: int) -> None:
    if n_images == 0:
        raise refused(f"the request has no rows; give at least one picture in the column {IMAGE!r}")
    if n_samples < 0:
        raise refused(f"n_samples must be 0 (the expected response) or more, got {n_samples}")
    if not 0 <= seed < 1 << 63:
        raise refused(f"seed must be 0 or more, got {seed}")
    if n_images * n_voxels * max(n_samples, 1) > _LARGEST_ANSWER:
        raise refused(
            f"{n_images} images x {n_voxels} voxels x {max(n_samples, 1)} samples are too many for one request; "
            "send fewer at a time"
        )


def picture_of(value: Any, row: int) -> Pixels:
    """Return the picture that a row of a request holds.

    Raises
    ------
    MlflowException
        If it holds none.
    """
    what = f"row {row} of {IMAGE!r}"
    try:
        if isinstance(value, Image.Image):
            return as_rgb(value)
        if isinstance(value, np.ndarray):
            return _checked(value, what)
        if isinstance(value, str):
            value = base64.b64decode(value, validate=True)
        elif isinstance(value, bytes):  # MLflow decodes `dataframe_*`, not `inputs` and `instances`
            with contextlib.suppress(binascii.Error):  # the bytes of a picture file are never all in base64's alphabet
                value = base64.b64decode(value, validate=True)
        if not isinstance(value, bytes):
            raise ValueError(f"{what} is a {type(value).__name__}, not a picture file's bytes or their base64")
        return decode(value, what)
    except binascii.Error as error:
        raise refused(f"{what} is not base64 ({error}); encode a picture file's bytes") from error
    except ValueError as error:
        raise refused(str(error)) from error


def _checked(array: np.ndarray, what: str) -> Pixels:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not 0 < array.size <= 3 * MAX_PIXELS:
        raise ValueError(f"{what} must be uint8 (height, width, 3), got {array.dtype} {array.shape}")
    return array
