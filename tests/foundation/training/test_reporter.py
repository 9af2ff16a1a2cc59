"""What people and the tracking server are told, also by a server that is down, and once only."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foundation.tracking.runs import TrackedRun, TrackingError
from foundation.training import reporter as module
from foundation.training.reporter import Reporter, follow, line, read_metrics

STEP = {"train/loss": 1.5, "train/voxel": 1.25}
SCORED = STEP | {
    "validation/voxel_r": 0.25,
    "train/images_per_s": 81.4,
    "time/data_share": 0.031,
    "time/left_s": 7384.0,
}


class Server(TrackedRun):
    """A tracking server that takes steps, unless it is down."""

    def __init__(self, *, down: bool = False) -> None:
        self.down, self.steps, self.times_ms, self.calls = down, [], [], 0

    def log_steps(self, steps, *, times_ms=None) -> None:
        self.calls += 1
        if self.down:
            raise TrackingError("nobody answers")
        self.steps += [step for step, _ in steps]
        self.times_ms += times_ms


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    return


def lines(directory: Path) -> list[str]:
    path = directory / "progress.log"
    return path.read_text().splitlines() if path.exists() else []


def test_every_step_reaches_the_server_once_and_in_order(tmp_path):
    server = Server()
    reporter = Reporter(server, tmp_path)
    for step in range(1, 8):
        reporter(STEP, step)
    reporter.close()
    assert server.steps == list(range(1, 8))
    assert read_metrics(tmp_path) == [(step, STEP) for step in range(1, 8)]


def test_a_server_that_is_down_holds_up_nothing_and_has_everything_when_it_is_back(tmp_path):
    server = Server(down=True)
    reporter = Reporter(server, tmp_path)
    reporter(STEP, 1)
    until = time.monotonic() + 60
    while server.calls < 3:
        assert time.monotonic() < until
    reporter(STEP, 2)
    server.down = False
    reporter.close()
    assert server.steps == [1, 2]
    assert [text.split(" (")[0] for text in lines(tmp_path)] == [
        "the tracking server doesn't take metrics",
        "the tracking server takes metrics again",
    ]


def test_what_a_server_that_stays_down_has_not_taken_is_sent_when_the_run_goes_on(tmp_path):
    down = Server(down=True)
    reporter = Reporter(down, tmp_path)
    for step in (1, 2, 3):
        reporter(STEP, step)
    reporter.close()
    assert "metrics of 3 steps wait in" in lines(tmp_path)[-1]
    back = Server()
    again = Reporter(back, tmp_path)
    again(STEP, 3)  # trained over, after a kill
    again(STEP, 4)
    again.close()
    assert back.steps == [1, 2, 3, 4]
    third = Server()
    Reporter(third, tmp_path).close()
    assert third.steps == []


def test_what_is_sent_again_is_the_same_points(tmp_path):
    """A server may have taken what it didn't answer; MLflow keeps a point of the same step, time and value once."""
    first = Server()
    reporter = Reporter(first, tmp_path)
    for step in (1, 2):
        reporter(STEP, step)
    reporter.close()
    (tmp_path / "sent.json").unlink()
    second = Server()
    Reporter(second, tmp_path).close()
    assert (second.steps, second.times_ms) == (first.steps, first.times_ms)


def test_a_line_that_a_kill_cut_off_is_left_out_and_its_step_told_again(tmp_path):
    reporter = Reporter(Server(down=True), tmp_path)
    reporter(STEP, 1)
    reporter(STEP | {"train/grad_norm": math.nan}, 2)
    reporter.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    server = Server()
    reporter = Reporter(server, tmp_path)
    reporter(STEP, 2)
    reporter.close()
    assert server.steps == [1, 2]
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2]


def test_people_get_a_line_with_each_validation_and_now_and_then_between(tmp_path, monkeypatch):
    reporter = Reporter(Server(), tmp_path)
    reporter(STEP, 1)
    reporter(STEP | {"train/images_per_s": 80.0}, 2)
    assert lines(tmp_path) == []
    reporter(SCORED, 3)
    assert len(lines(tmp_path)) == 1
    monkeypatch.setattr(module, "LINE_S", 0.0)
    reporter(STEP | {"train/images_per_s": 80.0}, 4)
    reporter.close()
    assert [text.split()[1] for text in lines(tmp_path)] == ["3", "4"]


def test_a_line_says_where_a_run_is_how_fast_and_how_long_it_will_take():
    assert line(SCORED, 40) == (
        "step    40  loss 1.5000  voxel mse 1.2500  validation r 0.2500  81 images/s  waiting for data 3%  "
        "2 h 3 min left"
    )
    assert line(STEP, 5) == "step     5  loss 1.5000  voxel mse 1.2500"


def test_lines_that_came_since_the_last_look_are_printed(tmp_path, capsys):
    reporter = Reporter(Server(), tmp_path)
    reporter.tell("of before")
    with follow(tmp_path) as told:
        reporter.tell("one")
        told()
        assert capsys.readouterr().out == "one\n"
        reporter.tell("two")
    assert capsys.readouterr().out == "two\n"
    reporter.close()
