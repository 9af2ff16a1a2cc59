"""What Stage 1 learns to predict of an ROI: four ways to make one number of its voxels' responses.

``mean``, ``reliability-weighted`` and ``low-rank`` are linear: one weight per voxel, fitted on training responses and
then fixed, so that the target of ROI ``k`` is ``t_k = sum_(v in k) w_v y_v``. A target of repeat means is then the mean
of the single trials' targets. ``top-p`` is the paper's, for comparison with it, and selects anew in every row:

    t_k = mean of the highest p n_k of the n_k values y_v

which noise biases upward. Pure noise of standard deviation ``s``, independent between the voxels of a large ROI, gives
``s phi(Phi^-1(1 - p)) / p``, that is 0.50 s for p = 0.7; the bias shrinks with the repeats averaged before.

Legend: `b` rows (trials or repeat means), `voxel` one subject's, `roi` its ROIs.
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foundation.config import RoiTarget

TOP_P = 0.7
EXPLAINED = 0.5
"""Half: on noisy trials, the axes beyond it hold mostly noise, and with 0.8 the target is the plain mean again."""
_LOG = logging.getLogger(__name__)


def voxel_weights(
    target: RoiTarget,
    parcel: Int64[Tensor, " voxel"],
    *,
    responses: Float[Tensor, "b voxel"] | None = None,
    reliability: Float[Tensor, " voxel"] | None = None,
) -> Float[Tensor, " voxel"]:
    """Return the weights of a linear target, fitted on what is given of the training trials.

    Parameters
    ----------
    target
        A linear choice; ``top-p`` has no weights (:func:`top_p_targets`).
    parcel
        ROI of each voxel, 0 to n_roi - 1.
    responses
        Standardised training responses, for ``low-rank``.
    reliability
        From training repeats, for ``reliability-weighted`` (:func:`data.preprocess.training_reliability`, which tells
        why there is none). None: the weights are equal, and the log says so.

    Raises
    ------
    ValueError
        If the target isn't linear, or ``low-rank`` has no responses to be fitted on.
    """
    if target == "mean":
        return mean_weights(parcel)
    if target == "reliability-weighted":
        if reliability is None:
            _LOG.warning(
                "no reliability of training repeats is known: the voxels of an ROI weigh the same in its target"
            )
            return mean_weights(parcel)
        return reliability_weights(parcel, reliability)
    if target == "low-rank":
        if responses is None:
            raise ValueError("low-rank targets are fitted on training responses; give them")
        return low_rank_weights(parcel, responses)
    raise ValueError(f"targets {target!r} aren't a weighting of voxels; call top_p_targets on the responses themselves")


def roi_targets(
    responses: Float[Tensor, "b voxel"],
    parcel: Int64[Tensor, " voxel"],
    weights: Float[Tensor, " voxel"],
    *,
    n_roi: int,
) -> Float[Tensor, "b roi"]:
    """Return the linear targets ``sum_(v in k) w_v y_v``, in the responses' unit."""
    return responses.new_zeros(len(responses), n_roi).index_add(1, parcel, responses * weights)


def top_p_targets(
    responses: Float[Tensor, "b voxel"], parcel: Int64[Tensor, " voxel"], *, n_roi: int, p: float = TOP_P
) -> Float[Tensor, "b roi"]:
    """Return, per row, the mean of the highest ``p`` of each ROI's values: ``p n_k`` of them, rounded, at least one."""
    if not 0 < p <= 1:
        raise ValueError(f"top-p keeps a share p of the values, above 0 and up to 1; got {p}")
    size = torch.bincount(parcel, minlength=n_roi)
    kept = (p * size).round().long().clamp(min=1)
    # By value, then stably by ROI: an ROI's values stand together, the highest first, in the same places of every row.
    by_value = responses.argsort(dim=1, descending=True)
    order = by_value.gather(1, parcel[by_value].argsort(dim=1, stable=True))
    roi = parcel.sort().values
    rank = torch.arange(len(parcel), device=parcel.device) - (size.cumsum(0) - size)[roi]
    weights = (rank < kept[roi]) / kept[roi]
    return roi_targets(responses.gather(1, order), roi, weights.to(responses.dtype), n_roi=n_roi)


def mean_weights(parcel: Int64[Tensor, " voxel"]) -> Float[Tensor, " voxel"]:
    """Return ``1 / n_k``: every voxel of an ROI counts the same."""
    return 1 / torch.bincount(parcel)[parcel].float()


def reliability_weights(
    parcel: Int64[Tensor, " voxel"], reliability: Float[Tensor, " voxel"]
) -> Float[Tensor, " voxel"]:
    """Return weights in proportion to ``reliability``, of sum 1 in each ROI.

    Parameters
    ----------
    reliability
        Share of a trial's variance that is signal, estimated from training trials alone. What is negative or NaN, such
        as a constant voxel, counts as 0; an ROI without any reliable voxel has equal weights.
    """
    reliable = reliability.double().nan_to_num(nan=0).clamp(min=0)
    total = torch.zeros(int(parcel.max()) + 1, dtype=torch.float64).index_add(0, parcel, reliable)[parcel]
    return torch.where(total > 0, reliable / total, mean_weights(parcel)).float()


def low_rank_weights(
    parcel: Int64[Tensor, " voxel"],
    responses: Float[Tensor, "b voxel"],
    *,
    explained: float = EXPLAINED,
    rank: int | None = None,
) -> Float[Tensor, " voxel"]:
    """Return the weights of the mean of an ROI's denoised responses.

    With the leading principal axes ``V_r`` ("voxel axis") of an ROI's training responses, the mean over the voxels of
    ``y V_r V_r'`` is ``y w`` with ``w = V_r V_r' 1 / n_k``. The axes are those of ``Y' Y``, about zero, since responses
    are standardised; so the target has no offset.

    Parameters
    ----------
    responses
        Training responses, ``Y``.
    explained
        Share of the ROI's mean square that the axes have to reach together; decides the rank where none is given.
    rank
        Axes kept in every ROI, at most its number of voxels.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"low-rank targets keep at least one axis, got rank {rank}")
    weights = torch.empty(len(parcel))
    for k in range(int(parcel.max()) + 1):
        voxels = (parcel == k).nonzero()[:, 0]
        y = responses[:, voxels].double()
        power, axes = torch.linalg.eigh(y.T @ y)  # ascending
        share = power.flip(0).cumsum(0) / power.sum()
        kept = int((share < explained).sum()) + 1 if rank is None else rank
        leading = axes[:, -kept:]
        weights[voxels] = (leading @ leading.mean(0)).float()
    return weights
