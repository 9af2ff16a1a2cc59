"""``python -m foundation.registry``: what it prints, and that errors are one line."""

import sys
from pathlib import Path

import pytest

from foundation import registry
from foundation.tracking.publish import publish
from foundation.tracking.registry import Registered, find_version
from foundation.tracking.runs import TrackedRun
from tests.planted_scores import planted_versions
from tests.tiny_version import ADAPTED, save_parts

NAME = f"tiny.{ADAPTED}"


@pytest.fixture(scope="module")
def filled(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose registry has a backbone and two versions of an adapter, the second worse."""
    home = tmp_path_factory.mktemp("filled")
    (home / "mlflow.db").write_bytes(empty_database.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYBRAINS_HOME", str(home))
        backbone, adapter, _ = save_parts(tmp_path_factory.mktemp("parts"))

        def register(name: str, kind: str, noise: dict[str, float], **lineage) -> Registered:
            run = TrackedRun.start("run", kind="adapt", config={}, tags={})
            given = {"split_digest": "sha256:a"} | lineage
            own = adapter if kind == "adapter" else None
            scores = planted_versions(noise)
            return publish(run, name=name, kind=kind, backbone=backbone, adapter=own, lineage=given, scores=scores)

        register("tiny", "backbone", {"subj01": 0.3, "subj02": 0.4}, validation_voxel_r=0.25)
        for sessions, validation, noise in ((3, 0.4, 0.3), (3, 0.2, 0.9)):
            told = {"subject": ADAPTED, "backbone": "tiny/1", "sessions": sessions, "validation_voxel_r": validation}
            composition = {"ridge": noise}
            register(NAME, "adapter", {ADAPTED: noise}, **told, composition=composition)
    return home


@pytest.fixture
def call(filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Call the command on the filled registry; give its exit code, output and errors."""

    def called(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["registry", *words])
        code = 0
        try:
            registry.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    monkeypatch.setenv("MANYBRAINS_HOME", str(filled))
    return called


def test_list_has_a_line_for_each_version(call):
    code, out, _ = call("list")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines() if "tiny" in line]
    scores = [float(find_version(f"{NAME}/{v}").tags["test_voxel_r"]) for v in (1, 2)]
    assert lines[0].startswith(f"{NAME} 2 candidate adapter {ADAPTED} 3 {scores[1]:.4f} 0.2000 20")
    assert lines[1].startswith(f"{NAME} 1 champion adapter {ADAPTED} 3 {scores[0]:.4f} 0.4000 20")
    assert lines[2].startswith("tiny 1 champion backbone subj01 subj02")


def test_list_of_an_empty_registry_says_how_to_fill_it(call, home, empty_database):
    (home / "mlflow.db").write_bytes(empty_database.read_bytes())
    code, out, _ = call("list", "--home", str(home))
    assert code == 0
    assert "nothing is registered in" in out
    assert "run `python -m foundation.pretrain` first" in out


def test_show_prints_the_card(call):
    code, out, _ = call("show", NAME)
    assert code == 0
    assert out.startswith(f"{NAME}/1 (champion), registered 20")
    assert "A manybrains adapter of `subj05`." in out
    assert "| `subj05` | `all` | `ceiling` |" in out


def test_diff_shows_only_what_differs(call):
    code, out, _ = call("diff", f"{NAME}/1", f"{NAME}@candidate")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "validation_voxel_r 0.4 0.2" in lines
    assert "composition.ridge 0.3 0.9" in lines
    assert any(line.startswith("subj05 all voxel r 0.") for line in lines)
    assert "sessions" not in out
    assert "ceiling" not in out
    code, out, _ = call("diff", NAME, f"{NAME}/1")
    assert out == f"{NAME}/1 and {NAME}/1 differ in nothing that their cards tell\n"


def test_promote_refuses_what_scores_lower_in_one_line(call):
    code, out, err = call("promote", f"{NAME}/2")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {NAME}/2 scores 0.")
    assert err.endswith("promote it all the same with --force\n")
    assert err.count("\n") == 1
    assert call("promote", f"{NAME}/1")[1] == f"{NAME}/1 is champion already\n"
    assert call("promote", f"{NAME}/2", "--alias", "paper")[1] == f"{NAME}/2 is paper now\n"


def test_export_and_import_are_a_round_trip(call, home, empty_database, tmp_path):
    (home / "mlflow.db").write_bytes(empty_database.read_bytes())
    out = tmp_path / "shared.safetensors"
    code, told, _ = call("export", NAME, "--out", str(out))
    assert code == 0
    assert told.startswith(f"{out}: adapter {NAME}/1, ")
    assert told.endswith(f"its card is in {tmp_path / 'shared.card.json'}\n")
    code, told, _ = call("import", str(out), "--name", "theirs.subj05", "--home", str(home))
    assert (code, told) == (0, f"registered adapter theirs.subj05/1 as champion, from {out}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "nothing"), "model 'nothing' is not in the registry"),
        (("export", "nothing", "--out", "x.safetensors"), "registered are: tiny, tiny.subj05"),
        (("export", f"{NAME}/9", "--out", "x.safetensors"), "is not in the registry"),
        (("import", "missing.safetensors"), "it is no file"),
        (("promote", NAME), "names no version"),
        (("diff", NAME, "tiny/7"), "is not in the registry"),
    ],
)
def test_what_is_not_there_is_one_line(call, words, said):
    code, out, err = call(*words)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
