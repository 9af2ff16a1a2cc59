"""The whole model: subjects in one batch don't disturb each other, every part is alive, and readouts are linear."""

import pytest
import torch

from foundation.model.dual_stream import TokenShape, gaussian_field
from foundation.model.encoding_model import EncodingModel
from tests.tiny_store import TINY_BACKBONE

PARCELS = {
    "subj01": torch.arange(11) // 3,
    "subj02": torch.zeros(5, dtype=torch.int64),
    "subj05": torch.arange(13) // 2,
}
ROWS = {"subj01": slice(0, 3), "subj02": slice(3, 4), "subj05": slice(4, 8)}


@pytest.fixture
def model() -> EncodingModel:
    """A model with no part left at a neutral start."""
    torch.manual_seed(0)
    made = EncodingModel(TokenShape(depth=2, patch=16, width=5), TINY_BACKBONE, PARCELS)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "A_log" not in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    return made.eval()


def tokens(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, 5, generator=made), torch.randn(n, 2, 16, 5, generator=made)


def test_a_mixed_batch_gives_each_subject_what_it_gets_alone(model):
    cls, patch = tokens()
    mixed = model(cls, patch, ROWS)
    for name, rows in ROWS.items():
        n = rows.stop - rows.start
        alone = model(cls[rows], patch[rows], {name: slice(0, n)})
        assert mixed.subjects[name].voxel.shape == (n, len(PARCELS[name]))
        torch.testing.assert_close(mixed.subjects[name].voxel, alone.subjects[name].voxel, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed.mu[rows], alone.mu, rtol=1e-4, atol=1e-5)


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


def test_every_parameter_gets_a_gradient_and_that_of_an_absent_subject_is_zero(model):
    cls, patch = tokens()
    rows = {"subj01": slice(0, 5), "subj02": slice(5, 5), "subj05": slice(5, 8)}
    output = model(cls, patch, rows, sample=True)
    assert output.subjects["subj02"].voxel.shape == (0, 5)
    sum(found.voxel.square().sum() for found in output.subjects.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()) == ("subj02" not in name), name


def test_backbone_and_adapters_are_all_the_parameters(model):
    shared = {id(parameter) for parameter in model.backbone_parameters()}
    owned = {id(parameter) for name in PARCELS for parameter in model.adapter(name).parameters()}
    assert shared.isdisjoint(owned)
    assert shared | owned == {id(parameter) for parameter in model.parameters()}


def test_voxel_features_recombined_with_the_adapters_weights_are_the_prediction(model):
    cls, patch = tokens()
    adapter = model.adapter("subj05")
    with torch.no_grad():
        adapter.voxel_residual.zero_()  # the readout that is solved in closed form leaves it out
    found = model.voxel_features(model.streams(cls, patch), "subj05")
    field = gaussian_field(adapter.voxel_place, adapter.voxel_log_size, adapter.side)
    seen = (torch.einsum("bpc,vp->bvc", found.local, field) * adapter.voxel_local).sum(-1)
    voxel = found.holistic_gain * adapter.holistic(found.components) + found.local_gain * seen + found.offset
    expected = model(cls, patch, {"subj05": slice(0, 8)}).subjects["subj05"].voxel
    torch.testing.assert_close(voxel, expected, rtol=1e-4, atol=1e-5)


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
        "streams.gate_trunk.weight",
        "vae.visual.weight",
        "vae.value",
        "vae.to_latent.weight",
        "vae.from_latent.weight",
        "vae.queries",
        "vae.to_components.weight",
        "vae.to_local.weight",
        "vae.to_residual.2.weight",
        "vae.to_scale.weight",
        "vae.holistic_share",
        "adapters.subj01.roi_embedding",
        "adapters.subj01.roi_gate",
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
