"""The local engine: what it saves is what it goes on with."""

import math
from dataclasses import replace

import pytest
import torch

from data.batch import Batch, Part
from foundation.config import ComputeConfig, LossConfig, OptimConfig, Recipe
from foundation.losses import objective
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.engine import LocalEngine
from foundation.training.optimiser_state import load_named_state
from tests.tiny_store import TINY_BACKBONE

RECIPE = Recipe(name="tiny", backbone=TINY_BACKBONE, optim=OptimConfig(lr=0.01, clip=0.5))


def engine(*, n_voxel: int = 9, compute: ComputeConfig | None = None, recipe: Recipe = RECIPE) -> LocalEngine:
    torch.manual_seed(0)
    parcels = {"subj01": torch.arange(n_voxel) // 3}
    model = EncodingModel(TokenShape(depth=2, patch=4, width=5), recipe.backbone, parcels)
    return LocalEngine(model, recipe, compute, device=torch.device("cpu"))


def batch(seed: int, n: int = 4) -> Batch:
    made = torch.Generator().manual_seed(seed)
    responses = torch.randn(n, 9, generator=made)
    return Batch(
        cls=torch.randn(n, 2, 5, generator=made),
        patch=torch.randn(n, 2, 4, 5, generator=made),
        image=torch.arange(n),
        parts={"subj01": Part(rows=slice(0, n), responses=responses)},
    )


def step(of: LocalEngine, seed: int, *, factor: float = 1.0) -> float:
    torch.manual_seed(seed)
    of.backward(factor * of.forward(batch(seed)).total, last=True)
    return of.step(lr=0.01 / (1 + seed))


def assert_same(one: LocalEngine, other: LocalEngine) -> None:
    weights = (dict(engine.model.state_dict()) for engine in (one, other))
    torch.testing.assert_close(*weights, rtol=0, atol=0, equal_nan=True)


def test_a_saved_and_loaded_optimiser_goes_on_bit_for_bit():
    first, second = engine(), engine()
    for seed in range(3):
        step(first, seed)
    second.model.load_state_dict(first.weights())
    second.load_optimiser_state(first.optimiser_state())
    for seed in (3, 4):
        assert step(first, seed) == step(second, seed)
    assert_same(first, second)
    fresh = engine()
    fresh.model.load_state_dict(first.weights())
    step(fresh, 5)
    step(first, 5)
    with pytest.raises(AssertionError):  # the state matters: without it, the next step is another one
        assert_same(first, fresh)


def test_the_state_is_each_parameters_moments_by_name_and_the_number_of_updates():
    first = engine()
    assert first.optimiser_state() == {"step": torch.tensor(0.0)}
    for seed in range(2):
        step(first, seed)
    state = first.optimiser_state()
    shapes = {name: parameter.shape for name, parameter in first.model.named_parameters()}
    assert {name: tensor.shape for name, tensor in state.items()} == {"step": ()} | {
        f"{name}.{moment}": shape for name, shape in shapes.items() for moment in ("exp_avg", "exp_avg_sq")
    }
    assert state["step"] == 2


def test_a_state_of_before_the_first_update_starts_afresh():
    first, second = engine(), engine()
    step(second, 7)
    second.model.load_state_dict(first.weights())
    second.load_optimiser_state(first.optimiser_state())
    assert step(first, 0) == step(second, 0)
    assert_same(first, second)


def test_a_step_reports_the_gradients_norm_before_clipping():
    first = engine()
    expected = engine()
    torch.manual_seed(0)
    (1e3 * expected.forward(batch(0)).total).backward()
    norm = torch.stack([p.grad.norm() for p in expected.model.parameters()]).norm()
    before = {name: value.detach().clone() for name, value in first.model.named_parameters()}
    assert step(first, 0, factor=1e3) == pytest.approx(float(norm), rel=1e-4)
    assert all(parameter.grad is None for parameter in first.model.parameters())
    moved = max(float((value.detach() - before[name]).abs().max()) for name, value in first.model.named_parameters())
    assert 0 < moved < 0.02


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_and_leaves_nothing_behind(factor):
    first, second = engine(), engine()
    for of in (first, second):
        step(of, 0)
    before = first.optimiser_state()
    assert not math.isfinite(step(first, 1, factor=factor))
    assert_same(first, second)
    torch.testing.assert_close(first.optimiser_state(), before, rtol=0, atol=0)
    assert step(first, 2) == step(second, 2)
    assert_same(first, second)


def test_parts_of_a_step_give_the_mean_of_their_gradients():
    one, other = engine(compute=ComputeConfig(accumulate=2)), engine()
    parts = [batch(0), batch(1)]
    for last, part in enumerate(parts):
        torch.manual_seed(0)
        one.backward(one.forward(part).total, last=bool(last))
    losses = []
    for part in parts:
        torch.manual_seed(0)
        losses.append(other.forward(part).total)
    other.backward(sum(losses) / 2, last=True)
    assert one.step(lr=0.01) == pytest.approx(other.step(lr=0.01), rel=1e-5)


def test_the_objective_of_a_forward_pass_is_that_of_the_losses():
    made = batch(0)
    rows, responses = {"subj01": slice(0, 4)}, {"subj01": made.parts["subj01"].responses}
    recipe = replace(RECIPE, backbone=replace(TINY_BACKBONE, dropout=0.0, latent=None))
    plain = engine(recipe=recipe)
    found = plain.forward(made, stage="stage1")
    output = plain.model(made.cls, made.patch, rows)
    expected = objective(plain.model, output, responses, LossConfig(), stage="stage1")
    torch.testing.assert_close(found.total, expected.total)
    assert found.terms.keys() == expected.terms.keys()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("streams.cls_proj.weight.exp_avg"),
        lambda state: state.update({"streams.nothing.exp_avg": torch.zeros(3)}),
        lambda state: state.update({"streams.cls_proj.weight.exp_avg": torch.zeros(3)}),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_the_state_of_other_parameters_is_refused_and_one_of_them_named(spoil):
    first = engine()
    step(first, 0)
    state = dict(first.optimiser_state())
    spoil(state)
    with pytest.raises(
        ValueError, match=r"of other parameters than the model's; 1 differ, streams\.(cls_proj|nothing)"
    ):
        first.load_optimiser_state(state)
    with pytest.raises(ValueError, match="of other parameters"):
        load_named_state(engine(n_voxel=12).model, torch.optim.AdamW([torch.zeros(1)]), first.optimiser_state())


def test_one_process_is_its_own_mean_vote_and_gathering():
    alone = engine()
    assert (alone.rank, alone.world) == (0, 1)
    assert alone.mean([1.0, 2.5]) == [1.0, 2.5]
    assert alone.any(True)
    assert not alone.any(False)
    assert torch.equal(alone.gather(torch.arange(3)), torch.arange(3))
