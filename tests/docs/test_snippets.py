"""Python that README and docs show runs as it stands, page by page; so do the command lines that follow it."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from foundation.sharing import export_version
from foundation.tracking.publish import publish
from foundation.tracking.registry import find_version
from foundation.tracking.runs import TrackedRun, tracking_uri
from tests.documented import PAGES, ROOT, blocks, command_lines
from tests.planted_scores import planted_versions
from tests.tiny_version import ADAPTED, picture, png, save_parts

VERSION = f"phantom-tiny.{ADAPTED}"
WITH_PYTHON = {page.stem: page for page in PAGES if blocks(page, "python")}
HOME_OF_THE_EXAMPLE = "sqlite:////home/me/.local/share/manybrains/mlflow.db"


def register(directory: Path) -> None:
    """Register an adapter under the name that the pages use."""
    backbone, adapter, _ = save_parts(directory)
    publish(
        TrackedRun.start("run", kind="adapt", config={}, tags={}),
        name=VERSION,
        kind="adapter",
        backbone=backbone,
        adapter=adapter,
        lineage={"backbone": "phantom-tiny/1", "subject": ADAPTED, "sessions": 3},
        scores=planted_versions({ADAPTED: 0.3}),
    )


def for_predict(place: Path) -> None:
    register(place / "parts")
    (place / "shown").mkdir()
    (place / "shown" / "bear.png").write_bytes(png(picture(0)))


def for_registry(place: Path) -> None:
    register(place / "parts")
    export_version(find_version(VERSION, kind="adapter"), place / "subj05.safetensors")


PREPARED: dict[str, Callable[[Path], None]] = {
    "adding-a-data-set": lambda place: None,
    "predict": for_predict,
    "quickstart": lambda place: None,
    "registry": for_registry,
}
"""What the reader has before the page's blocks run, by page."""


@pytest.fixture(autouse=True)
def ours_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A page may name a tracking server for its process, which is ours: MLflow keeps it in a variable and a global."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    yield
    mlflow.set_tracking_uri(None)


@pytest.mark.parametrize("name", sorted(WITH_PYTHON))
def test_python_blocks_run_as_they_stand(name, tmp_path, monkeypatch):
    assert name in PREPARED, f"say in PREPARED what the python of {name}.md needs"
    monkeypatch.chdir(tmp_path)
    PREPARED[name](tmp_path)
    names: dict[str, object] = {}
    for block in blocks(WITH_PYTHON[name], "python"):
        exec(compile(block.replace(HOME_OF_THE_EXAMPLE, tracking_uri()), f"{name}.md", "exec"), names)


def test_a_data_set_of_ones_own_is_scored_by_the_lines_of_its_page(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs/adding-a-data-set.md"
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})
    lines = command_lines(page)
    assert [line.text for line in lines if line.ours is None] == []
    for line in lines:
        assert line.ours is not None
        module, args = line.ours
        monkeypatch.setattr(sys, "argv", [module, *args])
        importlib.import_module(module).main()
    told = capsys.readouterr().out
    assert "Scores of anna, ben, protocol strict" in told
    assert "Predicted at all?" in told
