"""The command: whose model answers, what it writes, and what it refuses before any work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import zarr
from PIL import Image

from data.encoders.gabor import GaborEncoder
from foundation import predict
from foundation.prediction import UNIT, Predictor
from foundation.tracking.registry import register
from foundation.tracking.runs import TrackedRun
from tests.tiny_version import ADAPTED, N_VOXELS, picture, random_model, save_version, volume


@pytest.fixture(scope="module")
def registry_home(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose registry has a backbone, and an adapter that was fitted on it."""
    home = tmp_path_factory.mktemp("predict-home")
    shutil.copy(empty_database, home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYBRAINS_HOME", str(home))
        for kind, name, tags in (
            ("backbone", "tiny", {}),
            ("adapter", f"tiny.{ADAPTED}", {"subject": ADAPTED, "backbone": "tiny/1"}),
        ):
            run = TrackedRun.start(name, kind=kind, config={}, tags={})
            version = save_version(home / f"made-{kind}", adapted=kind == "adapter")
            run.artifact(version, "model")
            register(name, run, "model", kind=kind, tags=tags)
    return home


@pytest.fixture
def home(registry_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the module's registry."""
    monkeypatch.setenv("MANYBRAINS_HOME", str(registry_home))
    return registry_home


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A directory of five pictures, of two sizes."""
    directory = tmp_path / "shown"
    directory.mkdir()
    for k in range(5):
        Image.fromarray(picture(k, width=40 + k % 2)).save(directory / f"image{k}.png")
    return directory


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, words)])
    try:
        predict.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def expected(subject: str = ADAPTED) -> np.ndarray:
    images = [picture(k, width=40 + k % 2) for k in range(5)]
    return Predictor(random_model(*N_VOXELS), GaborEncoder(), subject).predict(images)


def test_the_subjects_adapter_predicts_each_image_and_the_file_says_what_it_is(shown, home, monkeypatch, tmp_path):
    out = tmp_path / "p.npy"
    assert call(monkeypatch, "--subject", 5, shown, "--out", out, "--batch", 2) == 0
    np.testing.assert_allclose(np.load(out), expected(), rtol=0, atol=1e-4)
    about = json.loads((tmp_path / "p.npy.json").read_text())
    assert about["images"] == [str(shown / f"image{k}.png") for k in range(5)]
    assert (about["subject"], about["model"], about["unit"]) == (ADAPTED, f"tiny.{ADAPTED}/1", UNIT)
    assert about["dims"] == ["image", "voxel"]
    assert about["lineage"]["backbone"] == "tiny/1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.npy", "p.npy.json", "shown"]


def test_a_subject_that_the_backbone_was_trained_on_is_predicted_by_it_and_that_is_said(
    shown, home, monkeypatch, tmp_path, capsys
):
    assert call(monkeypatch, "--subject", 1, shown, "--out", tmp_path / "p.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected("subj01"), rtol=0, atol=1e-4)
    assert "subj01 has no adapter of its own; tiny/1 was trained on it, and predicts it" in capsys.readouterr().out
    assert json.loads((tmp_path / "p.npy.json").read_text())["model"] == "tiny/1"


def test_an_adapter_may_be_named(shown, home, monkeypatch, tmp_path):
    named = ("--adapter", f"tiny.{ADAPTED}@champion")
    assert call(monkeypatch, "--subject", ADAPTED, shown, "--out", tmp_path / "p.npy", *named) == 0
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected(), rtol=0, atol=1e-4)


def test_samples_go_to_a_zarr_and_come_again_by_their_seed(shown, home, monkeypatch, tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ("--subject", 5, shown, "--out", tmp_path / f"{name}.zarr", "--samples", 3, "--seed", seed)
        assert call(monkeypatch, *words) == 0
        group = zarr.open_group(tmp_path / f"{name}.zarr", mode="r")
        array = group["predictions"]
        assert isinstance(array, zarr.Array)
        assert array.metadata.dimension_names == ("image", "sample", "voxel")
        assert group.attrs["seed"] == seed
        found.append(array[:])
    assert found[0].shape == (5, 3, N_VOXELS[ADAPTED])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_nifti_needs_no_store(shown, home, monkeypatch, tmp_path):
    assert call(monkeypatch, "--subject", 5, shown, "--out", tmp_path / "p.nii.gz") == 0
    image = nibabel.load(tmp_path / "p.nii.gz")
    assert isinstance(image, nibabel.Nifti1Image)
    data = np.asanyarray(image.dataobj)
    np.testing.assert_allclose(data[tuple(volume().index.T)].T, expected(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(image.affine, volume().affine, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--subject", "9"), "subject '9' has none on backbone tiny"),
        (("--subject", "1", "--adapter", f"tiny.{ADAPTED}"), "subject '1' is not in adapter"),
        (("--subject", "5", "--adapter", "none@champion"), "adapter 'none@champion' is not in the registry"),
        (("--subject", "5", "--backbone", "none"), "backbone 'none' is not in the registry"),
        (("--subject", "5", "--samples", "0"), "--samples must be at least 1, got 0"),
        (("--subject", "5", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("--subject", "5", "--out", "p.mat"), "must end with one of .npy, .zarr, .nii, .nii.gz"),
        (("--subject", "5", "--encoder", "nowhere"), "no encoder 'nowhere'"),
        (("--subject", "5", "--samples", "2", "--out", "p.nii"), "not for samples; write p.npy or a .zarr"),
        (("--subject", "1", "--out", "p.nii"), "isn't known to the model; write p.npy"),
    ],
)
def test_what_can_not_be_is_one_line_and_leaves_nothing(shown, home, monkeypatch, tmp_path, capsys, words, said):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert call(monkeypatch, shown, "--out", "p.npy", *words) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert list((tmp_path / "here").iterdir()) == []


def test_a_broken_picture_is_named_and_nothing_is_left(shown, home, monkeypatch, tmp_path, capsys):
    whole = (shown / "image3.png").read_bytes()
    (shown / "image3.png").write_bytes(whole[: len(whole) // 2])
    assert call(monkeypatch, "--subject", 5, shown, "--out", tmp_path / "p.npy") == 1
    assert "image3.png is not a readable picture" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [shown]


def test_a_file_that_is_there_stays_unless_told(shown, home, monkeypatch, tmp_path, capsys):
    (tmp_path / "p.npy").write_text("mine")
    assert call(monkeypatch, "--subject", 5, shown, "--out", tmp_path / "p.npy") == 1
    assert "exists already; name another file or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "p.npy").read_text() == "mine"
    assert call(monkeypatch, "--subject", 5, shown, "--out", tmp_path / "p.npy", "--overwrite") == 0
    assert np.load(tmp_path / "p.npy").shape == (5, N_VOXELS[ADAPTED])


def test_ctrl_c_leaves_nothing_behind(home, tmp_path):
    np.save(tmp_path / "many.npy", np.stack([picture(k) for k in range(20)]).repeat(1000, 0))
    words = ["--subject", "5", str(tmp_path / "many.npy"), "--out", str(tmp_path / "p.nii.gz")]
    process = subprocess.Popen(
        [sys.executable, "-m", "foundation.predict", *words],
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".writing-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.decode().strip().endswith("interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["many.npy"]
