"""What the streams' blocks may be made of in place of Mamba-2: the paper's other single-stream rows.

A mixer takes normed tokens (b, l, width) and returns a residual branch of the same shape, its last projection called
``out_proj``. At one width all have numbers of parameters within a factor of 2 of Mamba-2's, about 6 width^2.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.config import MambaConfig, Mixer
from foundation.model.mamba import Mamba2


class Attention(nn.Module):
    """A transformer's block: multi-head self-attention, unmasked, then a feed-forward of twice the width (8 width^2).

    The feed-forward sees the tokens with what attention adds to them; both are returned as one branch.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, tokens: Float[Tensor, "b l width"]) -> Float[Tensor, "b l width"]:
        """Mix along the sequence, in whatever order it is."""
        query, key, value = (
            x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in self.in_proj(tokens).chunk(3, dim=-1)
        )
        attended = self.attended(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return attended + self.out_proj(F.gelu(self.hidden(self.norm(tokens + attended))))


class Recurrent(nn.Module):
    """A gated recurrent unit over the sequence, and a projection (7 width^2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Float[Tensor, "b l width"]) -> Float[Tensor, "b l width"]:
        """Mix each token with those before it."""
        return self.out_proj(self.gru(tokens)[0])


class Perceptron(nn.Module):
    """A two-layer perceptron on each token beside the mean of all, which is all it knows of others (6 width^2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(2 * width, 2 * width)
        self.out_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, tokens: Float[Tensor, "b l width"]) -> Float[Tensor, "b l width"]:
        """Mix each token with the mean."""
        mean = tokens.mean(1, keepdim=True).expand_as(tokens)
        return self.out_proj(F.gelu(self.in_proj(torch.cat([tokens, mean], dim=-1))))


def make_mixer(kind: Mixer, width: int, config: MambaConfig) -> Mamba2 | Attention | Recurrent | Perceptron:
    """Return a fresh mixer; `config` is Mamba's, whose ``headdim`` is the width of an attention head too."""
    match kind:
        case "mamba":
            return Mamba2(width, config)
        case "transformer":
            return Attention(width, width // config.headdim)
        case "gru":
            return Recurrent(width)
        case "mlp":
            return Perceptron(width)
