"""What MLflow loads is the predictor, for whatever holds a picture; a request that is wrong is a 400 that names it."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from data.encoders.gabor import GaborEncoder
from data.features import load_encoder
from data.schema import json_digest
from foundation.prediction import Predictor
from tests.foundation.test_image_files import bomb
from tests.tiny_encoder import save_vit
from tests.tiny_version import ADAPTED, N_VOXELS, picture, png, random_model, save_version

IMAGES = [picture(0), picture(1, height=33, width=50)]
GOOD = png(IMAGES[0])


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_version(tmp_path_factory.mktemp("version"))


@pytest.fixture(scope="module")
def loaded(version: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(version))


def expected(subject: str = ADAPTED) -> np.ndarray:
    return Predictor(random_model(*N_VOXELS), GaborEncoder(), subject).predict(IMAGES)


def table(*values) -> pd.DataFrame:
    return pd.DataFrame({"image": pd.Series(values, dtype=object)})


@pytest.mark.parametrize(
    "given",
    [
        png,
        lambda image: base64.b64encode(png(image)).decode(),
        lambda image: base64.b64encode(png(image)),
        Image.fromarray,
        np.asarray,
    ],
    ids=["bytes", "base64", "base64 in bytes", "pillow", "array"],
)
def test_whatever_holds_a_picture_is_predicted_as_the_predictor_does(loaded, given):
    found = loaded.predict(table(*map(given, IMAGES)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(), rtol=0, atol=1e-6)


def test_many_rows_are_those_of_few(loaded):
    found = loaded.predict(table(*[png(image) for image in IMAGES] * 40))
    np.testing.assert_allclose(found, np.tile(expected(), (40, 1)), rtol=0, atol=1e-4)


def test_samples_come_by_parameter_and_again_by_seed(loaded):
    drawn, again, other = (loaded.predict(table(GOOD), params={"n_samples": 3, "seed": seed}) for seed in (1, 1, 2))
    assert drawn.shape == (1, 3, N_VOXELS[ADAPTED])
    np.testing.assert_array_equal(drawn, again)
    assert not np.array_equal(drawn, other)


def test_a_backbone_predicts_the_subject_that_is_asked_for(tmp_path):
    loaded = mlflow.pyfunc.load_model(str(save_version(tmp_path, adapted=False)))
    rows = table(*map(png, IMAGES))
    np.testing.assert_allclose(loaded.predict(rows), expected("subj01"), atol=1e-6)
    np.testing.assert_allclose(loaded.predict(rows, params={"subject": "subj02"}), expected("subj02"), atol=1e-6)
    with pytest.raises(MlflowException, match="no adapter for 'subj09'; it has subj01, subj02") as caught:
        loaded.predict(rows, params={"subject": "subj09"})
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("rows", "params", "said"),
    [
        (table(GOOD, b"a text"), {}, "row 1 of 'image' is not a readable picture"),
        (table(GOOD, GOOD[: len(GOOD) // 2]), {}, "row 1 of 'image' is not a readable picture"),
        (table(b""), {}, "row 0 of 'image' is not a readable picture"),
        (table(bomb(100_000)), {}, "row 0 of 'image' is not a readable picture: .*pixels"),
        (table("not base64!"), {}, "row 0 of 'image' is not base64"),
        (table(base64.b64encode(b"a text").decode()), {}, "row 0 of 'image' is not a readable picture"),
        (table(None), {}, "row 0 of 'image' is a NoneType, not a picture"),
        (table(3), {}, "row 0 of 'image' is a int, not a picture"),
        (table(np.zeros((3, 4, 4), np.uint8)), {}, r"row 0 of 'image' must be uint8 \(height, width, 3\)"),
        (table(np.zeros((4, 4, 3))), {}, r"row 0 of 'image' must be uint8 \(height, width, 3\), got float64"),
        (table(), {}, "has no rows; give at least one picture"),
        (table(GOOD), {"n_samples": -1}, "n_samples must be 0 .* or more, got -1"),
        (table(GOOD), {"n_samples": 10**9}, "too many for one request; send fewer"),
        (table(GOOD), {"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_a_wrong_request_is_a_400_that_names_the_row_or_the_option(loaded, rows, params, said):
    model = loaded.unwrap_python_model()
    with pytest.raises(MlflowException, match=said) as caught:
        model.predict(rows, params)
    assert caught.value.get_http_status_code() == 400


def test_a_table_without_the_column_is_told_what_it_has(loaded):
    with pytest.raises(MlflowException, match="has no column 'image'; it has picture") as caught:
        loaded.unwrap_python_model().predict(pd.DataFrame({"picture": [GOOD]}))
    assert caught.value.get_http_status_code() == 400
    with pytest.raises(MlflowException, match=r"missing inputs \['image'\]"):
        loaded.predict(pd.DataFrame({"picture": [GOOD]}))


def test_an_encoder_from_a_directory_is_told_when_loading_or_the_loading_fails(tmp_path):
    encoder = load_encoder(str(save_vit(tmp_path / "vit")))
    spec = encoder.spec()
    known = {"name": "vit", "spec": spec, "digest": json_digest(spec), "source": "vit", "revision": None}
    version = str(save_version(tmp_path, encoder=known))
    with pytest.raises(ValueError, match="from a directory 'vit', which isn't here"):
        mlflow.pyfunc.load_model(version)
    with pytest.raises(ValueError, match=r"gives \(3, 4, 32\) depths"):  # it is the encoder, and not of this model
        mlflow.pyfunc.load_model(version, model_config={"encoder": str(tmp_path / "vit")})
    with pytest.raises(ValueError, match="isn't the one that the model was trained on, 'vit'"):
        mlflow.pyfunc.load_model(version, model_config={"encoder": "gabor"})


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "deepspeed"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import mlflow.pyfunc
import numpy as np
import pandas as pd

rows = pd.DataFrame({"image": [sys.stdin.buffer.read()]})
np.save(sys.stdout.buffer, mlflow.pyfunc.load_model(sys.argv[1]).predict(rows))
"""


def test_it_needs_neither_ray_nor_deepspeed(version):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(version)], input=GOOD, capture_output=True, check=False, cwd=version
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    np.testing.assert_allclose(np.load(io.BytesIO(done.stdout)), expected()[:1], rtol=0, atol=1e-6)
