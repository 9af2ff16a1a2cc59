"""The whole model: subjects in one batch don't disturb each other, every part is alive, and readouts are linear."""

import dataclasses
from typing import Any

import pytest
import torch

from foundation.config import LossConfig
from foundation.losses import objective
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.model.population import PopulationPath
from foundation.recipes import recipe_named
from foundation.training.optim import stage_of
from tests.tiny_store import TINY_BACKBONE

PARCELS = {
    "subj01": torch.arange(11) // 3,
    "subj02": torch.zeros(5, dtype=torch.int64),
    "subj05": torch.arange(13) // 2,
}
ROWS = {"subj01": slice(0, 3), "subj02": slice(3, 4), "subj05": slice(4, 8)}
SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {},
    "CLS stream alone": {"streams": ("cls",)},
    "patch stream alone": {"streams": ("patch",)},
    "last depth's CLS token": {"cls_depths": "last"},
    "last depth's patches": {"patch_depths": "last"},
    "token budget": {"token_budget": 2},
    "both directions": {"bidirectional": True},
    "free maps": {"readout": "factorised"},
    "mean of patches": {"readout": "mean"},
    "gate per image": {"gate": "image"},
    "aligned by InfoNCE": {"n_contrast": 3},
    "no latent": {"latent": None},
    "holistic decoder alone": {"decoders": ("holistic",)},
    "residual decoder alone": {"decoders": ("residual",)},
    "no amplitude": {"amplitude": False},
    "CLS stream, holistic decoder": {"streams": ("cls",), "decoders": ("holistic",)},
    "the least": {"streams": ("cls",), "decoders": ("residual",), "latent": None, "amplitude": False},
    "the paper's": {"cls_depths": "last", "patch_depths": "last", "readout": "mean", "gate": "image", "n_contrast": 3},
}


def perturbed(model: EncodingModel) -> EncodingModel:
    """Leave no parameter at a neutral start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def made_with(**changes) -> EncodingModel:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY_BACKBONE, **changes)
    return perturbed(EncodingModel(TokenShape(depth=2, patch=16, width=5), config, PARCELS))


@pytest.fixture
def model() -> EncodingModel:
    """A model with no part left at a neutral start."""
    return made_with()


def tokens(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, 5, generator=made), torch.randn(n, 2, 16, 5, generator=made)


def solve_path(model: EncodingModel, subject: str) -> None:
    """Give the subject's closed-form path some numbers, and the network a share of each voxel."""
    adapter = model.adapter(subject)
    for name, buffer in adapter.linear.named_buffers():
        buffer.copy_(0.3 * torch.randn(buffer.shape) if name != "place" else torch.rand(buffer.shape))
    adapter.network_share.copy_(torch.linspace(0, 1, adapter.n_voxel))


def test_a_mixed_batch_gives_each_subject_what_it_gets_alone(model):
    cls, patch = tokens()
    mixed = model(cls, patch, ROWS)
    for name, rows in ROWS.items():
        n = rows.stop - rows.start
        alone = model(cls[rows], patch[rows], {name: slice(0, n)})
        assert mixed.subjects[name].voxel.shape == (n, len(PARCELS[name]))
        torch.testing.assert_close(mixed.subjects[name].voxel, alone.subjects[name].voxel, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed.mu[rows], alone.mu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", PARCELS)
def test_whoever_is_absent_the_others_get_what_they_would(model, absent):
    """Also where the one with the most ROIs is, to whose number the others are padded."""
    cls, patch = tokens()
    present = [name for name in PARCELS if name != absent]
    rows = {absent: slice(0, 0), present[0]: slice(0, 3), present[1]: slice(3, 8)}
    mixed = model(cls, patch, rows)
    assert mixed.subjects[absent].voxel.shape == (0, len(PARCELS[absent]))
    for name in present:
        alone = model.predict(cls[rows[name]], patch[rows[name]], name)
        torch.testing.assert_close(mixed.subjects[name].voxel, alone, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_subject_do_not_depend_on_who_shares_the_batch(model):
    cls, patch = tokens()
    adapter = model.adapter("subj02")
    mixed = model(cls, patch, ROWS).subjects["subj02"].voxel.square().sum()
    alone = model(cls[3:4], patch[3:4], {"subj02": slice(0, 1)}).subjects["subj02"].voxel.square().sum()
    wanted = [*adapter.parameters(), *model.backbone_parameters()]
    for one, other in zip(
        torch.autograd.grad(mixed, wanted, allow_unused=True),
        torch.autograd.grad(alone, wanted, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_with_every_setting_each_subject_gets_what_it_gets_alone(changes):
    model, (cls, patch) = made_with(**changes), tokens()
    mixed = model(cls, patch, ROWS)
    for name, rows in ROWS.items():
        alone = model.predict(cls[rows], patch[rows], name)
        assert torch.isfinite(alone).all()
        assert alone.std() > 1e-3
        torch.testing.assert_close(mixed.subjects[name].voxel, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["", "low-rank updates"])
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_every_parameter_gets_a_gradient_and_that_of_an_absent_subject_is_zero(changes, lora):
    model, (cls, patch) = made_with(**changes), tokens()
    if lora:
        for name in PARCELS:
            model.add_lora(name, 2)
        perturbed(model)
    rows = {"subj01": slice(0, 5), "subj02": slice(5, 5), "subj05": slice(5, 8)}
    output = model(cls, patch, rows, sample=True)
    assert output.subjects["subj02"].voxel.shape == (0, 5)
    responses = {name: torch.randn(rows[name].stop - rows[name].start, len(PARCELS[name])) for name in rows}
    objective(model, output, responses, LossConfig()).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # A sequence of one token leaves a state-space model no past to forget.
        nothing_to_scan = model.config.cls_depths == "last" and name.startswith("streams.cls_stack") and "A_log" in name
        assert bool((parameter.grad != 0).any()) == ("subj02" not in name and not nothing_to_scan), name


def test_backbone_and_adapters_are_all_the_parameters(model):
    shared = {id(parameter) for parameter in model.backbone_parameters()}
    owned = {id(parameter) for name in PARCELS for parameter in model.adapter(name).parameters()}
    assert shared.isdisjoint(owned)
    assert shared | owned == {id(parameter) for parameter in model.parameters()}


def test_stage_1_of_recipe_chasm_has_the_papers_number_of_parameters_within_a_tenth():
    parcels = {"subj01": (torch.arange(15_724) // 30).clamp(max=523)}
    model = EncodingModel(TokenShape(depth=1, patch=256, width=768), recipe_named("chasm").backbone, parcels)
    found = sum(p.numel() for name, p in model.named_parameters() if stage_of(name) == "stage1")
    assert found == pytest.approx(14.6e6, rel=0.1)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_voxel_features_recombined_with_the_adapters_weights_are_the_prediction(changes):
    model, (cls, patch) = made_with(**changes), tokens()
    adapter, decoders = model.adapter("subj05"), model.config.decoders
    if "residual" in decoders:  # the readout that is solved in closed form leaves these out
        torch.nn.init.zeros_(adapter.voxel_residual)
    if "holistic" not in decoders:
        torch.nn.init.zeros_(adapter.voxel_bias)
    found = model.voxel_features(model.streams(cls, patch), "subj05")
    voxel = found.offset
    if "holistic" in decoders:
        voxel = voxel + found.gain * adapter.holistic(found.components, found.local)
    torch.testing.assert_close(voxel, model.predict(cls, patch, "subj05"), rtol=1e-4, atol=1e-5)


def test_a_gate_of_the_image_is_one_share_for_all_rois_and_subjects_and_differs_between_images():
    model, (cls, patch) = made_with(gate="image"), tokens()
    shares = [model.adapter(name).roi_values(model.streams(cls, patch)).share for name in PARCELS]
    assert shares[0][:, 0].std() > 0
    for share in shares:
        assert torch.equal(share, shares[0][:, :1].expand_as(share))


def test_a_draw_differs_with_the_seed_and_the_mean_does_not(model):
    cls, patch = tokens()

    def predicted(seed: int, *, sample: bool) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(cls, patch, ROWS, sample=sample).subjects["subj01"].voxel

    torch.testing.assert_close(predicted(1, sample=False), predicted(2, sample=False), rtol=0, atol=0)
    torch.testing.assert_close(predicted(1, sample=True), predicted(1, sample=True), rtol=0, atol=0)
    assert not torch.allclose(predicted(1, sample=True), predicted(2, sample=True), atol=1e-4)


@pytest.mark.parametrize(
    "part",
    [
        "streams.cls_proj.weight",
        "streams.patch_proj.weight",
        "streams.depth_embedding",
        "streams.position_embedding",
        "streams.gate_trunk.0.weight",
        "vae.visual.weight",
        "vae.value",
        "vae.to_latent.weight",
        "vae.from_latent.weight",
        "vae.queries",
        "vae.to_components.weight",
        "vae.to_local.weight",
        "vae.to_residual.2.weight",
        "vae.to_scale.weight",
        "vae.holistic_logit",
        "adapters.subj01.roi_embedding",
        "adapters.subj01.roi_gate",
        "adapters.subj01.voxel_local",
        "adapters.subj01.voxel_residual",
    ],
)
def test_every_part_is_alive(model, part):
    cls, patch = tokens()
    before = model(cls, patch, ROWS).subjects["subj01"].voxel
    with torch.no_grad():
        model.get_parameter(part).mul_(0)
    after = model(cls, patch, ROWS).subjects["subj01"].voxel
    assert (after - before).abs().max() > 1e-5


def test_an_unknown_subject_is_an_error_that_names_those_there_are(model):
    with pytest.raises(ValueError, match="no adapter for 'subj09'; it has subj01, subj02, subj05"):
        model.adapter("subj09")
    with pytest.raises(ValueError, match="no adapter for 'subj09'; it has none"):
        EncodingModel(model.shape, model.config, {}).adapter("subj09")


def test_adding_a_subject_leaves_the_others_predictions_as_they_are(model):
    cls, patch = tokens()
    before = model(cls, patch, {"subj01": slice(0, 8)}).subjects["subj01"].voxel
    model.add_subject("subj09", torch.arange(4))
    assert model.subjects == ["subj01", "subj02", "subj05", "subj09"]
    after = model(cls, patch, {"subj01": slice(0, 8)}).subjects["subj01"].voxel
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert model(cls, patch, {"subj09": slice(0, 8)}).subjects["subj09"].voxel.shape == (8, 4)


def test_dropping_a_subject_leaves_the_others_predictions_bit_for_bit(model):
    before = {name: model.predict(*tokens(), name) for name in PARCELS}
    model.drop_subject("subj02")
    assert model.subjects == ["subj01", "subj05"]
    for name in model.subjects:
        assert torch.equal(model.predict(*tokens(), name), before[name])
    assert not [name for name in model.state_dict() if "subj02" in name]
    with pytest.raises(ValueError, match="no adapter for 'subj02'; it has subj01, subj05"):
        model.drop_subject("subj02")


@pytest.mark.parametrize("new", ["amy", "sub-01.ses", "values"])
def test_renaming_a_subject_keeps_its_place_and_every_prediction_bit_for_bit(model, new):
    before = {name: model.predict(*tokens(), name) for name in PARCELS}
    model.rename_subject("subj02", new)
    assert model.subjects == ["subj01", new, "subj05"]
    for name, old in zip(model.subjects, PARCELS, strict=True):
        assert torch.equal(model.predict(*tokens(), name), before[old])


def test_a_subject_is_renamed_to_no_name_that_is_taken_and_from_none_that_is_unknown(model):
    with pytest.raises(ValueError, match="an adapter for 'subj05' already; drop it first, or choose another name"):
        model.rename_subject("subj02", "subj05")
    with pytest.raises(ValueError, match="no adapter for 'subj09'; it has subj01, subj02, subj05"):
        model.rename_subject("subj09", "amy")
    assert model.subjects == list(PARCELS)


def test_adding_a_subject_anew_replaces_its_adapter(model):
    old = model.adapter("subj02")
    new = model.add_subject("subj02", torch.arange(7))
    assert model.adapter("subj02") is new is not old
    assert new.n_voxel == 7


@pytest.mark.parametrize("name", ["sub-01.ses", "values", "train", "PE201025"])
def test_any_name_that_a_store_allows_can_be_a_subjects(model, name):
    cls, patch = tokens()
    adapter = model.add_subject(name, torch.arange(4))
    assert model.adapter(name) is adapter
    assert name in model.subjects
    assert model(cls, patch, {name: slice(0, 8)}).subjects[name].voxel.shape == (8, 4)


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
