"""What a subject owns: closed forms of its readouts, and its size."""

import dataclasses

import numpy as np
import pytest
import torch

from foundation.closed_form.population_start import N_LANDMARKS, RANK
from foundation.model.adapter import Adapter
from foundation.model.dual_stream import Streams, TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.model.linear_path import LinearShape
from foundation.model.population import PopulationPath
from foundation.model.spatial import COARSE_PYRAMID, field_pyramid
from foundation.recipes import recipe_named
from tests.tiny_store import TINY_BACKBONE

PARCEL = torch.tensor([0, 0, 1, 2, 1, 2, 2])
LINEAR = LinearShape.of(TokenShape(depth=2, patch=16, width=5), grid=2, rank_whole=3, rank_field=2)


def fresh(**changes) -> Adapter:
    torch.manual_seed(0)
    return Adapter(PARCEL, 4, LINEAR, dataclasses.replace(TINY_BACKBONE, **changes))


def streams_of_three(n_gate: int = TINY_BACKBONE.n_gate) -> Streams:
    width = TINY_BACKBONE.width
    return Streams(cls=torch.randn(3, width), patch=torch.randn(3, 16, width), gate=torch.randn(3, n_gate))


@pytest.fixture
def adapter() -> Adapter:
    """An adapter whose every number differs from its neutral start."""
    made = fresh()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return made


def test_an_roi_target_is_the_mean_of_its_voxels(adapter):
    responses = torch.randn(5, 7)
    expected = np.stack([responses[:, roi == PARCEL].mean(1) for roi in range(3)], axis=1)
    np.testing.assert_allclose(adapter.roi_means(responses), expected, rtol=1e-5, atol=1e-6)


def test_roi_values_are_both_streams_readouts_mixed_by_the_gate(adapter):
    streams = streams_of_three()
    found, field = adapter.roi_values(streams), adapter.roi_field()
    for b in range(3):
        for k in range(3):
            what = streams.cls[b] @ adapter.roi_cls[k] + adapter.roi_bias[0, k]
            where = field[k] @ streams.patch[b] @ adapter.roi_patch[k] + adapter.roi_bias[1, k]
            share = torch.sigmoid(streams.gate[b] @ adapter.roi_gate[k] + adapter.roi_gate_bias[k])
            torch.testing.assert_close(found.value[b, k], share * what + (1 - share) * where)


def test_a_gate_of_the_image_is_the_same_for_every_roi_and_no_ones_own():
    adapter, streams = fresh(gate="image"), streams_of_three(1)
    share = adapter.roi_values(streams).share
    torch.testing.assert_close(share, torch.sigmoid(streams.gate).expand(-1, 3), rtol=0, atol=0)
    assert not [name for name, _ in adapter.named_parameters() if "gate" in name]


@pytest.mark.parametrize("stream", ["cls", "patch"])
def test_of_a_stream_alone_the_rois_are_its_readout(stream):
    adapter, streams = fresh(streams=(stream,)), streams_of_three()
    found = adapter.roi_values(streams)
    torch.testing.assert_close(found.value, getattr(found, stream), rtol=0, atol=0)
    assert found.value.std() > 0
    other = {"cls": "patch", "patch": "cls"}[stream]
    assert not [name for name, _ in adapter.named_parameters() if name in ("roi_gate", f"roi_{other}")]


@pytest.mark.parametrize("readout", ["mean", "factorised", "gaussian"])
def test_the_holistic_readout_is_linear_in_components_and_in_the_patches_of_a_voxels_field(readout):
    adapter = fresh(readout=readout)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    components, local = torch.randn(2, TINY_BACKBONE.n_component), torch.randn(2, 16, 3)
    found, field = adapter.holistic(components, local), adapter.voxel_field()
    for v in range(7):
        seen = field[v] @ local[1] @ adapter.voxel_local[v]
        expected = components[1] @ adapter.voxel_component[v] + seen + adapter.voxel_bias[v]
        torch.testing.assert_close(found[1, v], expected)


def test_the_residual_readout_is_the_rois_value_plus_what_its_token_says_of_the_voxel(adapter):
    roi, residual = torch.randn(2, 3), torch.randn(2, 3, 2)
    found = adapter.residual(roi, residual)
    for v, k in enumerate(PARCEL):
        torch.testing.assert_close(found[1, v], roi[1, k] + residual[1, k] @ adapter.voxel_residual[v])


@pytest.mark.parametrize("decoders", [("holistic", "residual"), ("holistic",), ("residual",)])
def test_a_voxels_bias_is_said_once_whichever_decoders_there_are(decoders):
    adapter, said = fresh(decoders=decoders), torch.zeros(1, 7)
    torch.nn.init.ones_(adapter.voxel_bias)
    if "holistic" in decoders:
        said = said + adapter.holistic(torch.zeros(1, TINY_BACKBONE.n_component), torch.zeros(1, 16, 3))
    if "residual" in decoders:
        said = said + adapter.residual(torch.zeros(1, 3), torch.zeros(1, 3, 2))
    torch.testing.assert_close(said, torch.ones(1, 7))


def test_rois_and_voxels_see_through_the_candidates_that_are_told_and_keep_their_own_otherwise(adapter):
    candidates = field_pyramid(COARSE_PYRAMID)
    before = adapter.voxel_field().clone()
    adapter.place_fields(candidates, voxel=None, roi=torch.tensor([32, 0, 5]))
    torch.testing.assert_close(adapter.roi_field.place, candidates.place[[32, 0, 5]])
    assert torch.equal(adapter.voxel_field(), before)
    adapter.place_fields(candidates, voxel=torch.arange(7), roi=None)
    torch.testing.assert_close(adapter.voxel_field.place, candidates.place[:7])
    torch.testing.assert_close(adapter.roi_field.place, candidates.place[[32, 0, 5]])


@pytest.mark.parametrize("changes", [{"streams": ("cls",)}, {"decoders": ("residual",)}])
def test_an_adapter_without_fields_has_none_to_be_placed(changes):
    fresh(**changes).place_fields(field_pyramid(COARSE_PYRAMID), voxel=torch.arange(7), roi=torch.arange(3))


def test_network_and_closed_form_paths_are_mixed_voxel_by_voxel(adapter):
    network, closed_form = torch.randn(2, 3, 7)
    share = torch.tensor([0, 1, 0.5, 0.25, 0, 1, 0.9])
    assert adapter.alone
    adapter.network_share.copy_(share)
    assert not adapter.alone
    found = adapter.mixed(network, closed_form)
    np.testing.assert_allclose(found, share * network + (1 - share) * closed_form, rtol=1e-5, atol=1e-6)


def test_a_fresh_adapter_gates_both_streams_alike_predicts_by_the_network_alone_and_knows_no_noise():
    adapter = fresh()
    torch.testing.assert_close(adapter.roi_values(streams_of_three()).share, torch.full((3, 3), 0.5))
    assert (adapter.n_voxel, adapter.n_roi, adapter.alone) == (7, 3, True)
    assert adapter.noise_sd.isnan().all()
    assert adapter.lora is adapter.population is None


def test_the_numbers_of_an_adapter_are_its_parameters_its_closed_form_path_and_its_bookkeeping(adapter):
    width, of_readouts = TINY_BACKBONE.width, 7 * (4 + 3 + 2 + 1) + 3 * (2 + 3 + 1)
    of_rois, fields = 3 * 3 * width, 3 * (7 + 3)
    path = LINEAR.whole * 3 + LINEAR.channel * 2 + 7 * (3 + 2 + 2 + 1 + 1)
    bookkeeping = 4 * 7  # ROI, target weight, network's share and noise of each voxel
    assert adapter.n_numbers == of_readouts + of_rois + fields + path + bookkeeping
    adapter.population = PopulationPath(7, 11, 2)
    population = 11 * (2 + 1 + 2) + 7 * 2  # two numbers name a landmark; its mean and factors; the voxels' weights
    assert adapter.n_numbers == of_readouts + of_rois + fields + path + bookkeeping + population


def test_an_adapter_of_16000_voxels_has_at_most_two_million_numbers_in_recipe_base():
    model = EncodingModel(TokenShape(depth=4, patch=256, width=384), recipe_named("base").backbone, {})
    assert model.add_subject("subj01", torch.arange(16_000) // 30).n_numbers <= 2_000_000


def test_a_population_path_adds_at_most_a_million_numbers_to_an_adapter_of_16000_voxels():
    path = PopulationPath(16_000, N_LANDMARKS, RANK)
    assert sum(buffer.numel() for buffer in path.buffers()) <= 1_000_000
