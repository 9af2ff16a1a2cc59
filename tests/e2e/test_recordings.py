"""The whole road on real recordings: import, features, pretrain on one animal, adapt to the other, both ways."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foundation.tracking.runs import find_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
BIN = Path(sys.executable).parent
TABLE = Path(__file__).parents[1] / "recordings" / "v4.json"
PE = ["PE201025", "PE210224", "PE210325"]
SESSIONS = {"WE190923": 6, "PE201025": 6, "PE210224": 4, "PE210325": 3}


def call(home: Path, *command: str) -> str:
    environment = os.environ | {"MANYBRAINS_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    print(done.stdout)
    return done.stdout


def test_each_animal_is_predicted_by_a_backbone_of_the_other(shared_data, home):
    store = str(home / "v4.zarr")
    python = str(BIN / "python")
    call(home, python, "-m", "data", "import", "arrays", str(shared_data / "v4"), store, "--recordings", str(TABLE))
    encoder = str(shared_data / "encoder-vits14")
    call(home, python, "-m", "data", "features", store, "--encoder", encoder, "--depths", "4", "7", "10")
    for trained, held_out in ((PE, ["WE190923"]), (["WE190923"], PE)):
        table = call(home, python, "-m", "foundation.pretrain", "v4", "--store", store, "--subjects", *trained)
        assert "n/a" in table
        for subject in held_out:
            table = call(home, "adapt", "--subject", subject, "--sessions", str(SESSIONS[subject]))
            assert "successive blocks of 200 images, not scan sessions" in " ".join(table.split())
    runs = {run.data.tags["manybrains.subject"]: run for run in find_runs("tags.`manybrains.kind` = 'adapt'")}
    assert set(runs) == set(SESSIONS)
    for subject, run in runs.items():
        assert run.data.metrics["test/voxel_r"] > 0.3
        assert ("test/r2_ceiling" in run.data.metrics) == (subject == "PE210325")
