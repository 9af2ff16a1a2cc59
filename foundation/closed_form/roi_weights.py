"""The weights of a subject's voxels in the targets of Stage 1, from its training trials alone."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.preprocess import Samples, training_reliability
from data.splits import Split
from data.store import SubjectStore
from foundation.config import RoiTarget
from foundation.roi_targets import voxel_weights


def weights_of_subject(
    target: RoiTarget,
    parcel: Int64[Tensor, " voxel"],
    subject: SubjectStore,
    split: Split,
    train: Samples,
    *,
    n_sessions: int | None = None,
) -> Float[Tensor, " voxel"]:
    """Return `voxel_weights` from a subject's training trials in its first `n_sessions`; ``top-p``'s are the mean's."""
    reliability = None
    if target == "reliability-weighted":
        found, _ = training_reliability(subject, split, n_sessions=n_sessions)
        reliability = None if found is None else torch.from_numpy(found)
    linear = "mean" if target == "top-p" else target
    return voxel_weights(linear, parcel, responses=torch.from_numpy(train.responses), reliability=reliability)
