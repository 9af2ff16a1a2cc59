"""The population path: a voxel as a linear map of what the backbone predicts for voxels of its own subjects.

    y_v = w_v' B' (p - m),    p = predictions for the landmarks, voxels of the subjects that the backbone learned from

With `w_v` solved by kernel ridge on `p`, a voxel's tuning is a Gaussian process whose covariance is that of the
landmarks' tunings: the population is the prior. Nothing here is trained by gradient;
`foundation.closed_form.population_start` solves it.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class PopulationPath(nn.Module):
    """One subject's population path; it gives zeros until it is solved.

    Parameters
    ----------
    n_voxel, n_landmark, rank : sizes.
    """

    landmark: Tensor
    mean: Tensor
    basis: Tensor
    weight: Tensor

    def __init__(self, n_voxel: int, n_landmark: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("landmark", torch.zeros(n_landmark, 2, dtype=torch.long))
        self.register_buffer("mean", torch.zeros(n_landmark))
        self.register_buffer("basis", torch.zeros(n_landmark, rank))
        self.register_buffer("weight", torch.zeros(n_voxel, rank))

    def of_subject(self, number: int) -> Int64[Tensor, " landmark"]:
        """Return the voxels that are landmarks of the backbone's subject `number`, in their order."""
        return self.landmark[self.landmark[:, 0] == number, 1]

    def forward(self, predicted: Float[Tensor, "b landmark"]) -> Float[Tensor, "b voxel"]:
        """Predict the voxels from the landmarks' predicted responses; the average image gives zeros."""
        return (predicted - self.mean) @ self.basis @ self.weight.T
