"""Runs of every kind line up in MLflow's own UI, looked at by a browser over the store that our commands write."""

from collections.abc import Callable
from pathlib import Path

import pytest

from foundation.evaluation.compare import headline
from foundation.evaluation.score import Scores
from foundation.tracking.runs import TrackedRun, find_runs, tracking_uri
from foundation.tracking.scores import log_baselines, log_scores
from tests.e2e.mlflow_compare import (
    CHROMIUM,
    capture_compare_view,
    capture_filtered,
    capture_parallel_coordinates,
)
from tests.planted_scores import planted_scores

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"needs Debian's chromium at {CHROMIUM}: apt-get install chromium"
)
DOCS = Path(__file__).parents[2] / "docs" / "mlflow.md"
BACKBONE, OTHER = "phantom-tiny/1", "phantom-tiny/2"


def lineage(backbone: str, sessions: int) -> dict[str, str]:
    return {"backbone": backbone, "subject": "subj05", "sessions": str(sessions), "seed": "0", "store_digest": "s"}


def scored(kind: str, name: str, tags: dict[str, str], scores: Scores) -> TrackedRun:
    """A run as pretraining and adaptation leave it."""
    run = TrackedRun.start(name, kind=kind, config=tags, tags=tags)
    run.log_steps([(step, {"train/loss": 1 / (step + 1)}) for step in range(4)])
    log_scores(run, scores)
    run.finish()
    return run


@pytest.fixture(scope="module")
def runs_home(session_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a pretraining, adaptations of two backbones, and the ridge that all of them share."""
    home = tmp_path_factory.mktemp("runs-home")
    scores = {noise: planted_scores({"manybrains": noise, "ridge": 1.1}) for noise in (0.6, 0.8, 1.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYBRAINS_HOME", str(home))
        scored("pretrain", "phantom-tiny", {"recipe": "phantom-tiny", "backbone": BACKBONE}, scores[0.6])
        for backbone, sessions, noise in ((BACKBONE, 1, 1.0), (BACKBONE, 3, 0.8), (OTHER, 3, 0.6)):
            tags = lineage(backbone, sessions)
            scored("adapt", f"adapt-{sessions}s-{backbone.replace('/', '-')}", tags, scores[noise])
            log_baselines(scores[noise], tags=tags)
    return home


@pytest.fixture(autouse=True)
def in_home(home: Path, runs_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYBRAINS_HOME", str(runs_home))


@pytest.fixture
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    directory = request.config.getoption("--screenshots") or tmp_path
    return lambda name: directory / name


@pytest.fixture
def three_kinds() -> list[str]:
    """A run of each kind: a pretraining, an adaptation to three sessions, the ridge of three sessions."""
    return [only(f"tags.`manybrains.kind` = '{kind}'") for kind in ("pretrain", "adapt", "baseline")]


def only(filter_string: str) -> str:
    """The newest run that a filter finds."""
    return find_runs(filter_string)[0].info.run_id


def test_a_pretraining_an_adaptation_and_a_baseline_line_up_metric_by_metric(three_kinds, picture):
    shown = capture_compare_view(tracking_uri(), three_kinds, picture("mlflow-compare.png"))
    scores = planted_scores({"manybrains": 0.6, "ridge": 1.1})
    ours, ridge = headline(scores), headline(scores, "ridge")
    for metric in ("test/voxel_r", "test/pattern_r", "test/mse", "test/r2_ceiling", "test/voxel_r/roi/early"):
        printed = [float(value) for value in shown[metric]]
        assert sorted(printed) == pytest.approx(sorted([ours[metric], ours[metric], ridge[metric]]), abs=6e-4), metric
    assert picture("mlflow-compare.png").stat().st_size > 20_000


def test_the_documented_filter_leaves_the_adaptations_of_one_backbone(picture):
    of_backbone = f"tags.`manybrains.backbone` = '{BACKBONE}' and tags.`manybrains.kind` = 'adapt'"
    assert of_backbone in DOCS.read_text()
    names = capture_filtered(tracking_uri(), of_backbone, picture("mlflow-filter.png"), columns=["test/voxel_r"])
    assert sorted(names) == ["adapt-1s-phantom-tiny-1", "adapt-3s-phantom-tiny-1"]


def test_parallel_coordinates_have_an_axis_for_each_metric_that_is_chosen(three_kinds, picture):
    axes = capture_parallel_coordinates(
        tracking_uri(),
        three_kinds,
        picture("mlflow-parallel.png"),
        parameters=["sessions"],
        metrics=["test/voxel_r", "test/mse"],
    )
    assert axes == ["sessions", "test/voxel_r", "test/mse"]
