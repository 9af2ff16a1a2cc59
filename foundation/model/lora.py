"""Low-rank updates of a frozen backbone that belong to one subject (LoRA, Hu et al. 2021).

For each projection of the streams' blocks, ``W' = W + up @ down`` with ``down`` of shape (rank, in) and ``up`` of shape
(out, rank), zero at first.
"""

import torch
from torch import Tensor, nn

TARGETS = ("in_proj.weight", "out_proj.weight")


class LowRankUpdate(nn.Module):
    """The updates of all of `module`'s projections."""

    def __init__(self, module: nn.Module, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"a low-rank update has rank 1 at least, got {rank}")
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in module.named_parameters():
            if name.endswith(TARGETS):
                key = name.replace(".", "-")
                self.down[key] = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
                self.up[key] = nn.Parameter(torch.zeros(weight.shape[0], rank))

    @property
    def rank(self) -> int:
        """Rank of every update."""
        return len(next(iter(self.down.values())))

    def updated(self, module: nn.Module) -> dict[str, Tensor]:
        """Return `module`'s updated weights by name, for `torch.func.functional_call`."""
        weights = dict(module.named_parameters())
        names = {key: key.replace("-", ".") for key in self.down}
        return {name: weights[name] + self.up[key] @ self.down[key] for key, name in names.items()}
