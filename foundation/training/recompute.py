"""Activation checkpointing: the blocks' activations are computed again in the backward pass instead of being kept.

Chen et al. 2016, Training deep nets with sublinear memory cost.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from foundation.model.mamba import Mamba2


def recompute_blocks(model: nn.Module, *, early_stop: bool = True) -> None:
    """Let every Mamba block of `model` keep its input only; numbers and the names of parameters stay as they are.

    Parameters
    ----------
    early_stop : stop a block once all that its gradient needs is there, in the middle of its last product; False where
        somebody's hooks must see the end of every module that begins.
    """
    for module in model.modules():
        if isinstance(module, Mamba2):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, early_stop=early_stop)
