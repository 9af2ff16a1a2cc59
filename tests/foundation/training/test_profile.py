"""A trace that a viewer can open, and a table by operator."""

import json

import pytest
import torch

from foundation.training.profile import ACTIVE, WAIT, WARMUP, profiled


def test_ten_steps_are_traced_after_the_first_ones(tmp_path):
    lines = []
    with profiled(tmp_path / "profile", tell=lines.append) as after_step:
        for _ in range(WAIT + WARMUP + ACTIVE + 3):
            torch.randn(8, 8) @ torch.randn(8, 8)
            after_step()
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{WAIT + WARMUP + i}" for i in range(ACTIVE)}
    assert "aten::mm" in (tmp_path / "profile" / "operators.txt").read_text()
    assert lines == [f"profile of {ACTIVE} steps: {tmp_path}/profile/trace.json, operators.txt"]


@pytest.mark.parametrize("n_steps", [1, WAIT + WARMUP + 2])
def test_a_run_too_short_to_trace_says_so(tmp_path, n_steps):
    lines = []
    with profiled(tmp_path / "profile", tell=lines.append) as after_step:
        for _ in range(n_steps):
            after_step()
    assert lines == [f"too few steps for a profile: it needs {WAIT + WARMUP + ACTIVE}"]
    assert not (tmp_path / "profile").exists()
