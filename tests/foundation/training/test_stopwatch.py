"""Seconds by phase add up to the window, and each window begins afresh."""

import pytest

from foundation.training import stopwatch as module
from foundation.training.stopwatch import Stopwatch


class Clock:
    """A clock that goes on when it is told."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_throughput_and_phases_are_those_of_the_window(clock):
    watch = Stopwatch()
    for _ in range(4):
        for phase, seconds in (("data", 0.5), ("forward", 1.0), ("backward", 2.0), ("update", 0.5)):
            with watch.phase(phase):
                clock.now += seconds
        watch.n_steps += 1
    with watch.phase("validation"):
        clock.now += 4.0
    assert watch.window_s == 20.0
    told = watch.take(images_per_step=30, tokens_per_image=10)
    assert told["train/images_per_s"] == 6.0
    assert told["train/tokens_per_s"] == 60.0
    assert {name: told[f"time/{name}_ms"] for name in ("data", "forward", "backward", "update")} == {
        "data": 500.0,
        "forward": 1000.0,
        "backward": 2000.0,
        "update": 500.0,
    }
    assert told["time/data_share"] == 0.125
    assert told["time/validation_s"] == 4.0
    assert "time/checkpoint_s" not in told
    assert told["memory/host_peak_gib"] > 0.05
    clock.now += 1.0
    again = watch.take(images_per_step=30, tokens_per_image=10)
    assert again["train/images_per_s"] == 0.0
    assert not any(name.startswith("time/") for name in again)


def failing(watch: Stopwatch, clock: Clock) -> None:
    with watch.phase("data"):
        clock.now += 2.0
        raise ValueError("no")


def test_a_phase_that_raises_is_counted(clock):
    watch = Stopwatch()
    with pytest.raises(ValueError, match="no"):
        failing(watch, clock)
    watch.n_steps += 1
    assert watch.take(images_per_step=1, tokens_per_image=1)["time/data_ms"] == 2000.0
