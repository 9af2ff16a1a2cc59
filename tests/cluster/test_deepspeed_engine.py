"""DeepSpeed engines of every ZeRO stage on two ranks against the local engine on the same parts: the same training.

Tolerances are rounding's: losses agree to 1e-6, norms to 2e-6, weights to 1e-5 after 20 steps of Adam.
"""

from dataclasses import replace

import pytest
import torch

from cluster.config import ClusterConfig
from foundation.config import ComputeConfig
from foundation.training.engine import LocalEngine
from tests.cluster.zero_ranks import (
    BACKBONE,
    BAD,
    HALF,
    N_STEPS,
    RECIPE,
    Job,
    Trained,
    difference,
    jointly,
    make_model,
    run_jobs,
    staged,
    train,
)

pytestmark = pytest.mark.timeout(600)

OTHER_PARTS = replace(BACKBONE, bidirectional=True, readout="factorised", gate="image", latent=None, amplitude=False)
SETTINGS = {
    "zero 0": ClusterConfig(zero_stage=0),
    "zero 1": ClusterConfig(zero_stage=1),
    "zero 2": ClusterConfig(zero_stage=2),
    "zero 1, offloaded": ClusterConfig(zero_stage=1, offload=True),
    "zero 2, offloaded": ClusterConfig(zero_stage=2, offload=True),
    "zero 3": ClusterConfig(zero_stage=3),
    "zero 3, offloaded": ClusterConfig(zero_stage=3, offload=True),
    "zero 3, recomputed": ClusterConfig(zero_stage=3, recompute=True),
}
TWICE = {f"{name}, twice": replace(SETTINGS[name], accumulate=2) for name in ("zero 0", "zero 1", "zero 2", "zero 3")}
TWICE["zero 2, offloaded, twice"] = replace(SETTINGS["zero 2, offloaded"], accumulate=2)
RESUMED = [("zero 0", "zero 2"), ("zero 1", "local"), ("zero 2", "zero 1"), ("zero 3", "zero 0"), ("zero 1", "zero 3")]
ALONE = [("zero 0", "zero 1"), ("zero 3", "zero 2"), ("zero 2", "zero 3")]
ONE_PART = [*SETTINGS, *(f"{name} after {before}" for name, before in RESUMED)]


def locally(*, accumulate: int = 2, stages=jointly, backbone=BACKBONE, resume: Trained | None = None) -> Trained:
    torch.set_num_threads(1)
    model = make_model(backbone)
    engine = LocalEngine(
        model, replace(RECIPE, backbone=backbone), ComputeConfig(accumulate=accumulate), device=torch.device("cpu")
    )
    if resume is not None:
        model.load_state_dict(resume.weights[HALF])
        engine.load_optimiser_state(resume.states[HALF])
    return train(engine, start=HALF if resume else 0, stage_at=stages)


@pytest.fixture(scope="module")
def local() -> Trained:
    return locally()


@pytest.fixture(scope="module")
def local_in_four() -> Trained:
    return locally(accumulate=4)


@pytest.fixture(scope="module")
def ranks(local) -> dict[str, Trained]:
    """What two ranks trained; ZeRO 3 comes last, for it replaces torch's linear layer."""
    jobs = [Job(name=name, cluster=cluster) for name, cluster in (SETTINGS | TWICE).items()]
    jobs += [Job(name=f"{name} after {before}", cluster=SETTINGS[name], resume=before) for name, before in RESUMED]
    jobs += [
        Job(name="zero 1, staged", cluster=SETTINGS["zero 1"], staged=True),
        Job(name="zero 3, staged", cluster=SETTINGS["zero 3"], staged=True),
        Job(name="zero 3, other parts", cluster=SETTINGS["zero 3"], backbone=OTHER_PARTS),
        Job(name="zero 2, bf16", cluster=replace(SETTINGS["zero 2"], precision="bf16")),
        Job(name="zero 3, bf16", cluster=replace(SETTINGS["zero 3"], precision="bf16")),
    ]
    return run_jobs(jobs, world=2, given={"local": local})


@pytest.fixture(scope="module")
def alone(ranks) -> dict[str, Trained]:
    """What one rank trained of what two had begun, in two parts a step."""
    jobs = [
        Job(name=f"{name} after {before}", cluster=replace(SETTINGS[name], accumulate=2), resume=before)
        for name, before in ALONE
    ]
    return run_jobs(jobs, world=1, given=ranks)


def assert_same(found: Trained, wanted: Trained) -> None:
    """Of a resumed training, the second half."""
    n = len(found.losses)
    assert n in (N_STEPS, N_STEPS - HALF)
    assert difference(found.losses, wanted.losses[-n:]) < 1e-6
    assert difference(found.norms, wanted.norms[-n:]) < 2e-6
    for step, weights in found.weights.items():
        torch.testing.assert_close(weights, wanted.weights[step], rtol=0, atol=1e-5, equal_nan=True)
    for step, state in found.states.items():
        assert state.keys() == wanted.states[step].keys()
        for name, tensor in state.items():
            scale = float(wanted.states[step][name].abs().max())
            torch.testing.assert_close(tensor, wanted.states[step][name], rtol=0, atol=1e-4 * scale, msg=name)
    torch.testing.assert_close(found.predicted, wanted.predicted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ONE_PART)
def test_two_ranks_train_as_one_process_in_two_parts(ranks, local, name):
    assert_same(ranks[name], local)


@pytest.mark.parametrize("name", TWICE)
def test_two_ranks_in_two_parts_train_as_one_process_in_four(ranks, local_in_four, name):
    assert_same(ranks[name], local_in_four)


@pytest.mark.parametrize("name", ["zero 1, staged", "zero 3, staged"])
def test_stages_train_alike(ranks, name):
    wanted = locally(stages=staged)
    assert_same(ranks[name], wanted)
    rests = [key for key in wanted.weights[BAD] if key.startswith("vae.") or key.endswith("voxel_bias")]
    for key in rests:
        assert torch.equal(ranks[name].weights[BAD][key], make_model().state_dict()[key]), key


def test_other_parts_of_the_model_train_alike(ranks):
    assert_same(ranks["zero 3, other parts"], locally(backbone=OTHER_PARTS))


@pytest.mark.parametrize("name", ["zero 2, bf16", "zero 3, bf16"])
def test_in_half_precision_losses_stay_near(ranks, local, name):
    found = ranks[name]
    assert found.losses != local.losses
    assert difference(found.losses, local.losses) < 0.02
    assert {tensor.dtype for tensor in (found.weights[N_STEPS] | found.states[N_STEPS]).values()} <= {
        torch.float32,
        torch.int64,
    }


@pytest.mark.parametrize("name", [f"{name} after {before}" for name, before in ALONE])
def test_one_rank_goes_on_where_two_were(alone, local, name):
    assert_same(alone[name], local)


@pytest.mark.parametrize("before", ["zero 0", "zero 1", "zero 2", "zero 3", "zero 3, offloaded"])
def test_the_local_engine_goes_on_from_every_stage(ranks, local, before):
    assert_same(locally(resume=ranks[before]), local)


@pytest.mark.parametrize("name", ["local", *SETTINGS, *TWICE])
def test_a_gradient_that_is_not_finite_moves_nothing(ranks, name):
    found = ranks[name]
    assert not torch.tensor(found.norms[BAD]).isfinite()
    torch.testing.assert_close(found.weights[BAD], found.weights[BAD + 1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.states[BAD], found.states[BAD + 1], rtol=0, atol=0)
    assert [int(found.states[step]["step"]) for step in (BAD, HALF, N_STEPS)] == [BAD, HALF - 1, N_STEPS - 1]


@pytest.mark.parametrize("name", ["zero 3", "zero 3, offloaded", "zero 3, recomputed"])
def test_under_zero_3_parameters_are_gathered_by_module_and_let_go(ranks, name):
    total = sum(parameter.numel() for parameter in make_model().parameters())
    assert ranks["zero 2"].held == total
    assert 0 < ranks[name].held < 0.25 * total
