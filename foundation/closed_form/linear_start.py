"""Solving a subject's closed-form path (`foundation.model.linear_path`) from training images alone.

1. **whole**: banded ridge on the CLS tokens and the coarse patches of every depth; a voxel's mixture of bands and its
   penalty are those of least generalised cross-validation error.
2. **field**: ridge on the patches seen through a Gaussian field; a voxel's field is chosen likewise, among a pyramid of
   places and sizes (St-Yves & Naselaris 2018) that is screened on the channels' principal axes first.
3. **stack**: both are added with non-negative weights per voxel, fitted on predictions that leave each image out
   (Lin et al. 2024).

Both terms are then cut to the path's ranks, so that a subject of 16,000 voxels keeps a few numbers a voxel: of the
first, the directions over voxels that carry the most variance of what is fitted; of the second, the best factors for
patches of the measured covariance. An image that is left out had a share in choosing kernel, field and penalty, which
favours the second term, whose choice is larger.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from threadpoolctl import threadpool_limits
from torch import Tensor

from data.loader import tokens_on
from data.preprocess import Samples
from data.store import TokenReader
from foundation.closed_form.kernel_ridge import (
    Best,
    Candidate,
    best_of,
    candidate_of_features,
    candidate_of_kernel,
    lowest_errors,
    mixtures,
    shortlist,
)
from foundation.closed_form.stacking import stack
from foundation.closed_form.token_features import patches_under
from foundation.model.encoding_model import EncodingModel
from foundation.model.linear_path import LinearPath
from foundation.model.spatial import CandidateFields, field_pyramid, gaussian_field

N_MIXTURES = 40
N_FIELDS = 64
"""Fields of the pyramid that are solved in full, after a screening of all of them."""
SCREENING_AXES = 128
"""Principal axes of the patches' channels that fields are screened on."""
PRIOR_SHARE = 0.8
"""Share of a channel weight's variance that lies along the axes of a population's tuning, where that is known."""
SCREENING_VOXELS = 2048
GROUP_BYTES = 2**28
_BATCH = 128
_SMALLEST_SD = 1e-6
_FEWEST_IMAGES = 3


@dataclass(frozen=True, eq=False)
class LinearStart:
    """What a solved path leaves to those who go on from it."""

    candidates: CandidateFields
    voxel_field: Int64[Tensor, " voxel"]
    """The candidate that each voxel sees through."""
    roi_field: Int64[Tensor, " roi"]
    """The candidate that predicts each ROI's mean best."""
    left_out: tuple[Float32[np.ndarray, "image voxel"], Float32[np.ndarray, "image voxel"]]
    """What either term predicts for each training image without it, at full rank."""
    mean: Float32[np.ndarray, " voxel"]
    """Mean of the training responses."""
    offset: Float32[np.ndarray, "term voxel"]
    """What either term gives for the average training image."""


@torch.no_grad()
def linear_start(model: EncodingModel, subject: str, tokens: TokenReader, train: Samples, *, seed: int) -> LinearStart:
    """Solve `subject`'s closed-form path, and place the network's fields where the path's are.

    Parameters
    ----------
    train
        Mean responses, a row per image; nothing else is looked at.

    Raises
    ------
    ValueError
        If there are fewer than three training images.
    """
    start = solve_terms(model, subject, tokens, train, seed=seed)
    share_terms(model.adapter(subject).linear, start, stack(list(start.left_out), train.responses.astype(np.float32)))
    return start


@torch.no_grad()
def solve_terms(
    model: EncodingModel,
    subject: str,
    tokens: TokenReader,
    train: Samples,
    *,
    seed: int,
    prior: Float32[np.ndarray, "channel rank"] | None = None,
) -> LinearStart:
    """Solve both terms of the path, each by itself (with a share of 1), and place the network's fields.

    Parameters
    ----------
    prior
        Of the weights of a field's channels: a root of their second moment (`foundation.closed_form.tuning`), from
        a population. None: nothing is known of them.

    Raises
    ------
    ValueError
        If there are fewer than three training images.
    """
    if len(train) < _FEWEST_IMAGES:
        raise ValueError(
            f"{subject} has {len(train)} training images; the closed-form path needs {_FEWEST_IMAGES} or more to "
            f"choose penalties from: take more sessions, or another split"
        )
    adapter = model.adapter(subject)
    responses = train.responses.astype(np.float32)
    rois = adapter.roi_means(torch.from_numpy(responses)).numpy()
    n_voxel = adapter.n_voxel
    whole = _Whole.of(model, tokens, train.image)
    by_whole = whole.solve(responses, seed=seed)
    candidates = field_pyramid()
    seen = _Seen(model, tokens, train.image, candidates, prior=prior)
    by_field, choice = seen.solve(np.hstack([responses, rois]), whole.patch_axes(SCREENING_AXES))
    voxels = slice(0, n_voxel)

    path = adapter.linear
    rank = path.weight_whole.shape[1]
    directions = leading_directions(fitted_by_kernel(by_whole, responses), rank)
    basis_whole = whole.weights(by_whole, directions, seed=seed)
    weights, mean = seen.weights(by_field.dual[:, voxels], choice[voxels])
    basis_field, weight_field = cut(weights, whole.patch_covariance(), path.weight_field.shape[1])
    for buffer, values in (
        (path.basis_whole, basis_whole),
        (path.weight_whole, directions),
        (path.basis_field, basis_field),
        (path.weight_field, weight_field),
    ):
        buffer.copy_(torch.from_numpy(values))
    offset = directions @ (whole.mean @ basis_whole), (weight_field * (mean @ basis_field)[choice[voxels]]).sum(1)
    path.bias.copy_(torch.from_numpy(by_whole.mean - offset[0] - offset[1]))

    voxel_field, roi_field = torch.from_numpy(choice).split([n_voxel, len(choice) - n_voxel])
    path.place.copy_(candidates.place[voxel_field])
    path.log_size.copy_(candidates.log_size[voxel_field])
    adapter.place_fields(candidates, voxel=voxel_field, roi=roi_field)
    return LinearStart(
        candidates=candidates,
        voxel_field=voxel_field,
        roi_field=roi_field,
        left_out=(by_whole.left_out, by_field.left_out[:, voxels]),
        mean=by_whole.mean,
        offset=np.stack(offset),
    )


@torch.no_grad()
def share_terms(path: LinearPath, start: LinearStart, shares: Float32[np.ndarray, "term voxel"]) -> None:
    """Give the terms that `solve_terms` left their shares; the average image still gives the mean response."""
    whole, field = torch.from_numpy(shares)
    path.weight_whole.mul_(whole[:, None])
    path.weight_field.mul_(field[:, None])
    path.bias.copy_(torch.from_numpy((start.mean - (shares * start.offset).sum(0)).astype(np.float32)))


def fitted_by_kernel(best: Best, responses: Float32[np.ndarray, "image voxel"]) -> Float32[np.ndarray, "image voxel"]:
    """Return what kernel ridge predicts for its own training images, less the mean; kernels decomposed in full."""
    return responses - best.mean - best.alpha * best.dual


def leading_directions(predicted: Float32[np.ndarray, "image voxel"], rank: int) -> Float32[np.ndarray, "voxel rank"]:
    """Return orthonormal directions over voxels that carry the most variance of `predicted`."""
    power, left = np.linalg.eigh(predicted.astype(np.float64) @ predicted.T)
    kept = slice(-1, -rank - 1, -1)
    directions, _ = np.linalg.qr(predicted.T @ left[:, kept] / np.sqrt(np.maximum(power[kept], 1e-12)))
    out = np.zeros((predicted.shape[1], rank), np.float32)
    out[:, : directions.shape[1]] = directions
    return out


def cut(
    weights: Float32[np.ndarray, "channel voxel"], covariance: Float32[np.ndarray, "channel channel"], rank: int
) -> tuple[Float32[np.ndarray, "channel rank"], Float32[np.ndarray, "voxel rank"]]:
    """Return factors of `weights` of `rank`: the best ones for inputs of that covariance (Eckart & Young 1936)."""
    values, axes = np.linalg.eigh(covariance.astype(np.float64))
    root = np.sqrt(np.maximum(values, max(values[-1] * 1e-7, _SMALLEST_SD**2)))
    felt = (root[:, None] * axes.T) @ weights  # in whitened coordinates
    _, left = np.linalg.eigh(felt @ felt.T)
    left = left[:, -rank:]
    basis = np.zeros((len(weights), rank), np.float32)  # channels may be fewer than the rank
    weight = np.zeros((weights.shape[1], rank), np.float32)
    basis[:, : left.shape[1]] = axes @ (left / root[:, None])
    weight[:, : left.shape[1]] = felt.T @ left
    return basis, weight


class _Whole:
    """The whole image's features of the training images, standardised, in bands."""

    def __init__(self, features: Float32[np.ndarray, "image whole"], bands: list[slice], n_channel: int) -> None:
        self.mean = features.mean(0, dtype=np.float64).astype(np.float32)
        sd = features.std(0, dtype=np.float64)
        self.scale = np.where(sd > _SMALLEST_SD, 1 / np.maximum(sd, _SMALLEST_SD), 0).astype(np.float32)
        self._features, self._bands, self._n_channel = features, bands, n_channel

    @classmethod
    def of(cls, model: EncodingModel, tokens: TokenReader, image: np.ndarray) -> "_Whole":
        device = model.streams.cls_mean.device
        parts = []
        for start in range(0, len(image), _BATCH):
            read = tokens_on(device, tokens, image[start : start + _BATCH])
            parts.append(model.linear_features(*read).whole.cpu().numpy())
        shape = model.shape
        n_channel = shape.depth * shape.width
        features = np.concatenate(parts)
        each = (features.shape[1] - n_channel) // shape.depth
        starts = [n_channel + depth * each for depth in range(shape.depth)]
        return cls(features, [slice(0, n_channel), *(slice(s, s + each) for s in starts)], shape.width)

    def _band(self, band: slice) -> np.ndarray:
        z = (self._features[:, band] - self.mean[band]) * self.scale[band]
        return z / np.float32(np.sqrt(max(1, np.count_nonzero(self.scale[band]))))

    def solve(self, responses: np.ndarray, *, seed: int) -> Best:
        kernels = []
        for band in self._bands:
            z = self._band(band)
            kernels.append(z @ z.T)
        none = np.empty((0, len(responses)), np.float32)

        def mixed() -> Iterator[Candidate]:
            for mixture in mixtures(len(kernels), n_mixtures=N_MIXTURES, seed=seed):
                yield candidate_of_kernel(np.asarray(sum(g * k for g, k in zip(mixture, kernels, strict=True))), none)

        return best_of(mixed(), responses)

    def weights(self, best: Best, directions: np.ndarray, *, seed: int) -> Float32[np.ndarray, "whole rank"]:
        """Return the weights of the unstandardised features, along `directions` over voxels."""
        mixture = mixtures(len(self._bands), n_mixtures=N_MIXTURES, seed=seed)[best.candidate]
        out = np.empty((self._features.shape[1], directions.shape[1]), np.float32)
        for number, band in enumerate(self._bands):
            z = self._band(band)
            size = np.float32(np.sqrt(max(1, np.count_nonzero(self.scale[band]))))
            out[band] = (z.T @ ((best.dual * mixture[:, number]) @ directions)) * (self.scale[band] / size)[:, None]
        return out

    def patch_axes(self, n: int) -> Float32[np.ndarray, "channel axis"]:
        """Return the leading principal axes of coarse patches, `n` or as many as there are channels."""
        _, axes = np.linalg.eigh(self.patch_covariance())
        return np.ascontiguousarray(axes[:, ::-1][:, :n])

    def patch_covariance(self) -> Float32[np.ndarray, "channel channel"]:
        """Return the covariance of coarse patches, over images and cells; channels by depth and width."""
        cells = [self._features[:, b].reshape(len(self._features), -1, self._n_channel) for b in self._bands[1:]]
        by_cell = np.concatenate(cells, axis=-1).reshape(-1, self._n_channel * len(cells))
        by_cell = by_cell - by_cell.mean(0)
        return by_cell.T @ by_cell / len(by_cell)


@dataclass(frozen=True, eq=False)
class _Design:
    """Patches through a field, in coordinates in which weights are penalised alike."""

    columns: Float32[np.ndarray, "image column"]
    mean: Float32[np.ndarray, " channel"]
    scale: Float32[np.ndarray, " channel"]
    prior: Float32[np.ndarray, "channel rank"] | None

    def weights(self, dual: Float32[np.ndarray, "image voxel"]) -> Float32[np.ndarray, "channel voxel"]:
        """Return the weights of the channels."""
        along = self.columns.T @ dual
        n_channel = len(self.scale)
        weights = self.scale[:, None] * along[:n_channel]
        return weights if self.prior is None else weights + self.prior @ along[n_channel:]


class _Seen:
    """What the training images' patches are through each of some fields, read anew whenever they are asked for."""

    def __init__(
        self,
        model: EncodingModel,
        tokens: TokenReader,
        image: np.ndarray,
        fields: CandidateFields,
        *,
        prior: Float32[np.ndarray, "channel rank"] | None = None,
    ) -> None:
        self._tokens, self._image, self._prior = tokens, image, prior
        self._fields = gaussian_field(fields.place, fields.log_size, model.shape.side).numpy()
        self._mean = model.streams.patch_mean.cpu().numpy().reshape(-1)
        self._sd = model.streams.patch_sd.cpu().numpy().reshape(-1)

    def _through(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        depth, _, width = self._tokens.shape
        group = max(1, GROUP_BYTES // (4 * len(self._image) * depth * width))
        for start in range(0, len(numbers), group):
            some = numbers[start : start + group]
            seen = patches_under(self._tokens, self._image, self._fields[some])
            for number, features in zip(some, seen, strict=True):
                yield int(number), (features.reshape(len(features), -1) - self._mean) / self._sd

    def _design(self, features: Float32[np.ndarray, "image channel"]) -> _Design:
        """Standardise the channels; with a prior, most of a weight's variance is along its axes."""
        mean, sd = features.mean(0, dtype=np.float64).astype(np.float32), features.std(0, dtype=np.float64)
        scale = np.where(sd > _SMALLEST_SD, 1 / np.maximum(sd, _SMALLEST_SD), 0) / np.sqrt(features.shape[1])
        scale, centred = scale.astype(np.float32), features - mean
        if self._prior is None:
            return _Design(centred * scale, mean, scale, None)
        along = centred @ self._prior
        size = np.sqrt(PRIOR_SHARE / max(np.square(along).sum() / len(along), _SMALLEST_SD))
        scale = scale * np.float32(np.sqrt(1 - PRIOR_SHARE))
        prior = (self._prior * size).astype(np.float32)
        return _Design(np.hstack([centred * scale, along * np.float32(size)]), mean, scale, prior)

    def solve(
        self, responses: np.ndarray, axes: Float32[np.ndarray, "channel axis"]
    ) -> tuple[Best, Int[np.ndarray, " voxel"]]:
        """Return the fit of each voxel through its best field, and the number of that field.

        All fields are screened on a few axes of the channels and a sample of the voxels; those that are best for some
        of these are solved in full.
        """
        every = -(-responses.shape[1] // SCREENING_VOXELS)
        with threadpool_limits(limits=1):  # so many small matrices that threads would mostly wait for each other
            errors = lowest_errors(self._screened(axes), np.ascontiguousarray(responses[:, ::every]))
        kept = shortlist(errors, N_FIELDS)

        def solved() -> Iterator[Candidate]:
            for _, features in self._through(kept):
                columns = self._design(features).columns
                yield candidate_of_features(columns, columns[:0])

        found = best_of(solved(), responses)
        return found, kept[found.candidate]

    def _screened(self, axes: Float32[np.ndarray, "channel axis"]) -> Iterator[Candidate]:
        reduced = []
        for start in range(0, len(self._image), _BATCH):
            _, patch = self._tokens.read(self._image[start : start + _BATCH])
            channels = patch.astype(np.float32).transpose(0, 2, 1, 3).reshape(len(patch), patch.shape[2], -1)
            reduced.append(((channels - self._mean) / self._sd) @ axes)
        along = np.concatenate(reduced)
        none = np.empty((0, axes.shape[1]), np.float32)
        along -= along.mean(0)
        group = max(1, GROUP_BYTES // (4 * len(along) * along.shape[2]))
        for start in range(0, len(self._fields), group):
            through = torch.from_numpy(self._fields[start : start + group]) @ torch.from_numpy(along)
            for seen in through.unbind(1):
                scale = seen.square().sum().sqrt().clamp_min(_SMALLEST_SD) / len(seen) ** 0.5
                yield candidate_of_features((seen / scale).numpy(), none)

    def weights(
        self, dual: np.ndarray, choice: np.ndarray
    ) -> tuple[Float32[np.ndarray, "channel voxel"], Float32[np.ndarray, "field channel"]]:
        """Return the weights of the channels in each voxel's field, and the channels' means in every field chosen."""
        weights = np.empty((len(self._mean), len(choice)), np.float32)
        means = np.zeros((len(self._fields), len(self._mean)), np.float32)
        for number, features in self._through(np.unique(choice)):
            voxels = choice == number
            design = self._design(features)
            means[number], weights[:, voxels] = design.mean, design.weights(dual[:, voxels])
        return weights, means
