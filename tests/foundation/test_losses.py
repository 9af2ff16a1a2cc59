"""The objective's terms against closed forms and independent libraries, and how images weigh in it."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import pearsonr
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from foundation.config import LossConfig
from foundation.losses import info_nce, kl_divergence, objective, pearson_loss, roi_target, subject_losses
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.roi_targets import top_p_targets
from foundation.training.optim import stage_of
from tests.tiny_store import TINY_BACKBONE

PARCELS = {"subj01": torch.arange(40) // 5, "subj02": torch.arange(9) // 3, "subj05": torch.arange(4) // 2}
WEIGHTS = LossConfig(roi=0.7, pearson=0.4, kl=0.02)


def made_with(**changes) -> EncodingModel:
    """A model with no part left at a neutral start."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY_BACKBONE, **changes)
    made = EncodingModel(TokenShape(depth=2, patch=4, width=5), config, PARCELS).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "A_log" not in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    return made


@pytest.fixture
def model() -> EncodingModel:
    return made_with()


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
    found = subject_losses(model.adapter("subj05"), output, "subj05", responses["subj05"], WEIGHTS)
    assert found["pearson"].tolist() == [0, 0, 0]


# -- targets of Stage 1 ------------------------------------------------------------------------------------------------


def test_a_top_p_target_is_taken_when_told_whatever_the_weights(model):
    responses, adapter = torch.randn(5, 40), model.adapter("subj01")
    adapter.target_weight.zero_()
    expected = top_p_targets(responses, adapter.parcel, n_roi=8)
    torch.testing.assert_close(roi_target(adapter, responses, LossConfig(roi_target="top-p")), expected)
    of_first = responses[:, :5].topk(4).values.mean(1)  # 70 % of five voxels, rounded
    torch.testing.assert_close(expected[:, 0], of_first)


@pytest.mark.parametrize("target", ["mean", "reliability-weighted", "low-rank"])
def test_a_linear_target_is_the_sum_of_an_rois_voxels_by_the_adapters_weights(model, target):
    responses, adapter = torch.randn(5, 40), model.adapter("subj01")
    config = LossConfig(roi_target=target)
    torch.testing.assert_close(roi_target(adapter, responses, config), adapter.roi_means(responses))  # until fitted
    adapter.target_weight.copy_(torch.rand(40))
    expected = (responses * adapter.target_weight).view(5, 8, 5).sum(2)
    torch.testing.assert_close(roi_target(adapter, responses, config), expected)


@pytest.mark.parametrize("target", ["mean", "top-p"])
def test_stage_1_is_scored_against_its_target(model, target):
    cls, patch, rows, responses = batch({"subj01": 4})
    output, config = model(cls, patch, rows), LossConfig(roi_target=target)
    value, wanted = (
        output.subjects["subj01"].roi.value,
        roi_target(model.adapter("subj01"), responses["subj01"], config),
    )
    found = objective(model, output, responses, config).terms
    torch.testing.assert_close(found["roi"], (value - wanted).square().mean())
    torch.testing.assert_close(found["pearson"], pearson_loss(value, wanted).mean())


# -- alignment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_info_nce_is_the_mean_of_both_directions_cross_entropy_of_cosines(temperature):
    image, rois = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image.numpy(), rois.numpy()))
    logits = a @ b.T / temperature
    own = np.diag(logits)
    expected = 0.5 * (logsumexp(logits, axis=1) - own + logsumexp(logits, axis=0) - own)
    np.testing.assert_allclose(info_nce(image, rois, temperature=temperature), expected)


def test_pairs_that_are_aligned_cost_nothing_and_pairs_that_all_look_alike_the_logarithm_of_their_number():
    aligned = torch.eye(8)
    assert info_nce(aligned, 3 * aligned, temperature=0.05).max() < 1e-6
    torch.testing.assert_close(
        info_nce(torch.ones(8, 3), torch.ones(8, 3), temperature=0.05), torch.full((8,), 8.0).log()
    )
    assert info_nce(aligned, aligned.roll(1, 0), temperature=0.05).min() > 10


def test_info_nce_is_the_same_for_pairs_in_another_order_and_for_either_side_first():
    image, rois, order = torch.randn(6, 4), torch.randn(6, 4), torch.randperm(6)
    found = info_nce(image, rois, temperature=0.1)
    torch.testing.assert_close(info_nce(image[order], rois[order], temperature=0.1), found[order])
    torch.testing.assert_close(info_nce(rois, image, temperature=0.1), found)


def test_one_picture_seen_by_two_is_no_negative_of_itself():
    image, rois = torch.randn(5, 4), torch.randn(5, 4)
    same = torch.tensor([7, 3, 7, 5, 2])
    found = info_nce(image, rois, temperature=0.3, same=same)
    without = [info_nce(image[kept], rois[kept], temperature=0.3) for kept in ([0, 1, 3, 4], [1, 2, 3, 4])]
    torch.testing.assert_close(found[[0, 2]], torch.stack([without[0][0], without[1][1]]))
    torch.testing.assert_close(found[[1, 3, 4]], info_nce(image, rois, temperature=0.3)[[1, 3, 4]])


def test_images_are_aligned_with_the_rois_of_whoever_saw_them():
    model, (cls, patch, rows, responses) = made_with(n_contrast=3), batch({"subj01": 4, "subj02": 3})
    output = model(cls, patch, rows)
    found = objective(model, output, responses, WEIGHTS)
    projected = [model.adapter(name).roi_means(responses[name]) @ model.adapter(name).roi_align for name in responses]
    image, rois = model.streams.align_image(output.summary), model.streams.align_rois(torch.cat(projected))
    expected = info_nce(image, rois, temperature=WEIGHTS.temperature).mean()
    torch.testing.assert_close(found.terms["contrast"], expected)
    without = objective(model, output, responses, dataclasses.replace(WEIGHTS, contrast=0.0))
    torch.testing.assert_close(found.total - without.total, WEIGHTS.contrast * expected)


# -- stages ------------------------------------------------------------------------------------------------------------


def gradients(model: EncodingModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.fixture
def staged() -> tuple[EncodingModel, dict[str, torch.Tensor], dict[str | None, torch.Tensor]]:
    """A model, its terms, and its total by stage."""
    model, (cls, patch, rows, responses) = made_with(n_contrast=3), batch({"subj01": 4, "subj02": 3, "subj05": 0})
    output = model(cls, patch, rows)
    losses = {stage: objective(model, output, responses, WEIGHTS, stage=stage) for stage in (None, "stage1", "stage2")}
    return model, losses[None].terms, {stage: found.total for stage, found in losses.items()}


def test_the_stages_totals_add_up_to_the_whole(staged):
    _, terms, total = staged
    torch.testing.assert_close(total["stage1"] + total["stage2"], total[None])
    torch.testing.assert_close(total["stage2"], terms["voxel"] + WEIGHTS.kl * terms["kl"])


@pytest.mark.parametrize("stage", [None, "stage1", "stage2"])
def test_every_parameter_gets_a_gradient_be_it_zero_whichever_stage_trains(staged, stage):
    model, _, total = staged  # so that ranks reduce the same tensors
    assert gradients(model, total[stage]).keys() == dict(model.named_parameters()).keys()


def test_stage_1_moves_nothing_of_stage_2(staged):
    model, _, total = staged
    for name, gradient in gradients(model, total["stage1"]).items():
        if "subj05" not in name:
            assert bool(gradient.any()) == (stage_of(name) == "stage1"), name


def test_held_in_stage_2_what_stage_1_owns_has_a_gradient_of_zero_and_the_rest_its_own(staged):
    model, _, total = staged
    cls, patch, rows, responses = batch({"subj01": 4, "subj02": 3, "subj05": 0})
    held = objective(model, model(cls, patch, rows, hold_stage1=True), responses, WEIGHTS, stage="stage2").total
    torch.testing.assert_close(held, total["stage2"])
    expected, found = gradients(model, total["stage2"]), gradients(model, held)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        own = stage_of(name) == "stage2"
        torch.testing.assert_close(gradient, expected[name] if own else torch.zeros_like(gradient), msg=name)


def test_in_stage_2_no_term_of_stage_1_is_learnt_from(staged):
    model, terms, total = staged
    found = gradients(model, total["stage2"])
    for name, gradient in gradients(model, terms["voxel"] + WEIGHTS.kl * terms["kl"]).items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    for name, gradient in found.items():
        if "subj05" not in name:
            assert bool(gradient.any()) == ("align" not in name), name
