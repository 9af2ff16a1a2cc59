"""Stage 2 alone: padding, sampling, and that its latent and its tokens reach the output."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from foundation.model.mamba_vae import Decoded, MambaVae
from tests.tiny_store import TINY_BACKBONE

WIDTH, LATENT = TINY_BACKBONE.width, TINY_BACKBONE.latent
OUTPUTS = ("mu", "log_variance", "components", "local", "residual", "scale")


@pytest.fixture
def vae() -> MambaVae:
    torch.manual_seed(0)
    made = MambaVae(TINY_BACKBONE)
    torch.nn.init.normal_(made.to_scale.weight)
    return made


def inputs(n: int = 3, n_roi: int = 4) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return {
        "summary": torch.randn(n, 2 * WIDTH, generator=made),
        "patch": torch.randn(n, 16, WIDTH, generator=made),
        "roi_tokens": torch.randn(n, n_roi, WIDTH, generator=made),
        "real": torch.ones(n, n_roi, dtype=torch.bool),
    }


def padded(given: dict[str, torch.Tensor], by: int) -> dict[str, torch.Tensor]:
    tokens = F.pad(given["roi_tokens"], (0, 0, by, 0))
    return given | {"roi_tokens": tokens, "real": F.pad(given["real"], (by, 0), value=False)}


def assert_equal(one: Decoded, other: Decoded) -> None:
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", [1, 5])
def test_padding_changes_nothing_but_the_residuals_of_the_padding(vae, by):
    given = inputs()
    found, expected = vae(**padded(given, by), sample=False), vae(**given, sample=False)
    for name in OUTPUTS:
        value = getattr(found, name)
        value = value[:, by:] if name == "residual" else value
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_one_draw_is_the_mean_plus_noise_of_the_given_generator(vae):
    given = inputs()
    draws = [vae(**given, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert_equal(draws[0], draws[1])
    assert not torch.equal(draws[0].components, draws[2].components)
    torch.testing.assert_close(draws[0].mu, draws[2].mu)  # the noise comes after the encoder


def test_without_sampling_no_random_number_is_drawn(vae):
    before = torch.get_rng_state()
    assert_equal(vae(**inputs(), sample=False), vae(**inputs(), sample=False))
    assert torch.equal(before, torch.get_rng_state())


def test_as_the_variance_vanishes_a_draw_becomes_the_mean(vae):
    with torch.no_grad():
        vae.to_latent.weight[LATENT:] = 0
        vae.to_latent.bias[LATENT:] = -100.0
    given = inputs()
    drawn, mean = vae(**given, sample=True), vae(**given, sample=False)
    torch.testing.assert_close(drawn.components, mean.components, rtol=0.1, atol=0.05)
    assert (drawn.log_variance == -10).all()  # clamped: the KL stays finite


@pytest.mark.parametrize("name", ["summary", "roi_tokens"])
def test_every_token_reaches_the_latent_and_the_components(vae, name):
    given = inputs()
    given[name].requires_grad_()
    found = vae(**given, sample=False)
    for output in (found.mu, found.components):
        (heard,) = torch.autograd.grad(output.square().sum(), given[name], retain_graph=True)
        assert (heard.abs().sum(-1) > 0).all()


def test_components_and_residuals_hear_of_the_latent(vae):
    given, before = inputs(), vae(**inputs(), sample=False)
    with torch.no_grad():
        vae.from_latent.bias += torch.randn(WIDTH)
    after = vae(**given, sample=False)
    torch.testing.assert_close(after.mu, before.mu)
    assert not torch.allclose(after.components, before.components, atol=1e-3)
    assert not torch.allclose(after.residual, before.residual, atol=1e-3)


def test_a_fresh_decoder_recovers_no_amplitude_yet_and_never_turns_a_sign():
    fresh = MambaVae(TINY_BACKBONE)
    torch.testing.assert_close(fresh(**inputs(), sample=False).scale, torch.ones(3, 1))
    torch.nn.init.normal_(fresh.to_scale.weight, std=100)
    scale = fresh(**inputs(), sample=False).scale
    assert (scale > 0.36).all()
    assert (scale < 2.72).all()


def test_an_rois_residual_is_read_from_its_own_token(vae):
    with torch.no_grad():
        vae.from_latent.weight.zero_()  # the latent hears of every token; without it, the decoder is causal
    given, before = inputs(), vae(**inputs(), sample=False).residual
    given["roi_tokens"][:, 2] += 1
    moved = (vae(**given, sample=False).residual - before).abs().amax((0, 2))
    torch.testing.assert_close(moved[:2], torch.zeros(2), rtol=0, atol=1e-6)
    assert (moved[2:] > 1e-4).all()
    assert moved.argmax() == 2


def without(**changes) -> MambaVae:
    torch.manual_seed(0)
    return MambaVae(dataclasses.replace(TINY_BACKBONE, **changes))


def test_without_a_latent_a_draw_is_the_mean_and_there_is_nothing_to_regularise():
    vae, given = without(latent=None), inputs()
    before = torch.get_rng_state()
    drawn, mean = vae(**given, sample=True), vae(**given, sample=False)
    assert torch.equal(before, torch.get_rng_state())
    assert_equal(drawn, mean)
    assert drawn.mu.shape == drawn.log_variance.shape == (3, 0)
    assert not [name for name, _ in vae.named_parameters() if "encoder" in name or "latent" in name]


@pytest.mark.parametrize("by", [0, 4])
def test_a_decoder_alone_gives_nothing_of_the_others(by):
    given = padded(inputs(), by)
    holistic, residual = without(decoders=("holistic",)), without(decoders=("residual",))
    found = holistic(**given, sample=False)
    assert found.components.shape == (3, TINY_BACKBONE.n_component)
    assert found.local.shape == (3, 16, TINY_BACKBONE.n_local)
    assert found.residual.shape == (3, 4 + by, 0)
    assert holistic.holistic_share == 1
    found = residual(**given, sample=False)
    assert found.components.shape == (3, 0)
    assert found.local.shape == (3, 16, 0)
    assert found.residual.shape == (3, 4 + by, TINY_BACKBONE.n_residual)
    assert residual.holistic_share == 0


def test_residuals_do_not_depend_on_whether_the_holistic_decoders_queries_follow(vae):
    alone = without(decoders=("residual",))
    alone.load_state_dict({key: vae.state_dict()[key] for key in alone.state_dict()})
    found, expected = alone(**inputs(), sample=False), vae(**inputs(), sample=False)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-4, atol=1e-6)


def test_both_decoders_start_with_equal_shares(vae):
    assert vae.holistic_share.item() == 0.5


def test_without_amplitude_recovery_the_scale_is_one(vae):
    fixed = without(amplitude=False)
    fixed.load_state_dict({key: vae.state_dict()[key] for key in fixed.state_dict()})
    found, expected = fixed(**inputs(), sample=False), vae(**inputs(), sample=False)
    assert (found.scale == 1).all()
    assert not (expected.scale == 1).any()
    torch.testing.assert_close(found.components, expected.components, rtol=0, atol=0)


def test_without_a_patch_stream_there_are_no_patches_to_read():
    vae = without(streams=("cls",))
    assert vae(**inputs(), sample=False).local.shape == (3, 16, 0)
    assert not [name for name, _ in vae.named_parameters() if "local" in name]
