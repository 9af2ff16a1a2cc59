"""What an intervention changes of the streams, and what it leaves."""

import pytest
import torch

from foundation.evaluation.interventions import (
    CONTROL,
    averaged,
    interventions,
    mean_of,
    random_subspace,
    shuffled,
    swapped_inputs,
    zeroed,
)
from foundation.model.dual_stream import Streams

N_IMAGE, N_PLACE, WIDTH = 40, 9, 6
OTHER = {"cls": "patch", "patch": "cls"}


@pytest.fixture
def streams() -> Streams:
    generator = torch.Generator().manual_seed(0)
    return Streams(
        cls=2 * torch.randn(N_IMAGE, WIDTH, generator=generator) + 1,
        patch=torch.randn(N_IMAGE, N_PLACE, WIDTH, generator=generator) - 3,
        gate=torch.randn(N_IMAGE, 2, generator=generator),
    )


def change(before: Streams, after: Streams) -> float:
    """Sum of squares over images, places and channels, the CLS stream counted once a place."""
    return float(N_PLACE * (after.cls - before.cls).square().sum() + (after.patch - before.patch).square().sum())


@pytest.mark.parametrize("branch", ["cls", "patch"])
def test_a_branch_is_replaced_and_the_other_and_the_gate_are_left(streams, branch):
    order = torch.arange(N_IMAGE).flip(0)
    expected = {
        zeroed(branch): torch.zeros_like(getattr(streams, branch)),
        averaged(branch, mean_of(streams)): getattr(streams, branch).mean(0).expand_as(getattr(streams, branch)),
        shuffled(branch, order): getattr(streams, branch).flip(0),
    }
    for intervene, replaced in expected.items():
        found = intervene(streams)
        torch.testing.assert_close(getattr(found, branch), replaced)
        assert torch.equal(getattr(found, OTHER[branch]), getattr(streams, OTHER[branch]))
        assert torch.equal(found.gate, streams.gate)


@pytest.mark.parametrize("branch", ["cls", "patch"])
def test_a_random_subspace_changes_the_streams_as_much_as_the_branch_at_its_mean_does(streams, branch):
    mean, generator = mean_of(streams), torch.Generator().manual_seed(1)
    wanted = change(streams, averaged(branch, mean)(streams))
    intervene, n = random_subspace(branch, streams, mean, generator=generator)
    fewer = random_subspace(branch, streams, mean, generator=torch.Generator().manual_seed(1))[1]
    assert fewer == n  # the same draw, the same number
    assert 1 <= n <= 2 * WIDTH
    step = change(streams, averaged("cls", mean)(streams)) + change(streams, averaged("patch", mean)(streams))
    assert abs(change(streams, intervene(streams)) - wanted) < 3 * step / (2 * WIDTH)  # to a direction or so


def test_removing_every_direction_leaves_the_mean_image(streams):
    mean = mean_of(streams)
    everything = Streams(cls=1e3 * streams.cls, patch=streams.patch, gate=streams.gate)
    intervene, n = random_subspace("cls", everything, mean_of(everything), generator=torch.Generator().manual_seed(2))
    assert n > WIDTH  # a branch that holds nearly all there is takes most directions with it
    assert intervene(streams).patch.shape == streams.patch.shape
    assert mean.cls.shape == (1, WIDTH)


def test_what_the_control_takes_of_all_directions_is_told(streams):
    louder = Streams(cls=100 * streams.cls, patch=streams.patch, gate=streams.gate)
    done = interventions(louder, n_draws=3, generator=torch.Generator().manual_seed(0))
    assert len(done.by_name["cls", CONTROL]) == 3
    assert done.removed["cls"].n_all == 2 * WIDTH
    assert done.removed["cls"].n > 0.8 * 2 * WIDTH
    assert done.removed["patch"].n == 1


def test_swapped_inputs_put_the_mean_patch_for_the_cls_token_and_that_token_at_every_place():
    cls, patch = torch.randn(3, 2, 5), torch.randn(3, 2, 4, 5)
    as_cls, as_patch = swapped_inputs(cls, patch)
    torch.testing.assert_close(as_cls, patch.mean(2))
    assert as_patch.shape == patch.shape
    for place in range(4):
        assert torch.equal(as_patch[:, :, place], cls)
