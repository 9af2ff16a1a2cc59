"""A transformer whose ROI queries attend to the patch tokens (after Adeli, Minni & Kriegeskorte 2023).

Each ROI `k` has a learned query. Over the places `p` of all encoder depths, in each head `h`,

    a_khp = softmax_p(q_kh . K_h (x_p + e_p)),   c_k = norm(sum_hp a_khp V_h (x_p + e_p)),   y_v = w_v . c_roi(v) + b_v,

where `x_p` is the standardised patch token, projected by its depth, and `e_p` the learned embedding of its place and
depth. One layer, as in the original; the readout of a voxel is linear in the output of its own ROI.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from data.parcels import make_parcels, parse_parcels
from data.preprocess import Samples
from data.store import SubjectStore, TokenReader
from foundation.closed_form.token_features import cells, grid_side
from foundation.evaluation.baselines.ridge import image_folds

LABELS = ("prf-visualrois", "streams")
PARCELS = "auto:30"
GRID = 8
"""Cells a side to which a finer grid of patches is averaged."""
_READ = 128


@dataclass(frozen=True, kw_only=True)
class RoiTransformerSettings:
    """Sizes and training, chosen on validation images."""

    width: int = 64
    n_heads: int = 4
    rates: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates, of which the one with the least held-out error is taken."""
    decays: tuple[float, ...] = (0.1, 1.0)
    """Weight decays, chosen likewise."""
    dropout: float = 0.3
    batch: int = 32
    epochs: int = 40
    """Epochs at most."""
    patience: int = 4
    """Epochs without a lower held-out error after which training stops."""


def rois_of(subject: SubjectStore) -> Int64[np.ndarray, " voxel"]:
    """Return the ROI of each voxel, numbered from 0.

    The labels of `prf-visualrois` come first, `streams` speaks for the voxels that they leave open, and what neither
    names is one more ROI. A subject without either has parcels of about 30 voxels.
    """
    named = [subject.rois[family].labels.astype(np.int64) for family in LABELS if family in subject.rois]
    if not named:
        return make_parcels(parse_parcels(PARCELS), subject.voxels).labels
    roi = np.zeros(subject.n_voxels, np.int64)
    for i, labels in enumerate(named):
        free = (roi == 0) & (labels > 0)
        roi[free] = labels[free] * len(named) + i
    return np.unique(roi, return_inverse=True)[1].astype(np.int64)


class RoiTransformer(nn.Module):
    """The network; `roi` has the ROI of each voxel, 0 to n - 1."""

    order: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        roi: Int64[np.ndarray, " voxel"],
        settings: RoiTransformerSettings,
    ) -> None:
        super().__init__()
        depth, place, token_width = shape
        width, self.n_heads = settings.width, settings.n_heads
        sizes = np.bincount(roi)
        self.project = nn.Parameter(torch.randn(depth, token_width, width) / token_width**0.5)
        # As large as the tokens: queries that start near zero look everywhere alike, and hardly learn where to look.
        self.embedding = nn.Parameter(0.5 * torch.randn(depth, place, width))
        self.query = nn.Parameter(torch.randn(len(sizes), width))
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(settings.dropout)
        self.readout = nn.ParameterList(torch.randn(n, width) / width for n in sizes.tolist())
        self.bias = nn.Parameter(torch.zeros(len(roi)))
        self.register_buffer("order", torch.from_numpy(np.argsort(np.argsort(roi, kind="stable"))))

    def forward(self, patch: Float[Tensor, "b depth place token"]) -> Float[Tensor, "b voxel"]:
        """Return each voxel's response to standardised patch tokens."""
        tokens = (torch.einsum("bdpt,dtw->bdpw", patch, self.project) + self.embedding).flatten(1, 2)
        query, key, value = (
            x.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)
            for x in (self.query.expand(len(patch), -1, -1), self.key(tokens), self.value(tokens))
        )
        context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        context = self.dropout(self.norm(context))
        voxels = [context[:, k] @ weight.T for k, weight in enumerate(self.readout)]
        return torch.cat(voxels, dim=1)[:, self.order] + self.bias


def roi_transformer(
    tokens: TokenReader,
    train: Samples,
    rows: Int[np.ndarray, " new"],
    *,
    roi: Int64[np.ndarray, " voxel"],
    seed: int,
    settings: RoiTransformerSettings = RoiTransformerSettings(),
) -> Float32[np.ndarray, "new voxel"]:
    """Train on nine tenths of the training images, and predict the images `rows`.

    The remaining tenth chooses the learning rate, the weight decay and when to stop, so that nothing else of the
    subject is seen. The tokens of all images are held once, in half precision.
    """
    held = image_folds(train.image, n_folds=min(10, len(train)), seed=seed) == 0
    parts = [_pooled(tokens, images) for images in (train.image[~held], train.image[held], rows)]
    mean, scale = _mean_and_sd(parts[0])
    for patch in parts:
        _standardise(patch, mean, scale)
    fit, check, new = map(torch.from_numpy, parts)
    level = train.responses[~held].mean(0)
    wanted, wanted_check = (torch.from_numpy(train.responses[which] - level) for which in (~held, held))
    best: tuple[float, Tensor | None] = (np.inf, None)
    for rate, decay in product(settings.rates, settings.decays):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = RoiTransformer((fit.shape[1], fit.shape[2], fit.shape[3]), roi, settings)
            error = _train(model, fit, wanted, check, wanted_check, rate=rate, decay=decay, settings=settings)
        if error < best[0]:
            best = error, _predicted(model, new)
    assert best[1] is not None
    return best[1].numpy() + level


def _pooled(tokens: TokenReader, rows: np.ndarray) -> Float16[np.ndarray, "image depth place token"]:
    """Return the patches of `rows`, averaged to a grid of `GRID` cells a side at most."""
    side = grid_side(tokens)
    depth, _, width = tokens.shape
    n_cells = min(GRID, side)
    out = np.empty((len(rows), depth, n_cells**2, width), np.float16)
    weights = cells(side, n_cells)
    for start in range(0, len(rows), _READ):
        patches = tokens.read(rows[start : start + _READ])[1]
        out[start : start + _READ] = patches if n_cells == side else weights @ patches.astype(np.float32)
    return out


def _mean_and_sd(
    patch: Float16[np.ndarray, "image depth place token"],
) -> tuple[Float32[np.ndarray, "1 depth 1 token"], Float32[np.ndarray, "1 depth 1 token"]]:
    """Return mean and SD (1e-3 at least) over images and places, of `_READ` images at a time."""
    blocks = [patch[start : start + _READ] for start in range(0, len(patch), _READ)]
    n = patch.shape[0] * patch.shape[2]
    mean = (sum(x.sum((0, 2), dtype=np.float64, keepdims=True) for x in blocks) / n).astype(np.float32)
    squares = sum(np.square(x - mean).sum((0, 2), dtype=np.float64, keepdims=True) for x in blocks)
    return mean, np.maximum(np.sqrt(squares / n), 1e-3).astype(np.float32)


def _standardise(
    patch: Float16[np.ndarray, "image depth place token"],
    mean: Float32[np.ndarray, "1 depth 1 token"],
    scale: Float32[np.ndarray, "1 depth 1 token"],
) -> None:
    """Standardise in place, `_READ` images at a time: the tokens may fill the memory, and have no room for a copy."""
    for start in range(0, len(patch), _READ):
        block = patch[start : start + _READ]
        block[:] = (block - mean) / scale


def _train(
    model: RoiTransformer,
    fit: Tensor,
    wanted: Tensor,
    check: Tensor,
    wanted_check: Tensor,
    *,
    rate: float,
    decay: float,
    settings: RoiTransformerSettings,
) -> float:
    """Train by AdamW while the held-out error falls; leave the best weights in `model` and return their error."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=rate, weight_decay=decay
    )
    least, kept, waited = np.inf, model.state_dict(), 0
    for _ in range(settings.epochs):
        model.train()
        for some in torch.randperm(len(fit)).split(settings.batch):
            loss = F.mse_loss(model(fit[some].float()), wanted[some])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        error = float(F.mse_loss(_predicted(model, check), wanted_check))
        waited += 1
        if error < least:
            least, waited = error, 0
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        if waited == settings.patience:
            break
    model.load_state_dict(kept)
    return least


def _predicted(model: RoiTransformer, patch: Tensor) -> Float[Tensor, "image voxel"]:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(some.float()) for some in patch.split(_READ)])
