"""The closed-form start of an adapter: every readout a ridge on the frozen backbone's features.

Stage 1 first (each ROI from either stream), then the voxels given what Stage 2 makes of those ROIs. A unit's population
receptive field is the one of a grid of candidates under which ridge predicts it best. An ROI's token
takes the embedding of the training subjects' ROI whose tuning is most alike: readouts live in one shared feature space,
so that is a comparison of functions, not of places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.model_selection import KFold
from torch import Tensor
from torch.nn import functional as F

from foundation.closed_form.kernel_ridge import Candidate, gcv
from foundation.config import LossConfig
from foundation.losses import roi_target
from foundation.model.adapter import Adapter, RoiValues
from foundation.model.dual_stream import Streams
from foundation.model.encoding_model import EncodingModel, VoxelFeatures
from foundation.model.spatial import COARSE_PYRAMID, field_pyramid, make_field

ALPHAS = np.logspace(0, 6, 9)
N_FOLDS = 5
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Weights of a ridge with a penalty of its own for each target, and how well it predicts what it hasn't seen."""

    weights: Float[np.ndarray, "feature target"]
    score: Float[np.ndarray, " target"]


def solve(
    features: Float[np.ndarray, "image feature"],
    targets: Float[np.ndarray, "image target"],
    *,
    constant: Float[np.ndarray, " image"],
) -> Solved:
    """Return ``targets ~ features @ weights[:-1] + constant * weights[-1]``, the last unpenalised.

    `score` is minus the least generalised cross-validation error of `ALPHAS` (`foundation.closed_form.kernel_ridge`).
    """
    scale = features.std(0, dtype=np.float64)
    scale[scale < 1e-6] = np.inf
    x, y, c = features / scale, targets.astype(np.float64), constant.astype(np.float64)
    along = c / (c @ c)
    free_x, free_y = x - np.outer(c, along @ x), y - np.outer(c, along @ y)  # what the constant leaves of both
    left, sizes, axes = np.linalg.svd(free_x, full_matrices=False)
    spectrum = Candidate(np.square(sizes), left, left[:0])
    projected = left.T @ free_y
    errors = gcv(spectrum, projected, np.square(free_y).sum(0), alphas=ALPHAS)
    best = errors.argmin(0)
    weights = axes.T @ (sizes[:, None] * projected / (np.square(sizes)[:, None] + ALPHAS[best]))
    last = along @ (y - x @ weights)
    return Solved(weights=np.vstack([weights / scale[:, None], last]), score=-errors.min(0))


def _best_field(
    seen: Sequence[Float[np.ndarray, "image feature"]],
    targets: Float[np.ndarray, "image target"],
    *,
    constant: Float[np.ndarray, " image"],
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each target, the index of the best of the features in `seen`, and its weights (feature, target)."""
    best = np.full(targets.shape[1], -np.inf)
    choice = np.zeros(targets.shape[1], np.int64)
    weights = np.zeros((seen[0].shape[1] + 1, targets.shape[1]))
    for k, features in enumerate(seen):
        solved = solve(features, targets, constant=constant)
        better = solved.score > best
        best[better], choice[better], weights[:, better] = solved.score[better], k, solved.weights[:, better]
    return choice, weights


@torch.no_grad()
def ridge_start(
    model: EncodingModel,
    subject: str,
    streams: Streams,
    responses: Float[Tensor, "image voxel"],
    *,
    loss: LossConfig = LossConfig(),
    seed: int,
) -> None:
    """Set `subject`'s adapter from its training images alone: the streams' outputs to them and its mean responses.

    ROIs learn the targets that `loss` names. The voxels are solved on ROI values that are predicted out of fold: those
    of the images that the ROI readouts were fitted on are better than any to come, and voxels fitted on them would
    trust them too much.
    """
    adapter = model.adapter(subject)
    candidates = field_pyramid(COARSE_PYRAMID)
    field = make_field(model.config.readout, len(candidates), model.streams.side)
    field.choose(candidates, torch.arange(len(candidates)))
    weighting = field()  # as the adapter will see through them
    if model.config.readout == "mean":
        weighting = weighting[:1]  # all are the same

    targets = roi_target(adapter, responses, loss).numpy()
    everyone = np.arange(len(targets))
    where = list(torch.einsum("gp,bpw->gbw", weighting, streams.patch).numpy())
    what, choice, weights = _roi_readouts(streams, where, targets, everyone)
    _set_rois(adapter, what, weights)
    _lend_embeddings(model, subject)
    adapter.place_fields(candidates, voxel=None, roi=torch.from_numpy(choice))
    if "holistic" not in model.config.decoders:
        return
    roi = _out_of_fold(adapter, streams, where, targets, seed=seed)

    features = _voxel_features(model, streams, subject, roi)
    left = (responses - features.offset).numpy()
    shared = (features.gain * features.components).numpy()
    local = torch.einsum("gp,bpc->gbc", weighting, features.local) * features.gain
    seen = [np.hstack([shared, through.numpy()]) for through in local]
    voxel_choice, weights = _best_field(seen, left, constant=features.gain[:, 0].numpy())
    n_component = shared.shape[1]
    _set(adapter.voxel_component, weights[:n_component].T)
    if "patch" in model.config.read_at:
        _set(adapter.voxel_local, weights[n_component:-1].T)
    _set(adapter.voxel_bias, weights[-1])
    if "residual" in model.config.decoders:
        _set(adapter.voxel_residual, np.zeros(adapter.voxel_residual.shape))
    adapter.place_fields(candidates, voxel=torch.from_numpy(voxel_choice), roi=None)


def _voxel_features(model: EncodingModel, streams: Streams, subject: str, roi: RoiValues) -> VoxelFeatures:
    """Return what the voxels are read from, computed for some images at a time."""
    parts = [
        vars(model.voxel_features(streams[rows], subject, roi[rows]))
        for rows in (slice(at, at + _BATCH) for at in range(0, len(streams), _BATCH))
    ]
    return VoxelFeatures(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _roi_readouts(
    streams: Streams, where: Sequence[np.ndarray], targets: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ROIs' readouts of the CLS stream, their fields, and their readouts of the patch stream."""
    ones = np.ones(len(rows))
    what = solve(streams.cls.numpy()[rows], targets[rows], constant=ones).weights
    choice, weights = _best_field([seen[rows] for seen in where], targets[rows], constant=ones)
    return what, choice, weights


def _set_rois(adapter: Adapter, what: np.ndarray, weights: np.ndarray) -> None:
    if "cls" in adapter.config.read_at:
        _set(adapter.roi_cls, what[:-1].T)
    if "patch" in adapter.config.read_at:
        _set(adapter.roi_patch, weights[:-1].T)
    _set(adapter.roi_bias, np.stack([what[-1], weights[-1]]))


def _out_of_fold(
    adapter: Adapter, streams: Streams, where: Sequence[np.ndarray], targets: np.ndarray, *, seed: int
) -> RoiValues:
    """Return each image's ROI values from readouts that were fitted without it, their fields chosen without it."""
    within = adapter.roi_values(streams)
    what, patch = np.empty_like(targets), np.empty_like(targets)
    for fit, held in KFold(min(N_FOLDS, len(targets)), shuffle=True, random_state=seed).split(targets):
        from_cls, choice, from_patch = _roi_readouts(streams, where, targets, fit)
        what[held] = streams.cls.numpy()[held] @ from_cls[:-1] + from_cls[-1]
        for field in np.unique(choice):
            units = choice == field
            patch[np.ix_(held, units)] = where[field][held] @ from_patch[:-1, units] + from_patch[-1, units]
    dtype = within.cls.dtype
    return RoiValues(
        cls=torch.as_tensor(what, dtype=dtype), patch=torch.as_tensor(patch, dtype=dtype), share=within.share
    )


def _lend_embeddings(model: EncodingModel, subject: str) -> None:
    """Give each ROI of `subject` the embedding of the most similarly tuned ROI of the subjects before it."""
    others = [model.adapter(name) for name in model.subjects if name != subject]
    if not others:
        return
    mine = model.adapter(subject)

    def tuning(adapter: Adapter) -> Tensor:
        readouts = [getattr(adapter, f"roi_{stream}") for stream in adapter.config.read_at]
        return F.normalize(torch.cat(readouts, dim=1), dim=1)

    nearest = (tuning(mine) @ torch.cat([tuning(a) for a in others]).T).argmax(1)
    mine.roi_embedding.copy_(torch.cat([a.roi_embedding for a in others])[nearest])


def _set(parameter: Tensor, values: np.ndarray | Tensor) -> None:
    parameter.copy_(torch.as_tensor(np.asarray(values), dtype=parameter.dtype))
