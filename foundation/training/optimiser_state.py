"""AdamW's state by the parameters' names: one form for every engine, ZeRO stage and number of workers.

``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``, each whole and shaped as its parameter, and ``step``, the
updates taken, which is the same for all parameters, for each has a gradient in every step. Before the first update
there is ``step`` alone.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


def named_state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimiser that steps the model's own parameters, on the CPU."""
    found: dict[str, Tensor] = {STEP: torch.zeros((), dtype=torch.float32)}
    for name, parameter in model.named_parameters():
        entry = optimiser.state.get(parameter)
        if entry:
            found[STEP] = entry[STEP].detach().cpu().float()
            found |= {f"{name}.{moment}": entry[moment].detach().cpu().contiguous() for moment in MOMENTS}
    return found


def check_names(state: Mapping[str, Tensor], parameters: Mapping[str, torch.Size]) -> int:
    """Return the number of updates that `state` has seen.

    Raises
    ------
    ValueError
        If it isn't the state of `parameters`, which are told by name and shape.
    """
    shapes = {f"{name}.{moment}": shape for name, shape in parameters.items() for moment in MOMENTS}
    wanted = {STEP: torch.Size(())} | (shapes if len(state) > 1 else {})
    found = {name: tensor.shape for name, tensor in state.items()}
    if found != wanted:
        other = sorted(_different(found, wanted))
        raise ValueError(
            f"the optimiser's state is of other parameters than the model's; {len(other)} differ, {other[0]} for one: "
            f"{found.get(other[0], 'missing')} where {wanted.get(other[0], 'nothing')} is expected"
        )
    return int(state[STEP])


def _different(one: Mapping[str, torch.Size], other: Mapping[str, torch.Size]) -> Iterable[str]:
    return (name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def load_named_state(model: nn.Module, optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Give the optimiser of `model` a state that `named_state` returned, here or on another engine."""
    named = dict(model.named_parameters())
    n_updates = check_names(state, {name: parameter.shape for name, parameter in named.items()})
    optimiser.state.clear()
    if n_updates:
        for name, parameter in named.items():
            entry = {moment: state[f"{name}.{moment}"].to(parameter.device).clone() for moment in MOMENTS}
            optimiser.state[parameter] = {STEP: torch.tensor(float(n_updates))} | entry
