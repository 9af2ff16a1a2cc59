"""Tokens as features, read batch by batch: a data set's tokens may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int

from data.store import TokenReader

BATCH = 128
COARSE = 4
"""Cells a side of the coarse grid that ridge sees; a smaller grid is seen as it is."""


def grid_side(tokens: TokenReader) -> int:
    """Return how many patches a side the grid of `tokens` has.

    Raises
    ------
    ValueError
        If the grid isn't square.
    """
    n_patches = tokens.shape[1]
    side = round(n_patches**0.5)
    if side**2 != n_patches:
        raise ValueError(
            f"{tokens.name!r} has {n_patches} patches, which is no square grid; the baselines pool square grids only: "
            f"compute tokens of square images"
        )
    return side


def cells(side: int, n_cells: int) -> Float32[np.ndarray, "cell patch"]:
    """Return the averages of a `side` x `side` grid in `n_cells` x `n_cells` cells, in raster order.

    Where `n_cells` doesn't divide the grid, cells overlap by a patch, as in adaptive average pooling.
    """
    return np.kron(_line_cells(side, n_cells), _line_cells(side, n_cells)).astype(np.float32)


def global_tokens(tokens: TokenReader, rows: Int[np.ndarray, " image"]) -> Float32[np.ndarray, "image depth width"]:
    """Return the token of the whole image at each depth."""
    depth, _, width = tokens.shape
    out = np.empty((len(rows), depth, width), np.float32)
    for start in range(0, len(rows), BATCH):
        out[start : start + BATCH] = tokens.read(rows[start : start + BATCH])[0]
    return out


def patches_under(
    tokens: TokenReader,
    rows: Int[np.ndarray, " image"],
    fields: Float32[np.ndarray, "field patch"],
    *,
    depths: Sequence[int] | None = None,
) -> Float32[np.ndarray, "field image depth width"]:
    """Return the patches' averages under each of `fields`, at all depths or at those numbered in `depths`."""
    depth, _, width = tokens.shape
    wanted = list(range(depth) if depths is None else depths)
    out = torch.empty((len(fields), len(rows), len(wanted), width))
    weights = torch.from_numpy(fields)
    for start in range(0, len(rows), BATCH):
        patches = torch.from_numpy(tokens.read(rows[start : start + BATCH])[1])[:, wanted].float()
        out[:, start : start + BATCH] = (weights @ patches).permute(2, 0, 1, 3)
    return out.numpy()


def ridge_features(tokens: TokenReader, rows: Int[np.ndarray, " image"]) -> Float32[np.ndarray, "image feature"]:
    """Return what ridge sees: the global tokens of all depths, then the patches of all depths on a coarse grid."""
    side = grid_side(tokens)
    pooled = patches_under(tokens, rows, cells(side, min(COARSE, side)))
    whole = global_tokens(tokens, rows)
    return np.concatenate([whole.reshape(len(rows), -1), pooled.transpose(1, 2, 0, 3).reshape(len(rows), -1)], axis=1)


def _line_cells(n_patches: int, n_cells: int) -> np.ndarray:
    """Averages a line of patches in cells: "cell patch"."""
    matrix = np.zeros((n_cells, n_patches))
    for cell in range(n_cells):
        inside = slice(cell * n_patches // n_cells, -(-(cell + 1) * n_patches // n_cells))
        matrix[cell, inside] = 1 / (inside.stop - inside.start)
    return matrix
