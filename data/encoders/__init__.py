"""Frozen image encoders: ``gabor`` (built in, no weights) and any vision transformer that `transformers` loads."""

from data.encoders.base import Encoder, Tokens

__all__ = ["Encoder", "Tokens"]
