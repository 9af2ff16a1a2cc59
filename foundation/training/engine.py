"""What the training loop asks of whoever computes: `Engine`; and `LocalEngine`, one process and plain torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foundation.config import OptimConfig
from foundation.losses import Stage
from foundation.model.encoding_model import EncodingModel
from foundation.training.optim import build_optimiser, set_rates


@runtime_checkable  # so that tests can check annotations with it
class Engine(Protocol):
    """A model under an optimiser, on one process or on many that move in step."""

    rank: int
    world: int
    device: torch.device
    model: EncodingModel

    @property
    def wrapped(self) -> nn.Module:
        """The module to call in training."""
        ...

    def step(self, loss: Tensor, *, lr: float, stage: Stage | None = None) -> float:
        """Back-propagate the loss (a mean over this rank's rows), update, and return the gradient's norm over ranks.

        With a `stage`, only its parameters move.
        """
        ...

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the means over ranks."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether any rank says so."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def save_optimiser(self, directory: Path) -> None:
        """Write the optimiser's state (all ranks call it)."""
        ...

    def load_optimiser(self, directory: Path) -> None:
        """Read what `save_optimiser` wrote.

        Raises
        ------
        ValueError
            If another kind of engine, or another number of workers, wrote it in a form that can't be read here.
        """
        ...


def save_optimiser_state(optimiser: torch.optim.Optimizer, directory: Path) -> None:
    """Write an optimiser's tensors as safetensors and the rest as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    state = optimiser.state_dict()
    tensors = {f"{i}.{key}": t.contiguous() for i, entry in state["state"].items() for key, t in entry.items()}
    save_file(tensors, directory / "optimiser.safetensors")
    groups = [{"n_params": len(group["params"])} for group in state["param_groups"]]
    (directory / "optimiser.json").write_text(json.dumps({"kind": "torch", "groups": groups}))


def load_optimiser_state(optimiser: torch.optim.Optimizer, directory: Path) -> None:
    """Read what `save_optimiser_state` wrote into an optimiser over the same parameters."""
    path = directory / "optimiser.json"
    try:
        described = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the optimiser's state {path} can't be read ({error}); remove {directory.parent} to "
            "resume from the one before"
        ) from error
    if described["kind"] != "torch":
        raise ValueError(
            f"{directory} holds DeepSpeed shards; resume with the --cluster settings that wrote it, or start a new run"
        )
    state = optimiser.state_dict()
    groups = [group["n_params"] for group in described["groups"]]
    if groups != [len(group["params"]) for group in state["param_groups"]]:
        raise ValueError(f"{directory} is of an optimiser over other parameters ({groups} per group)")
    entries: dict[int, dict[str, Tensor]] = {}
    try:
        tensors = load_file(directory / "optimiser.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the optimiser's state in {directory} can't be read ({error}); remove {directory.parent} to "
            "resume from the one before"
        ) from error
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": entries, "param_groups": state["param_groups"]})


class LocalEngine:
    """One process."""

    rank = 0
    world = 1

    def __init__(self, model: EncodingModel, config: OptimConfig, *, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self._clip = config.clip
        self._optimiser = build_optimiser(model, config)

    @property
    def wrapped(self) -> nn.Module:
        """The module to call in training."""
        return self.model

    def step(self, loss: Tensor, *, lr: float, stage: Stage | None = None) -> float:
        """Back-propagate, clip, update; return the gradient's norm before clipping."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        set_rates(self._optimiser.param_groups, lr, stage)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the values."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def barrier(self) -> None:
        """Return at once."""

    def save_optimiser(self, directory: Path) -> None:
        """Write the optimiser's state."""
        save_optimiser_state(self._optimiser, directory)

    def load_optimiser(self, directory: Path) -> None:
        """Read what `save_optimiser` wrote."""
        load_optimiser_state(self._optimiser, directory)
