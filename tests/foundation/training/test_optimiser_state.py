"""AdamW's state by name: it passes between optimisers that group their parameters differently, and to no other."""

import pytest
import torch
from torch import nn

from foundation.training.optimiser_state import check_names, load_named_state, named_state


def make(*, one_group: bool = True, width: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 2))
    parameters = list(model.parameters())
    groups = [parameters] if one_group else [parameters[2:], parameters[:2]]
    return model, torch.optim.AdamW([{"params": group} for group in groups], lr=0.1)


def update(model: nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
    optimiser.zero_grad()
    model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    optimiser.step()


def test_an_optimiser_with_other_groups_goes_on_from_a_state_bit_for_bit():
    model, optimiser = make()
    other, others = make(one_group=False)
    for seed in range(3):
        update(model, optimiser, seed)
    other.load_state_dict(model.state_dict())
    load_named_state(other, others, named_state(model, optimiser))
    for seed in (3, 4):
        update(model, optimiser, seed)
        update(other, others, seed)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(named_state(other, others), named_state(model, optimiser), rtol=0, atol=0)


def test_a_loaded_state_is_the_optimisers_own():
    model, optimiser = make()
    update(model, optimiser, 0)
    state = named_state(model, optimiser)
    before = {name: tensor.clone() for name, tensor in state.items()}
    other, others = make()
    load_named_state(other, others, state)
    update(other, others, 1)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_before_the_first_update_there_is_the_step_alone_and_it_empties_what_loads_it():
    fresh = named_state(*make())
    assert fresh == {"step": torch.tensor(0.0)}
    model, optimiser = make()
    update(model, optimiser, 0)
    load_named_state(model, optimiser, fresh)
    assert named_state(model, optimiser) == fresh


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda state: state.pop("0.weight.exp_avg"),
            r"1 differ, 0\.weight\.exp_avg .*missing where torch.Size\(\[3, 4\]\)",
        ),
        (lambda state: state.update({"1.x": torch.zeros(1)}), r"1\.x .*torch.Size\(\[1\]\) where nothing is expected"),
        (lambda state: state.update({"2.bias.exp_avg": torch.zeros(3)}), r"2\.bias\.exp_avg .*\[3\]\) where .*\[2\]\)"),
        (lambda state: state.pop("step"), r"1 differ, step "),
    ],
    ids=["missing", "too many", "another shape", "no step"],
)
def test_the_state_of_other_parameters_is_refused(spoil, message):
    model, optimiser = make()
    update(model, optimiser, 0)
    state = named_state(model, optimiser)
    spoil(state)
    with pytest.raises(ValueError, match=message):
        load_named_state(model, optimiser, state)


def test_checking_returns_the_number_of_updates():
    model, optimiser = make()
    for seed in range(4):
        update(model, optimiser, seed)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert check_names(named_state(model, optimiser), shapes) == 4
