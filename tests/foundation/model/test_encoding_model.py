"""The whole model: subjects in one batch don't disturb each other, every part is alive, and readouts are linear."""

from typing import Any

import pytest
import torch

from foundation.config import LossConfig
from foundation.losses import objective
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.recipes import recipe_named
from foundation.training.optim import stage_of
from tests.foundation.model.small_model import PARCELS, ROWS, made_with, perturbed, tokens

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


@pytest.fixture
def model() -> EncodingModel:
    """A model with no part left at a neutral start."""
    return made_with()


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
