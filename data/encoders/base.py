"""What a frozen image encoder is: images in, CLS and patch tokens of several depths out."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of a batch of images; patches are row-major over the encoder's grid, depths shallow to deep."""

    cls: Float[np.ndarray, "image depth width"]
    patch: Float[np.ndarray, "image depth patch width"]


@runtime_checkable
class Encoder(Protocol):
    """A frozen encoder."""

    @property
    def name(self) -> str:
        """What its tokens are called in a store."""
        ...

    @property
    def depths(self) -> tuple[int, ...]:
        """The blocks that the tokens come from, 1-based, shallow to deep."""
        ...

    @property
    def width(self) -> int:
        """Number of features of a token."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        ...

    def spec(self) -> dict[str, Any]:
        """Return the full description as JSON; its digest identifies the encoder."""
        ...

    def encode(self, images: UInt8[np.ndarray, "image height width 3"]) -> Tokens:
        """Return the tokens of `images`."""
        ...
