"""What stands beside the network: closed-form paths, the population, noise of single trials, low-rank updates."""

import pytest
import torch

from foundation.model.encoding_model import EncodingModel
from foundation.model.population import PopulationPath
from tests.foundation.model.small_model import PARCELS, ROWS, made_with, solve_path, tokens
from tests.tiny_store import TINY_BACKBONE


@pytest.fixture
def model() -> EncodingModel:
    """A model with no part left at a neutral start."""
    return made_with()


# -- the closed-form path beside the network ---------------------------------------------------------------------------


def test_with_no_share_the_network_is_silent_and_with_all_of_it_the_path_is(model):
    cls, patch = tokens()
    network = model(cls, patch, {"subj01": slice(0, 8)}).subjects["subj01"].voxel
    adapter = model.adapter("subj01")
    solve_path(model, "subj01")
    path = adapter.linear(model.linear_features(cls, patch))
    assert path.std() > 0.1
    for share, expected in ((0.0, path), (1.0, network), (0.25, 0.25 * network + 0.75 * path)):
        adapter.network_share.fill_(share)
        torch.testing.assert_close(model.predict(cls, patch, "subj01"), expected)


def test_the_path_sees_tokens_in_units_of_the_training_images_and_all_patches_whatever_the_budget():
    model, (cls, patch) = made_with(token_budget=2), tokens(50)
    model.streams.set_statistics([(cls, patch)])
    expected = model.linear_features(cls, patch)
    model.streams.set_statistics([(3 * cls - 1, 0.5 * patch + 2)])
    found = model.linear_features(3 * cls - 1, 0.5 * patch + 2)
    assert found.patch.shape == (50, 16, 10)
    torch.testing.assert_close(found.whole, expected.whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.patch, expected.patch, rtol=1e-3, atol=1e-4)


# -- the population path -----------------------------------------------------------------------------------------------

LANDMARKS = torch.tensor([[0, 3], [2, 12], [0, 10], [2, 0]])
"""Voxels of subj01 and subj05."""


def solve_population(model: EncodingModel, subject: str) -> PopulationPath:
    """Give the subject a population path with numbers in it."""
    path = model.add_population(subject, len(LANDMARKS), 2)
    for buffer in (path.mean, path.basis, path.weight):
        buffer.normal_()
    path.landmark.copy_(LANDMARKS)
    return path


@torch.no_grad()
def test_a_landmark_is_what_the_model_predicts_for_that_voxel_of_that_subject(model):
    solve_path(model, "subj05")  # one is a mixture, the other the network alone
    path, (cls, patch) = solve_population(model, "subj02"), tokens()
    found = model.population(cls, patch, path)
    of_subject = {0: model.predict(cls, patch, "subj01"), 2: model.predict(cls, patch, "subj05")}
    for column, (number, voxel) in enumerate(LANDMARKS.tolist()):
        torch.testing.assert_close(found[:, column], of_subject[number][:, voxel], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_closed_form_is_both_paths_and_is_mixed_with_the_network(model):
    cls, patch = tokens()
    network = model(cls, patch, {"subj02": slice(0, 8)}).subjects["subj02"].voxel
    solve_path(model, "subj02")
    adapter, path = model.adapter("subj02"), solve_population(model, "subj02")
    linear = adapter.linear(model.linear_features(cls, patch))
    expected = linear + path(model.population(cls, patch, path))
    assert (expected - linear).std() > 0.1
    torch.testing.assert_close(model.closed_form(cls, patch, "subj02"), expected)
    share = adapter.network_share
    torch.testing.assert_close(model.predict(cls, patch, "subj02"), share * network + (1 - share) * expected)


@torch.no_grad()
def test_an_unsolved_population_path_changes_no_prediction(model):
    cls, patch = tokens()
    solve_path(model, "subj02")
    before = model.predict(cls, patch, "subj02")
    model.add_population("subj02", 4, 2)
    torch.testing.assert_close(model.predict(cls, patch, "subj02"), before, rtol=0, atol=0)


@torch.no_grad()
def test_draws_of_single_trials_are_around_the_population_too():
    model = fitted(made_with(latent=None), "subj02")
    solve_path(model, "subj02")
    before = model.sample(*tokens(), "subj02", 2, generator=torch.Generator().manual_seed(5))
    path, share = solve_population(model, "subj02"), model.adapter("subj02").network_share
    after = model.sample(*tokens(), "subj02", 2, generator=torch.Generator().manual_seed(5))
    expected = (1 - share) * path(model.population(*tokens(), path))
    torch.testing.assert_close(after - before, expected.expand_as(after), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_population_is_the_frozen_backbones_whatever_updates_the_new_subject_has(model):
    path = solve_population(model, "subj02")
    before = model.population(*tokens(), path)
    for up in model.add_lora("subj02", 2).up.values():
        torch.nn.init.normal_(up)
    torch.testing.assert_close(model.population(*tokens(), path), before, rtol=0, atol=0)


def test_a_population_path_belongs_to_the_adapter_and_replaces_the_one_before(model):
    model.add_population("subj02", 9, 3)
    path = model.add_population("subj02", 4, 2)
    assert model.adapter("subj02").population is path
    assert path.weight.shape == (5, 2)
    n_parameters = len(list(model.parameters()))
    model.adapter("subj02").population = None
    assert len(list(model.parameters())) == n_parameters


def test_a_subject_that_anothers_population_is_read_from_cannot_be_dropped(model):
    solve_population(model, "subj02")
    with pytest.raises(ValueError, match="'subj02' is predicted from voxels of 'subj01'; drop 'subj02' first"):
        model.drop_subject("subj01")
    assert model.subjects == list(PARCELS)
    model.drop_subject("subj02")
    model.drop_subject("subj01")
    assert model.subjects == ["subj05"]


@torch.no_grad()
def test_dropping_and_renaming_others_leaves_the_populations_prediction(model):
    model.add_subject("subj09", torch.arange(6) // 2)
    model.adapter("subj09").network_share.zero_()
    path = solve_population(model, "subj09")
    expected = model.predict(*tokens(), "subj09")
    model.drop_subject("subj02")  # before one of the landmarks' subjects
    model.rename_subject("subj05", "amy")
    assert path.landmark.tolist() == [[0, 3], [1, 12], [0, 10], [1, 0]]
    torch.testing.assert_close(model.predict(*tokens(), "subj09"), expected, rtol=1e-5, atol=1e-6)


# -- draws of single trials --------------------------------------------------------------------------------------------


def fitted(model: EncodingModel, subject: str) -> EncodingModel:
    """Give the subject a noise in each voxel."""
    noise = model.adapter(subject).noise_sd
    noise.copy_(torch.linspace(2, 0.02, len(noise)))
    return model


def test_the_noise_of_a_subject_has_to_be_fitted_before_it_is_sampled(model):
    fitted(model, "subj01")
    with pytest.raises(ValueError, match="noise of 'subj02' hasn't been fitted; finish its adapter first"):
        model.sample(*tokens(), "subj02", 2)
    assert model.sample(*tokens(), "subj01", 2).shape == (2, 8, 11)


@torch.no_grad()
def test_draws_differ_from_each_other_and_the_same_generator_gives_the_same(model):
    fitted(model, "subj01")
    solve_path(model, "subj01")
    first, again, other = (
        model.sample(*tokens(), "subj01", 3, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert ((first - other).abs().amax((0, 1)) > 1e-3).all()
    assert ((first[0] - first[1]).abs().amax(0) > 1e-3).all()


@torch.no_grad()
def test_without_a_latent_a_draw_is_the_prediction_and_each_voxels_noise():
    model = fitted(made_with(latent=None), "subj01")
    solve_path(model, "subj01")
    found = model.sample(*tokens(), "subj01", 3, generator=torch.Generator().manual_seed(5))
    noise, made = [], torch.Generator().manual_seed(5)
    for _ in range(3):
        noise.append(torch.randn(8, 11, generator=made))
    expected = model.predict(*tokens(), "subj01") + model.adapter("subj01").noise_sd * torch.stack(noise)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_draws_spread_around_the_prediction_by_the_latents_variance_in_the_networks_share_and_the_noise(model):
    torch.manual_seed(0)
    fitted(model, "subj01")
    solve_path(model, "subj01")
    model.vae.from_latent.weight.mul_(0.1)  # a small latent moves the response in a line, so that its mean is the mean
    model.vae.to_latent.bias[TINY_BACKBONE.latent :] = 0
    n, adapter = 4000, model.adapter("subj01")
    cls, patch = (t[:1].repeat(n // 4, *[1] * (t.ndim - 1)) for t in tokens())  # one image, in 1000 rows
    drawn = model.sample(cls, patch, "subj01", 4).flatten(0, 1)
    latent = model(cls.repeat(4, 1, 1), patch.repeat(4, 1, 1, 1), {"subj01": slice(0, n)}, sample=True)
    of_latent = adapter.network_share**2 * latent.subjects["subj01"].voxel.var(0)
    variance = of_latent + adapter.noise_sd**2
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.1, atol=0)
    assert of_latent[-1] > adapter.noise_sd[-1] ** 2  # in this voxel the latent is the larger part
    error = (drawn.mean(0) - model.predict(cls[:1], patch[:1], "subj01")[0]) / variance.sqrt()
    assert error.abs().max() < 0.1


# -- low-rank updates of the backbone ----------------------------------------------------------------------------------


@torch.no_grad()
def test_low_rank_updates_change_nothing_at_first_and_then_their_own_subjects_rows_alone(model):
    before = model(*tokens(), ROWS).subjects
    update = model.add_lora("subj02", 2)
    for name, found in model(*tokens(), ROWS).subjects.items():
        torch.testing.assert_close(found.voxel, before[name].voxel, rtol=1e-5, atol=1e-6)
    for up in update.up.values():
        torch.nn.init.normal_(up)
    after = model(*tokens(), ROWS).subjects
    for name in ("subj01", "subj05"):
        torch.testing.assert_close(after[name].voxel, before[name].voxel, rtol=1e-5, atol=1e-6)
    assert (after["subj02"].voxel - before["subj02"].voxel).abs().max() > 1e-2


@torch.no_grad()
def test_updated_rows_are_those_of_a_backbone_that_holds_the_updated_weights(model):
    update = model.add_lora("subj02", 2)
    for up in update.up.values():
        torch.nn.init.normal_(up)
    found = model.predict(*tokens(), "subj02")
    model.streams.load_state_dict(update.updated(model.streams), strict=False)
    model.adapter("subj02").lora = None
    torch.testing.assert_close(found, model.predict(*tokens(), "subj02"), rtol=1e-4, atol=1e-5)


def test_low_rank_updates_belong_to_the_adapter_and_replace_those_before(model):
    n_backbone, n_numbers = len(model.backbone_parameters()), model.adapter("subj02").n_numbers
    model.add_lora("subj02", 4)
    update = model.add_lora("subj02", 1)
    assert model.adapter("subj02").lora is update
    assert len(model.backbone_parameters()) == n_backbone
    assert model.adapter("subj02").n_numbers == n_numbers + sum(p.numel() for p in update.parameters())
