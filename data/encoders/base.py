"""What a frozen image encoder is: images in, CLS and patch tokens of several depths out."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of a batch of images; patches are row-major over the encoder's grid, depths shallow to deep."""

    cls: Float[np.ndarray, "image depth width"]
    patch: Float[np.ndarray, "image depth patch width"]


class Encoder(Protocol):
    """A frozen encoder."""

    name: str
    depths: tuple[int, ...]
    width: int
    grid: tuple[int, int]

    def spec(self) -> dict[str, Any]:
        """Return the full description as JSON; its digest identifies the encoder."""
        ...

    def encode(self, images: UInt8[np.ndarray, "image height width 3"]) -> Tokens:
        """Return the tokens of `images`."""
        ...
