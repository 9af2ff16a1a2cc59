"""Write a checkpoint of the present format beside this file, for later versions to read.

python -m tests.checkpoints.make

To be called once per format, before the release that brings it; what is there already is never written again.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from foundation.checkpoint import FORMAT_VERSION as MODEL_FORMAT
from foundation.checkpoint import load_model
from foundation.training.checkpoints import FORMAT_VERSION, newest_checkpoint
from foundation.training.course import train_run
from foundation.training.engine import LocalEngine
from foundation.training.run import Plan
from tests.tiny_store import make_tiny_store, tiny_recipe

HERE = Path(__file__).parent
SUBJECT = "subj02"


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images' CLS and patch tokens."""
    made = torch.arange(2 * 2 * 17 * 6, dtype=torch.float32).view(2, 2, 17, 6).mul(0.7).sin()
    return made[:, :, 0], made[:, :, 1:]


def main() -> None:
    """Train two steps on the tiny store."""
    torch.set_num_threads(1)
    out = HERE / f"checkpoint-{FORMAT_VERSION}-model-{MODEL_FORMAT}"
    if out.exists():
        raise SystemExit(f"{out} is there already")
    with tempfile.TemporaryDirectory() as scratch:
        store, run = Path(scratch) / "tiny.zarr", Path(scratch) / "run"
        make_tiny_store(store)
        run.mkdir()
        recipe = tiny_recipe(store, epochs=1, checkpoint_every=2, keep_checkpoints=9)
        plan = Plan(recipe=recipe, store=str(store), directory=run, tracking_uri="", tracking_run="")
        train_run(plan, LocalEngine, lambda metrics, step: None)
        newest = newest_checkpoint(run)
        assert newest is not None
        shutil.copytree(newest, out)
    model, _ = load_model(out)
    with torch.no_grad():
        predicted = model.predict(*tokens(), SUBJECT)
    (out / "expected.json").write_text(json.dumps(predicted.tolist()))


if __name__ == "__main__":
    main()
