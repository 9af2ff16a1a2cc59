"""The local engine: what it saves is what it goes on with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foundation.config import OptimConfig
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.engine import LocalEngine
from tests.tiny_store import TINY_BACKBONE

CONFIG = OptimConfig(lr=0.01, clip=0.5)


def engine(*, n_voxel: int = 9) -> LocalEngine:
    torch.manual_seed(0)
    parcels = {"subj01": torch.arange(n_voxel) // 3}
    model = EncodingModel(TokenShape(depth=2, patch=4, width=5), TINY_BACKBONE, parcels)
    return LocalEngine(model.eval(), CONFIG, device=torch.device("cpu"))


def step(of: LocalEngine, seed: int) -> float:
    made = torch.Generator().manual_seed(seed)
    cls, patch = torch.randn(4, 2, 5, generator=made), torch.randn(4, 2, 4, 5, generator=made)
    voxel = of.wrapped(cls, patch, {"subj01": slice(0, 4)}).subjects["subj01"].voxel
    return of.step((voxel - 1).square().mean(), lr=0.01 / (1 + seed))


def assert_same(one: LocalEngine, other: LocalEngine) -> None:
    weights = (dict(engine.model.state_dict()) for engine in (one, other))
    torch.testing.assert_close(*weights, rtol=0, atol=0, equal_nan=True)


def test_a_saved_and_loaded_optimiser_goes_on_bit_for_bit(tmp_path):
    first, second = engine(), engine()
    for seed in range(3):
        step(first, seed)
    first.save_optimiser(tmp_path / "optimiser")
    second.model.load_state_dict(first.model.state_dict())
    second.load_optimiser(tmp_path / "optimiser")
    for seed in (3, 4):
        assert step(first, seed) == step(second, seed)
    assert_same(first, second)
    fresh = engine()
    fresh.model.load_state_dict(first.model.state_dict())
    step(fresh, 5)
    step(first, 5)
    with pytest.raises(AssertionError):  # the state matters: without it, the next step is another one
        assert_same(first, fresh)


def test_the_saved_state_is_tensors_and_json(tmp_path):
    first = engine()
    step(first, 0)
    first.save_optimiser(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimiser.json", "optimiser.safetensors"]
    assert json.loads((tmp_path / "optimiser.json").read_text())["kind"] == "torch"
    kinds = {name.split(".")[1] for name in load_file(tmp_path / "optimiser.safetensors")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}


def test_a_step_reports_the_gradients_norm_before_clipping(tmp_path):
    first = engine()
    voxel = first.wrapped(torch.ones(2, 2, 5), torch.ones(2, 2, 4, 5), {"subj01": slice(0, 2)}).subjects["subj01"].voxel
    loss = 1e3 * voxel.square().mean()
    gradients = torch.autograd.grad(loss, list(first.model.parameters()), retain_graph=True)
    expected = torch.stack([g.norm() for g in gradients]).norm()
    before = {name: value.detach().clone() for name, value in first.model.named_parameters()}
    assert first.step(loss, lr=0.01) == pytest.approx(float(expected), rel=1e-4)
    assert all(parameter.grad is None for parameter in first.model.parameters())
    moved = max(float((value.detach() - before[name]).abs().max()) for name, value in first.model.named_parameters())
    assert 0 < moved < 0.02


DAMAGES = {
    "missing": (lambda d: (d / "optimiser.json").unlink(), "can't be read"),
    "tensors missing": (lambda d: (d / "optimiser.safetensors").unlink(), "can't be read"),
    "tensors cut off": (
        lambda d: (d / "optimiser.safetensors").write_bytes((d / "optimiser.safetensors").read_bytes()[:-9]),
        "can't be read",
    ),
    "DeepSpeed's": (
        lambda d: (d / "optimiser.json").write_text('{"kind": "deepspeed", "zero_stage": 1, "workers": 2}'),
        "DeepSpeed shards; resume with the --cluster settings",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_state_that_cannot_be_read_is_a_clear_error(tmp_path: Path, damage, message):
    first = engine()
    step(first, 0)
    first.save_optimiser(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        engine().load_optimiser(tmp_path)


def test_the_state_of_another_model_is_refused(tmp_path):
    first = engine()
    step(first, 0)
    first.save_optimiser(tmp_path)
    settings = json.loads((tmp_path / "optimiser.json").read_text())
    settings["groups"][0]["n_params"] += 1
    (tmp_path / "optimiser.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="other parameters"):
        engine().load_optimiser(tmp_path)


def test_one_process_is_its_own_mean_and_vote():
    alone = engine()
    assert (alone.rank, alone.world) == (0, 1)
    assert alone.mean([1.0, 2.5]) == [1.0, 2.5]
    assert alone.any(True)
    assert not alone.any(False)
