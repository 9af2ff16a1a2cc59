"""A registered version: whole, by itself, quickly written, and nothing in it a pickle or of this machine."""

import io
import pickletools
import time
from pathlib import Path

import mlflow.pyfunc
import pytest
import torch
from mlflow.models import Model
from PIL import Image

from foundation.checkpoint import load_model
from foundation.tracking.packaging import (
    adapter_in,
    backbone_in,
    card_in,
    example_picture,
    load_packaged,
    package,
)
from tests.tiny_version import ADAPTED, N_VOXELS, random_model, save_parts, save_version


def test_a_version_is_the_adapter_in_its_backbone_with_the_encoder_that_both_were_trained_on(tmp_path):
    version = save_version(tmp_path)
    model, lineage = load_packaged(version)
    assert model.subjects == list(N_VOXELS)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(random_model(*N_VOXELS).state_dict()), rtol=0, atol=0, equal_nan=True
    )
    assert lineage["subject"] == ADAPTED
    assert lineage["encoder"]["name"] == "gabor"
    assert "store" not in lineage
    adapter = adapter_in(version)
    assert adapter is not None
    assert {path.name for path in adapter.iterdir()} == {"model.json", "model.safetensors", "place.safetensors"}
    assert (card_in(version) / "card.json").read_text() == "{}"


def test_a_backbones_version_has_no_adapter_and_its_own_lineage(tmp_path):
    version = save_version(tmp_path, adapted=False)
    assert adapter_in(version) is None
    model, lineage = load_packaged(version)
    assert model.subjects == ["subj01", "subj02"]
    assert lineage == load_model(backbone_in(version))[1]


def test_the_signature_says_pictures_in_and_voxels_out(tmp_path):
    of_adapter = Model.load(str(save_version(tmp_path / "a"))).signature
    of_backbone = Model.load(str(save_version(tmp_path / "b", adapted=False))).signature
    assert [(c.name, c.type.name) for c in of_adapter.inputs] == [("image", "binary")]
    assert of_adapter.outputs.inputs[0].shape == (-1, N_VOXELS[ADAPTED])
    assert of_backbone.outputs.inputs[0].shape == (-1, -1)
    assert {p.name: p.default for p in of_adapter.params.params} == {"n_samples": 0, "seed": 0}
    assert {p.name: p.default for p in of_backbone.params.params} == {"n_samples": 0, "seed": 0, "subject": "subj01"}


def test_the_example_is_a_picture_that_the_version_predicts(tmp_path):
    version = save_version(tmp_path)
    assert Image.open(io.BytesIO(example_picture())).size == (32, 32)
    example = Model.load(str(version)).load_input_example(str(version))
    assert mlflow.pyfunc.load_model(str(version)).predict(example).shape == (1, N_VOXELS[ADAPTED])


REPOSITORY = Path(__file__).resolve().parents[3]


def is_pickle(data: bytes) -> bool:
    try:
        return any(True for _ in pickletools.genops(data)) and data[:1] == b"\x80"
    except ValueError:
        return False


def test_nothing_in_it_is_a_pickle_and_nothing_tells_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    for name in ("uv.lock", "pyproject.toml", ".python-version"):  # MLflow would take them along
        (tmp_path / "project" / name).write_text("mine")
    monkeypatch.chdir(tmp_path / "project")
    version = save_version(tmp_path)
    files = [path for path in version.rglob("*") if path.is_file()]
    assert not [path for path in files if path.read_bytes() == b"mine"]
    assert {path.suffix for path in files} <= {"", ".json", ".yaml", ".txt", ".py", ".safetensors"}
    for path in files:
        data = path.read_bytes()
        assert not is_pickle(data), path
        assert str(tmp_path).encode() not in data, path
        assert str(REPOSITORY).encode() not in data, path
    assert "manybrains" not in (version / "requirements.txt").read_text()


def test_writing_it_is_quick_silent_and_loads_no_encoder(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("foundation.prediction.load_encoder", lambda *_, **__: pytest.fail("an encoder was loaded"))
    backbone, adapter, card = save_parts(tmp_path)
    capfd.readouterr()
    began = time.process_time()
    package(tmp_path / "version", backbone=backbone, card=card, adapter=adapter)
    assert time.process_time() - began < 5
    assert capfd.readouterr() == ("", "")


def test_what_can_not_become_a_version_leaves_nothing(tmp_path):
    backbone, adapter, card = save_parts(tmp_path)
    target = tmp_path / "version"
    target.mkdir()
    with pytest.raises(ValueError, match="exists already; name a new directory"):
        package(target, backbone=backbone, card=card)
    target.rmdir()
    with pytest.raises(ValueError, match="is not a directory; write the card first"):
        package(target, backbone=backbone, card=tmp_path / "none")
    with pytest.raises(ValueError, match="is not a model"):
        package(target, backbone=card, card=card, adapter=adapter)
    with pytest.raises(ValueError, match="holds one adapter, where a whole model is needed"):
        package(target, backbone=adapter, card=card)
    with pytest.raises(ValueError, match="holds one model, where a whole adapter is needed"):
        package(target, backbone=backbone, card=card, adapter=backbone)
    assert not target.exists()
