"""The comparison table by one command: what it trains, what it takes from before, and whom it scores with whom."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from foundation import compare, pretrain
from foundation.recipes import RECIPES
from foundation.tracking.runs import find_runs
from foundation.training.run import describe_run, runs_dir
from tests.ended import Ended
from tests.tiny_store import ENCODER, tiny_recipe


@pytest.fixture
def children(monkeypatch) -> list[list[str]]:
    """Arguments of the pretrainings that the command starts; they run in this process, on the tests' one thread."""
    started: list[list[str]] = []

    def here(words: list[str]) -> int:
        started.append(words[3:])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["pretrain", *words[3:]])
            try:
                pretrain.main()
            except SystemExit as stop:
                return stop.code if isinstance(stop.code, int) else 0
        return 0

    monkeypatch.setattr(compare, "_run_child", here)
    monkeypatch.setattr(pretrain, "set_threads", lambda n_workers_here: None)
    tiny = tiny_recipe(Path("/nowhere.zarr"), epochs=1)
    for name, backbone in (("tiny", tiny.backbone), ("tiny-gru", replace(tiny.backbone, mixer="gru"))):
        monkeypatch.setitem(RECIPES, name, replace(tiny, name=name, backbone=backbone))
    return started


@pytest.fixture
def call(home, empty_database, monkeypatch, capsys) -> Callable[..., Ended]:
    shutil.copy(empty_database, home)

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["compare", *words])
        try:
            compare.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        told = capsys.readouterr()
        return Ended(code, told.out, told.err)

    return run


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_one_command_trains_what_is_missing_and_scores_all_on_the_same_images(call, children, tiny_store, tmp_path):
    words = ["--store", str(tiny_store), "--subjects", "1", "5", "--recipes", "tiny", "tiny-gru", "--scratch", "tiny"]
    words += ["--baselines", "ridge", "cls-probe", "--bootstraps", "20"]
    table, sheet = tmp_path / "table.json", tmp_path / "table.csv"
    ended = call(*words, "--json", str(table), "--csv", str(sheet))
    assert (ended.code, ended.err) == (0, "")
    assert [child[0] for child in children] == ["tiny", "tiny-gru", "tiny", "tiny"]
    pooled = ["--store", str(tiny_store), "--subjects", "subj01", "subj05", "--encoder", ENCODER]
    assert children[0][1:] == [*pooled, "--cluster.engine", "local"]
    systems = {"tiny", "tiny-gru", "tiny from scratch", "ridge", "cls-probe", "zero", "mean", "ceiling"}
    found = rows(table)
    for subject in ("subj01", "subj05"):
        assert {row["system"] for row in found if row["subject"] == subject} == systems
    assert len({row["n_images"] for row in found if row["axis"] == "voxel" and row["roi"] == "all"}) == 1
    pairs = {frozenset((c["system"], c["versus"])) for c in rows(tmp_path / "table.comparisons.json")}
    assert {frozenset(("tiny", "ridge")), frozenset(("tiny from scratch", "ridge"))} <= pairs
    with sheet.open() as file:
        assert len(list(csv.DictReader(file))) == len(found)
    (logged,) = find_runs("tags.`manybrains.kind` = 'comparison'")
    assert logged.info.status == "FINISHED"
    assert "test/voxel_r_cls-probe" in logged.data.metrics

    children.clear()
    again = call(*words, "--json", str(tmp_path / "again.json"))
    assert (again.code, children) == (0, [])
    assert rows(tmp_path / "again.json") == found


def test_an_unfinished_run_is_gone_on_with(call, children, tiny_store):
    words = ["--store", str(tiny_store), "--subjects", "5", "--recipes", "tiny", "--baselines", "ridge"]
    words += ["--bootstraps", "0"]
    assert call(*words).code == 0
    (run,) = runs_dir().iterdir()
    describe_run(run, status="interrupted")
    children.clear()
    assert call(*words).code == 0
    assert children[0][-1] == "--resume"
    assert list(runs_dir().iterdir()) == [run]
    assert describe_run(run)["status"] == "finished"


def test_a_pretraining_that_fails_ends_the_command_with_its_name(call, children, tiny_store, monkeypatch):
    monkeypatch.setattr(compare, "_run_child", lambda words: 1)
    ended = call("--store", str(tiny_store), "--subjects", "5", "--recipes", "tiny", "--baselines", "ridge")
    assert ended.code == 1
    assert "error: pretraining tiny on subj05 ended with code 1" in ended.err
    monkeypatch.setattr(compare, "_run_child", lambda words: 130)
    ended = call("--store", str(tiny_store), "--subjects", "5", "--recipes", "tiny", "--baselines", "ridge")
    assert (ended.code, ended.err.strip()) == (130, "interrupted")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipes", "huge"], "recipe 'huge' is unknown; there are phantom-tiny"),
        (["--baselines", "lasso"], "there is no baseline 'lasso'; there are ridge"),
        (["--recipes", "--scratch"], "name one recipe at least, such as base"),
        (["--bootstraps", "-1"], "--bootstraps -1 must be at least 0"),
        (["--json", "/nowhere/table.json"], "there is no directory /nowhere for /nowhere/table.json"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(call, children, words, message):
    ended = call(*words)
    assert ended.code == 1
    assert message in " ".join(ended.err.split())
    assert children == []


def test_recipes_of_several_encoders_are_refused_before_anything_is_trained(call, children, tiny_store, monkeypatch):
    other = replace(RECIPES["tiny-gru"].data, encoder="another")
    monkeypatch.setitem(RECIPES, "tiny-gru", replace(RECIPES["tiny-gru"], data=other))
    words = ["--store", str(tiny_store), "--subjects", "5", "--baselines", "ridge", "--bootstraps", "0"]
    for recipes in (["--recipes", "tiny", "tiny-gru"], ["--recipes", "tiny", "--scratch", "tiny-gru"]):
        ended = call(*words, *recipes)
        assert (ended.code, children) == (1, [])
        told = " ".join(ended.err.split())
        assert f"different tokens: tiny from {ENCODER}, tiny-gru from another" in told
        assert f"--encoder {ENCODER}" in told
    assert call(*words, "--recipes", "tiny", "tiny-gru", "--encoder", ENCODER).code == 0
    assert [child[0] for child in children] == ["tiny", "tiny-gru"]


def test_a_run_of_another_version_of_the_code_is_told_and_noted(call, children, tiny_store, monkeypatch, tmp_path):
    words = ["--store", str(tiny_store), "--subjects", "5", "--recipes", "tiny", "--baselines", "ridge"]
    words += ["--bootstraps", "0", "--json", str(tmp_path / "table.json")]
    first = call(*words)
    by = compare.code_version()
    assert "trained by" not in first.out
    monkeypatch.setattr(compare, "code_version", lambda: "9.9+later")
    again = call(*words)
    remark = f"trained by {by}, this is 9.9+later"
    assert f"finished before; {remark}" in again.out
    assert f"subj05: tiny: {remark}" in " ".join(again.out.split())
    assert len(children) == 1


def test_the_files_are_there_when_the_server_goes_away_before_scores_are_logged(
    call, children, tiny_store, monkeypatch, tmp_path
):
    def gone(*_, **__) -> None:
        raise ValueError("the tracking server does not answer")

    monkeypatch.setattr(compare, "log_scores", gone)
    words = ["--store", str(tiny_store), "--subjects", "5", "--recipes", "tiny", "--baselines", "ridge"]
    table, sheet = tmp_path / "table.json", tmp_path / "table.csv"
    ended = call(*words, "--bootstraps", "0", "--json", str(table), "--csv", str(sheet))
    assert (ended.code, "does not answer" in ended.err) == (1, True)
    assert {row["system"] for row in rows(table)} >= {"tiny", "ridge"}
    assert sheet.exists()


@pytest.mark.slow
def test_a_real_pretraining_runs_in_a_process_of_its_own(call, tiny_store, tmp_path):
    table = tmp_path / "table.json"
    words = ["--store", str(tiny_store), "--subjects", "5", "--encoder", ENCODER, "--bootstraps", "20"]
    ended = call(*words, "--recipes", "phantom-tiny", "--json", str(table))
    assert ended.code == 0
    assert "phantom-tiny" in {row["system"] for row in rows(table)}
