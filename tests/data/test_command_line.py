"""``python -m data``: exit codes 0, 1 and 2, errors in one line on stderr, a traceback only when asked for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.command_line import Session, begin, run
from data.home import home, set_home
from data.store import PooledStore


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    rng = np.random.default_rng(0)
    np.save(path / "responses.npy", rng.normal(size=(20, 3)).astype(np.float32))
    np.save(path / "images.npy", rng.integers(0, 256, (20, 16, 16, 3), np.uint8))
    entry = {"subject": "A", "responses": "responses.npy", "images": "images.npy"}
    (path / "recordings.json").write_text(json.dumps([entry]))
    return path


@pytest.mark.parametrize("command", ["", "phantom", "import", "features", "info", "validate", "migrate"])
def test_every_command_has_help(call, command):
    code, out, err = call(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "usage: python -m data" in out
    assert len(out.splitlines()) > 5


def test_import_features_info(call, source, tmp_path):
    store = tmp_path / "s.zarr"
    code, out, err = call("import", "arrays", source, store)
    assert (code, err) == (0, "")
    assert "A: 20 trials, 3 voxels" in out
    code, out, err = call("features", store, "--encoder", "gabor")
    assert code == 0
    assert "gabor tokens of 20 images (20 computed now)" in out
    code, out, err = call("info", store)
    assert (code, err) == (0, "")
    assert "images: 20, 20 with pixels (16 x 16" in out
    assert "split by hash: train " in out
    assert "tokens gabor: depths 1, 2, 3, 4; cls and 64 patches" in out


def test_features_that_are_there_are_not_computed_again(call, source, tmp_path, monkeypatch):
    store = tmp_path / "s.zarr"
    call("import", "arrays", source, store)
    call("features", store, "--encoder", "gabor")
    monkeypatch.setattr(PooledStore, "pixels", None)
    code, out, _ = call("features", store, "--encoder", "gabor")
    assert code == 0
    assert "all there already, nothing to do" in out


def test_features_under_a_taken_name_are_refused(call, source, tmp_path):
    store = tmp_path / "s.zarr"
    call("import", "arrays", source, store)
    call("features", store, "--encoder", "gabor")
    code, _, err = call("features", store, "--encoder", "gabor", "--depths", 1, 2)
    assert code == 1
    assert "pass --name to keep both" in err
    code, _, _ = call("features", store, "--encoder", "gabor", "--depths", 1, 2, "--name", "shallow")
    assert code == 0
    assert PooledStore.open(store).encoders == ["gabor", "shallow"]


def test_info_of_a_store_whose_new_images_lack_tokens(call, source, tmp_path):
    store = tmp_path / "s.zarr"
    call("import", "arrays", source, store)
    call("features", store, "--encoder", "gabor")
    opened = PooledStore.open(store, writable=True)
    from data.sources import ImageBlock

    opened.add_images(ImageBlock(ids=["new"], roles=[""], pixels=np.zeros((1, 8, 8, 3), np.uint8)))
    code, out, err = call("info", store)
    assert (code, err) == (0, "")
    assert "tokens gabor: lacking for 1 image blocks" in out


def test_info_is_printed_as_json_too(call, source, tmp_path):
    store = tmp_path / "s.zarr"
    call("import", "arrays", source, store)
    code, out, err = call("info", store, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["subjects"]["A"]["images_by_repeats"] == {"1": 20}
    assert found["subjects"]["A"]["ceiling"] == {"n/a": "no image was shown twice"}
    assert found["images"]["n"] == 20


def test_validate_prints_every_finding_and_fails(call, source, tmp_path):
    store = tmp_path / "s.zarr"
    call("import", "arrays", source, store)
    code, out, err = call("validate", store)
    assert (code, err) == (0, "")
    assert "s.zarr: valid (1 subjects, 20 images, 0 encoders)" in out
    shard = next(store.rglob("pixels/c/0/0/0/0"))
    content = shard.read_bytes()
    shard.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    code, out, err = call("validate", store, "--quick")
    assert (code, err) == (0, "")
    assert "chunks not read" in out
    shard.unlink()
    code, out, err = call("validate", store)
    assert code == 1
    assert "bad  images/0000/pixels/c/0/0/0/0: rows 0 to 19 are missing" in out
    assert err == f"error: {store}: 1 findings\n"


def test_a_map_is_exported(call, source, tmp_path):
    store = tmp_path / "s.zarr"
    call("import", "arrays", source, store)
    out = tmp_path / "mean.npy"
    code, told, err = call("export", store, "--subject", "A", "--map", "mean", "--out", out)
    assert (code, err) == (0, "")
    assert "mean.npy" in "".join(told.split())
    np.testing.assert_allclose(np.load(out), np.load(source / "responses.npy").mean(0), rtol=1e-5)
    code, _, err = call("export", store, "--subject", "A", "--map", "mean", "--out", out)
    assert code == 1
    assert "mean.npy exists already; choose another name or pass --overwrite" in err
    assert call("export", store, "--subject", "A", "--map", "mean", "--out", out, "--overwrite")[0] == 0
    code, _, err = call("export", store, "--subject", "A", "--map", "mean", "--out", tmp_path / "mean.nii.gz")
    assert (code, err.count("\n")) == (1, 1)


def test_a_check_reports_and_writes_nothing(call, source, tmp_path):
    code, out, err = call("import", "arrays", source, tmp_path / "s.zarr", "--check")
    assert (code, err) == (0, "")
    assert "ok   A: 20 trials" in out
    (source / "responses.npy").unlink()
    code, out, err = call("import", "arrays", source, tmp_path / "s.zarr", "--check")
    assert code == 1
    assert "bad  " in out
    assert err == "error: 1 problem found, named above; nothing was written\n"
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("info", "{tmp}/absent.zarr"), 1, "no store at"),
        (("features", "{tmp}/absent.zarr", "--encoder", "gabor"), 1, "no store at"),
        (("import", "arrays", "{tmp}/absent", "{tmp}/s.zarr"), 1, "recordings.json does not exist"),
        (("import", "arrays", "{source}", "{tmp}/s.zarr", "--subjects", "B"), 1, "subject 'B' is not in"),
        (("import", "matlab", "{source}", "{tmp}/s.zarr"), 2, "matlab"),
        (("info",), 2, "STORE"),
        (("info", "{tmp}/s.zarr", "--verbose"), 2, "--verbose"),
        (("explode",), 2, "explode"),
        ((), 2, "Missing subcommand Expected one of {phantom, import, features, info"),
        (("features", "{tmp}/s.zarr", "--encoder", "gabor", "--depths", "deep"), 2, "deep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_an_error_is_one_line_on_stderr(call, source, tmp_path, args, code, message):
    found, _, err = call(*(a.format(tmp=tmp_path, source=source) for a in args))
    assert found == code
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.zarr"))


def test_a_traceback_only_if_asked_for(call, tmp_path):
    _, _, err = call("info", tmp_path / "absent.zarr", "--debug")
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: no store at")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("a\n  b"), 1, "error: a b\n"),
        (FileNotFoundError(2, "No such file", "x.npy"), 1, "error: [Errno 2] No such file: 'x.npy'\n"),
        (KeyError("x"), 1, "error: unexpected KeyError: 'x' (--debug shows where; please report it)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["value", "file", "bug", "Ctrl-C"],
)
def test_whatever_happens_is_one_line(capsys, error, code, told):
    def command(session: Session = Session()) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run(command, program="x", args=[])
    assert stop.value.code == code
    assert capsys.readouterr().err == told


def test_home_is_an_option_of_every_command(home, tmp_path):
    begin(Session())
    from data.home import home as current

    assert current() == home
    begin(Session(home=tmp_path / "elsewhere"))
    assert current() == tmp_path / "elsewhere"


def test_home_is_absolute_and_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_home("here")
    monkeypatch.chdir("/")
    assert home() == tmp_path / "here"


def test_the_module_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "data", "info", str(tmp_path / "absent.zarr")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no store at")
    assert done.stderr.count("\n") == 1
