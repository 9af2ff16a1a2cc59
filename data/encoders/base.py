"""What a frozen image encoder is: images in, CLS and patch tokens of several depths out."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of a batch of images; patches are row-major over the encoder's grid, depths shallow to deep.

    The token of the whole image is `cls`, or `pooled` from a model without a CLS token that pools by a head of its own.
    """

    patch: Float[np.ndarray, "image depth patch width"]
    cls: Float[np.ndarray, "image depth width"] | None = None
    pooled: Float[np.ndarray, "image depth width"] | None = None
    register: Float[np.ndarray, "image depth register width"] | None = None

    def named(self) -> dict[str, np.ndarray]:
        """Return the arrays that are there, by name."""
        return {name: values for name, values in vars(self).items() if values is not None}


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

    def provenance(self) -> dict[str, Any]:
        """Return where it came from and what it runs on, as JSON: worth recording, but no part of its identity."""
        ...

    def encode(self, images: UInt8[np.ndarray, "image height width 3"]) -> Tokens:
        """Return the tokens of `images`."""
        ...
