"""The command: whose scores, under which protocol, what is printed, written and logged, and what is refused."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from data.splits import split_of
from data.store import PooledStore
from foundation import evaluate
from foundation.bundle import write_bundle
from foundation.evaluation.evaluated import Course
from foundation.evaluation.measured import measured_part
from foundation.evaluation.metrics import voxelwise_r
from foundation.evaluation.rsa import rdm
from foundation.line_up import PICKED, line_up
from foundation.named_model import named_model
from foundation.tracking.runs import find_runs, tracking_uri
from tests.tiny_store import ENCODER, N_VOXELS, make_tiny_store, tiny_recipe
from tests.tiny_trained import train_tiny

RUN = "tiny-run"


@pytest.fixture(scope="module")
def trained_home(tiny_store: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("evaluate-home")
    shutil.copy(empty_database, home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYBRAINS_HOME", str(home))
        train_tiny(tiny_recipe(tiny_store, keep_checkpoints=9, start="random"), home)
    return home


@pytest.fixture
def home(trained_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYBRAINS_HOME", str(trained_home))
    return trained_home


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *args])
    evaluate.main()


def silent(text: str) -> None:
    """Tell nobody."""


def rows_of(path: Path, **wanted: str) -> list[dict]:
    return [row for row in json.loads(path.read_text()) if all(row[key] == value for key, value in wanted.items())]


def test_a_runs_scores_are_those_of_its_predictions(home, tiny_store, tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    run(monkeypatch, RUN, "--json", str(out), "--bootstraps", "20", "--samples", "0")
    store, named = PooledStore.open(tiny_store), named_model(RUN)
    for subject in N_VOXELS:
        measured, rows = measured_part(store.subject(subject), split_of(store))
        tokens = [np.asarray(part, np.float32) for part in store.tokens(ENCODER).read(rows)]
        with torch.inference_mode():
            predicted = named.model.predict(*map(torch.from_numpy, tokens), subject).numpy()
        (row,) = rows_of(out, system=RUN, subject=subject, roi="all", axis="voxel", target="mean", metric="r")
        assert row["value"] == pytest.approx(np.nanmean(voxelwise_r(predicted, measured.mean)), abs=1e-6)
    assert {row["system"] for row in rows_of(out)} == {"zero", "mean", "ceiling", "ridge", RUN}


def test_run_directory_and_bundle_are_one_model(home, tmp_path, monkeypatch):
    bundle = tmp_path / "tiny.safetensors"
    write_bundle(home / "runs" / RUN / "final", bundle)
    found = []
    for k, name in enumerate((RUN, str(home / "runs" / RUN / "final"), str(bundle))):
        run(monkeypatch, name, "--json", str(tmp_path / f"{k}.json"), "--bootstraps", "0", "--samples", "0")
        rows = rows_of(tmp_path / f"{k}.json", axis="voxel", target="mean", metric="r")
        found.append([row["value"] for row in rows if row["system"] not in ("zero", "mean", "ceiling", "ridge")])
    assert found[0] == found[1] == found[2]


def test_both_protocols_stand_side_by_side_and_the_gap_is_taken_apart(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    run(monkeypatch, RUN, "--protocol", "both", "--json", str(out), "--bootstraps", "20", "--samples", "0")
    told = capsys.readouterr().out
    assert "Scores under both protocols" in told
    assert "WARNING: chasm-legacy" in told
    assert "How much of a gap is protocol" in told
    read = " ".join(told.split())
    assert "LEGACY: normalisation: z-scored over all trials" in read
    assert f"LEGACY: {RUN}: of " in read
    assert "is picked on the test images" in read
    (evaluated,) = [r for r in find_runs() if r.data.tags.get("manybrains.protocol") == "both"]
    path = MlflowClient(tracking_uri()).download_artifacts(evaluated.info.run_id, "protocol-steps.json", str(tmp_path))
    steps = [step for step in json.loads(Path(path).read_text()) if step["system"] == RUN]
    for subject in N_VOXELS:
        mine = [step for step in steps if step["subject"] == subject]
        assert sum(step["change"] for step in mine[1:]) == pytest.approx(mine[-1]["r"] - mine[0]["r"])
        place = {"subject": subject, "roi": "all", "metric": "r", "target": "mean"}
        (strict,) = rows_of(out, system=RUN, protocol="strict", axis="voxel", **place)
        (legacy,) = rows_of(out, system=RUN, protocol="chasm-legacy", axis="pattern", **place)
        assert strict["value"] == mine[1]["r"]
        assert legacy["value"] == mine[3]["r"]
    assert any(row["system"] == RUN + PICKED for row in rows_of(out, protocol="chasm-legacy"))
    metrics = evaluated.data.metrics
    assert "test/voxel_r" in metrics
    assert "chasm-legacy/test/pattern_r" in metrics


def test_the_checkpoint_that_legacy_picks_is_never_worse_on_the_test_images(home):
    entrants = line_up([RUN], course=Course(protocols=("chasm-legacy",), n_bootstraps=0), tell=silent)
    picked, told = entrants.picked_on_test(RUN)
    assert "is picked on the test images" in told
    gains = []
    for subject in entrants.subjects:
        rows = entrants.evaluate(subject, picked=picked).scores["chasm-legacy"].rows
        r = {x.system: x.value for x in rows if (x.roi, x.axis, x.target, x.metric) == ("all", "pattern", "mean", "r")}
        gains.append(r[RUN + PICKED] - r[RUN])
    assert np.mean(gains) >= 0


def test_models_of_one_label_are_told_apart(home, tmp_path, monkeypatch):
    """A model that has another's label is called by the name that it was given; none is dropped."""
    names = [str(tmp_path / side / "run" / "final") for side in ("a", "b")]
    for name in names:
        shutil.copytree(home / "runs" / RUN / "final", name)
    out = tmp_path / "rows.json"
    run(monkeypatch, *names, "--json", str(out), "--bootstraps", "0", "--samples", "0", "--baselines")
    assert {row["system"] for row in rows_of(out)} == {"zero", "mean", "ceiling", "run/final", names[1]}


def test_a_runs_directory_is_found_from_beside_it(home, monkeypatch):
    monkeypatch.chdir(home / "runs")
    assert named_model(f"./{RUN}/").label == RUN
    monkeypatch.chdir(home)
    assert named_model(f"runs/{RUN}").label == RUN


def test_baselines_say_what_they_learned_from(home, tmp_path, monkeypatch, capsys):
    run(monkeypatch, RUN, "--bootstraps", "0", "--samples", "0", "--permutations", "10")
    told = " ".join(capsys.readouterr().out.split())
    assert f"baselines learned from {ENCODER} tokens, all sessions" in told
    assert "n/a where so few permutations can't reach it" in told


def test_several_models_are_compared_on_the_same_resamples(home, tmp_path, monkeypatch):
    """A model against itself under another name: differences are exactly zero, and no test finds one."""
    final = home / "runs" / RUN / "final"
    copy = tmp_path / "other" / "final"
    shutil.copytree(final, copy)
    out = tmp_path / "rows.json"
    run(monkeypatch, RUN, str(copy), "--json", str(out), "--bootstraps", "50", "--samples", "0")
    mine = [c for c in json.loads(out.with_suffix(".comparisons.json").read_text()) if c["system"] == RUN]
    against = [c for c in mine if c["versus"] == "other/final"]
    assert against
    assert {(c["difference"], c["low"], c["high"]) for c in against} == {(0.0, 0.0, 0.0)}
    assert {c["p_value"] for c in against} == {1.0}


def test_baselines_alone_need_no_model(home, tiny_store, tmp_path, monkeypatch):
    out = tmp_path / "rows.csv"
    args = ("ridge", "cls-probe", "--store", str(tiny_store), "--subjects", "5", "--csv", str(out))
    run(monkeypatch, *args, "--bootstraps", "0")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["system"] for row in rows} == {"zero", "mean", "ceiling", "ridge", "cls-probe"}
    assert {row["subject"] for row in rows} == {"subj05"}
    assert all(row["low"] == "" for row in rows)


def test_folds_and_permutations_stand_beside_the_scores(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    args = ("--subjects", "1", "--folds", "3", "--permutations", "99", "--samples", "20", "--bootstraps", "0")
    run(monkeypatch, RUN, *args, "--json", str(out))
    told = capsys.readouterr().out
    assert "Cross-validation, 3 folds" in told
    assert "Predicted at all?" in told
    (folded,) = rows_of(
        out, system="ridge", protocol="strict-3-folds", roi="all", axis="voxel", target="mean", metric="r"
    )
    assert folded["low"] < folded["value"] < folded["high"]
    assert not rows_of(out, system=RUN, protocol="strict-3-folds")
    (p,) = rows_of(out, system="ridge", metric="p_permutation", roi="all")
    assert p["value"] == pytest.approx(0.01)  # its responses are linear in the tokens
    (energy,) = rows_of(out, system=RUN, metric="energy", target="trial", roi="all")
    (floor,) = rows_of(out, system="mean", metric="energy", target="trial", roi="all")
    assert 0 < energy["value"] < floor["value"]


def test_dissimilarities_are_compared_with_repeats_and_with_published_rdms(home, tiny_store, tmp_path, monkeypatch):
    """A published RDM that is the model's own prediction is matched perfectly."""
    store, named = PooledStore.open(tiny_store), named_model(RUN)
    split = split_of(store)
    rows = np.flatnonzero(split.parts == "test")
    own = line_up([RUN], course=Course(), tell=silent).predict("subj01", rows)[RUN]
    images = np.array([split.ids[row] for row in rows])
    np.savez(tmp_path / "own.npz", rdms=rdm(own)[None], images=images)
    args = ("--subjects", "1", "--rsa", "--samples", "0", "--bootstraps", "20", "--permutations", "0")
    out = tmp_path / "rows.json"
    run(monkeypatch, RUN, *args, "--rdms", str(tmp_path / "own.npz"), "--json", str(out))
    (found,) = rows_of(out, metric="rsa_spearman", roi="own", system=named.label)
    assert found["value"] == pytest.approx(1)
    assert {row["system"] for row in rows_of(out, metric="rsa_spearman", roi="all")} == {RUN, "ridge", "ceiling"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": np.array(["image000", "nowhere"])}, "aren't in the store, such as 'nowhere'"),
        ({"images": np.array(["image000", "image059"])}, "models have learned from them"),
        ({"rdms": np.zeros((2, 3, 3))}, "expected (rdm, 2, 2)"),
        ({"images": np.array(["image059"] * 2)}, "different names"),
        ({"images": np.array([{}, {}])}, "without pickles"),
    ],
    ids=["missing", "seen", "shape", "twice", "pickle"],
)
def test_rdms_that_cannot_be_compared_are_refused(home, tmp_path, monkeypatch, capsys, change, told):
    content = {"rdms": np.zeros((1, 2, 2)), "images": np.array(["image058", "image059"])} | change
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(SystemExit):
        run(monkeypatch, RUN, "--rdms", str(tmp_path / "bad.npz"), "--bootstraps", "0", "--samples", "0")
    assert told in capsys.readouterr().err


def test_other_images_than_test_ones_are_marked_as_such(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    run(monkeypatch, RUN, "--split", "validation", "--bootstraps", "0", "--samples", "0", "--rsa", "--json", str(out))
    assert "scored on validation images" in " ".join(capsys.readouterr().out.split())
    assert {row["protocol"] for row in rows_of(out)} == {"strict-validation"}
    assert any("scored on validation images" in note for note in json.loads(out.with_suffix(".notes.json").read_text()))
    newest = find_runs()[0]
    assert "validation/voxel_r" in newest.data.metrics
    assert not [key for key in newest.data.metrics if key.startswith("test/")]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("nowhere@champion",), "is no run in"),
        (("nowhere.safetensors",), "there is no file"),
        ((RUN, "--subjects", "9"), "9"),
        ((RUN, "--baselines", "lasso"), "there is no baseline 'lasso'"),
        ((RUN, "--json", "/nowhere/rows.json"), "there is no directory /nowhere"),
        ((RUN, "--bootstraps", "-1"), "--bootstraps -1"),
        ((RUN, "--folds", "1"), "--folds 1 must be at least 2"),
        ((RUN, RUN), "is named twice"),
        ((RUN, "--sessions", "1"), "--sessions is for baselines alone"),
        ((RUN, "--split", "train", "--protocol", "both"), "--protocol both is for test images"),
        ((RUN, "--rdms", "/nowhere.npz"), "there is no file /nowhere.npz"),
        ((), "name a model"),
    ],
    ids=[
        "registry",
        "file",
        "subject",
        "baseline",
        "directory",
        "bootstraps",
        "folds",
        "twice",
        "sessions",
        "split",
        "rdms",
        "nothing",
    ],
)
def test_what_cannot_be_scored_is_one_clear_line(home, monkeypatch, capsys, args, told):
    with pytest.raises(SystemExit):
        run(monkeypatch, *args)
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_store_that_is_not_what_the_model_learned_from_is_refused(home, tmp_path, monkeypatch, capsys):
    make_tiny_store(tmp_path / "other.zarr", spec={"kind": "noise", "depths": [1, 2], "seed": 1})
    make_tiny_store(tmp_path / "changed.zarr", spoilt=(2,))
    for name, told in (("other.zarr", "another encoder"), ("changed.zarr", "has changed since")):
        with pytest.raises(SystemExit):
            run(monkeypatch, RUN, "--store", str(tmp_path / name))
        assert told in capsys.readouterr().err


def test_a_model_trained_with_another_split_is_refused(home, tiny_store):
    named = named_model(RUN)
    store = PooledStore.open(tiny_store)
    split = split_of(store)
    parts = split.parts.copy()
    parts[:4], parts[-4:] = "test", "train"
    with pytest.raises(ValueError, match="another split of its images"):
        named.check(store, store.tokens(ENCODER), replace(split, parts=parts))
