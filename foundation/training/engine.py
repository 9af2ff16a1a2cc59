"""What the training loop asks of whoever computes: `Engine`; and `LocalEngine`, one process and plain torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from data.batch import Batch
from foundation.config import ComputeConfig, Recipe
from foundation.losses import Losses, Stage
from foundation.model.encoding_model import EncodingModel
from foundation.training.optim import build_optimiser, set_rates
from foundation.training.optimiser_state import load_named_state, named_state
from foundation.training.recompute import recompute_blocks
from foundation.training.step import TrainingStep, autocast_dtype


@runtime_checkable  # so that tests can check annotations with it
class Engine(Protocol):
    """A model under an optimiser, on one process or on many that move in step.

    All ranks call the same methods in the same order.
    """

    rank: int
    world: int
    device: torch.device
    model: EncodingModel
    accumulate: int
    """Parts in which a rank takes its share of a step; their gradients are averaged."""

    def forward(self, batch: Batch, *, stage: Stage | None = None) -> Losses:
        """Return the objective of a part of this rank's share, in training."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a part's loss; `last` is the step's last part."""
        ...

    def step(self, *, lr: float, stage: Stage | None = None) -> float:
        """Update by the mean gradient over ranks and parts, clipped; return its norm before clipping.

        With a `stage`, only its parameters move. A gradient that isn't finite is dropped: nothing moves.
        """
        ...

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the means over ranks."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether any rank says so."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Return all ranks' rows, one rank after the other; each has as many."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state, whole and on the CPU; on ranks but the first, None."""
        ...

    def optimiser_state(self) -> dict[str, Tensor] | None:
        """Return the optimiser's state as `optimiser_state.named_state` has it; on ranks but the first, None."""
        ...

    def load_optimiser_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, whichever engine and however many ranks gave it.

        Raises
        ------
        ValueError
            If it is of other parameters.
        """
        ...


EngineFactory = Callable[[EncodingModel, Recipe], Engine]


class LocalEngine:
    """One process."""

    rank = 0
    world = 1

    def __init__(
        self,
        model: EncodingModel,
        recipe: Recipe,
        compute: ComputeConfig | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        compute = compute or ComputeConfig()
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.accumulate = compute.accumulate
        if compute.recompute:
            recompute_blocks(self.model)
        self._wrapped = TrainingStep(self.model, recipe.loss, autocast=autocast_dtype(compute.precision, self.device))
        self._clip = recipe.optim.clip
        self._optimiser = build_optimiser(model, recipe.optim)

    def forward(self, batch: Batch, *, stage: Stage | None = None) -> Losses:
        """Return the objective of a part of the step, in training."""
        self._wrapped.train()
        total, terms = self._wrapped(batch, stage)
        return Losses(total=total, terms=terms)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a part's loss."""
        (loss / self.accumulate).backward()

    def step(self, *, lr: float, stage: Stage | None = None) -> float:
        """Clip and update, unless the gradient isn't finite; return its norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._clip))
        set_rates(self._optimiser.param_groups, lr, stage)
        if math.isfinite(norm):
            self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return norm

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the values."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows."""
        return rows

    def barrier(self) -> None:
        """Return at once."""

    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state."""
        return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}

    def optimiser_state(self) -> dict[str, Tensor] | None:
        """Return the optimiser's state by the parameters' names."""
        return named_state(self.model, self._optimiser)

    def load_optimiser_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        load_named_state(self.model, self._optimiser, state)
