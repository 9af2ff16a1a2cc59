"""The objective's terms against closed forms and independent libraries, and how images weigh in it."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from foundation.config import LossConfig
from foundation.losses import kl_divergence, objective, pearson_loss, subject_losses
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from tests.tiny_store import TINY_BACKBONE

PARCELS = {"subj01": torch.arange(40) // 5, "subj02": torch.arange(9) // 3, "subj05": torch.arange(4) // 2}
WEIGHTS = LossConfig(roi=0.7, pearson=0.4, kl=0.02)


@pytest.fixture
def model() -> EncodingModel:
    torch.manual_seed(0)
    return EncodingModel(TokenShape(depth=2, patch=4, width=5), TINY_BACKBONE, PARCELS).eval()


def batch(n_images: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor, dict[str, slice], dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(1)
    n = sum(n_images.values())
    starts = np.cumsum([0, *n_images.values()])
    rows = {name: slice(int(a), int(b)) for name, a, b in zip(n_images, starts[:-1], starts[1:], strict=True)}
    responses = {name: torch.randn(k, len(PARCELS[name]), generator=made) for name, k in n_images.items()}
    return torch.randn(n, 2, 5, generator=made), torch.randn(n, 2, 4, 5, generator=made), rows, responses


def test_kl_is_the_divergence_from_a_standard_normal():
    mu, log_variance = torch.randn(5, 3), torch.randn(5, 3)
    expected = torch_kl(Normal(mu, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl_divergence(mu, log_variance), expected)
    assert kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_pearson_loss_is_one_minus_the_correlation_over_units():
    prediction, target = torch.randn(6, 11), torch.randn(6, 11)
    expected = [1 - pearsonr(p, t).statistic for p, t in zip(prediction.numpy(), target.numpy(), strict=True)]
    np.testing.assert_allclose(pearson_loss(prediction, target), expected, atol=1e-5)


def test_pearson_loss_of_a_constant_side_is_one_with_a_finite_gradient():
    prediction = torch.full((2, 5), 0.3, requires_grad=True)
    loss = pearson_loss(prediction, torch.randn(2, 5))
    torch.testing.assert_close(loss, torch.ones(2))
    loss.sum().backward()
    assert torch.isfinite(prediction.grad).all()


def test_the_total_is_the_weighted_sum_of_means_over_images(model):
    cls, patch, rows, responses = batch({"subj01": 4, "subj02": 3})
    output = model(cls, patch, rows)
    losses = objective(model, output, responses, WEIGHTS)
    voxel, roi, pearson = [], [], []
    for name, target in responses.items():
        found, means = output.subjects[name], model.adapter(name).roi_means(target)
        voxel += ((found.voxel - target) ** 2).mean(1).tolist()
        roi += ((found.roi.value - means) ** 2).mean(1).tolist()
        pearson += pearson_loss(found.roi.value, means).tolist()
    kl = kl_divergence(output.mu, output.log_variance).mean().item()
    expected = np.mean(voxel) + 0.7 * np.mean(roi) + 0.4 * np.mean(pearson) + 0.02 * kl
    np.testing.assert_allclose(losses.total.item(), expected, rtol=1e-5)
    assert losses.terms.keys() == {"voxel", "roi", "pearson", "kl"}


def test_every_image_counts_the_same_whatever_its_subjects_number_of_voxels(model):
    cls, patch, rows, responses = batch({"subj01": 3, "subj02": 3})
    output = model(cls, patch, rows)
    for name in responses:  # every voxel of an image off by one: its error is 1, be it of 40 voxels or of 9
        off = {other: output.subjects[other].voxel.detach() for other in responses}
        off[name] = off[name] + 1
        losses = objective(model, output, off, WEIGHTS)
        np.testing.assert_allclose(losses.terms["voxel"].item(), 0.5, rtol=1e-5)


def test_an_empty_subject_adds_nothing_but_a_zero_gradient(model):
    cls, patch, rows, responses = batch({"subj01": 4, "subj02": 0})
    with_empty = objective(model, model(cls, patch, rows), responses, WEIGHTS)
    alone = objective(model, model(cls, patch, {"subj01": rows["subj01"]}), {"subj01": responses["subj01"]}, WEIGHTS)
    torch.testing.assert_close(with_empty.total, alone.total)
    with_empty.total.backward()
    for parameter in model.adapter("subj02").parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


def test_with_fewer_than_three_rois_there_is_no_correlation_to_learn_from(model):
    cls, patch, rows, responses = batch({"subj05": 3})
    output = model(cls, patch, rows)
    found = subject_losses(model.adapter("subj05"), output, "subj05", responses["subj05"])
    assert found["pearson"].tolist() == [0, 0, 0]
