"""What a subject owns: closed forms of its readouts, and its size."""

import numpy as np
import pytest
import torch

from foundation.config import BackboneConfig
from foundation.model.adapter import Adapter
from foundation.model.dual_stream import Streams, gaussian_field
from tests.tiny_store import TINY_BACKBONE

PARCEL = torch.tensor([0, 0, 1, 2, 1, 2, 2])


@pytest.fixture
def adapter() -> Adapter:
    """An adapter whose every number differs from its neutral start."""
    torch.manual_seed(0)
    made = Adapter(PARCEL, 4, TINY_BACKBONE)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return made


def test_an_roi_target_is_the_mean_of_its_voxels(adapter):
    responses = torch.randn(5, 7)
    expected = np.stack([responses[:, roi == PARCEL].mean(1) for roi in range(3)], axis=1)
    np.testing.assert_allclose(adapter.roi_means(responses), expected, rtol=1e-5, atol=1e-6)


def test_roi_values_are_both_streams_readouts_mixed_by_the_gate(adapter):
    width, n_gate = TINY_BACKBONE.width, TINY_BACKBONE.n_gate
    streams = Streams(cls=torch.randn(3, width), patch=torch.randn(3, 16, width), gate=torch.randn(3, n_gate))
    found = adapter.roi_values(streams)
    field = gaussian_field(adapter.roi_place, adapter.roi_log_size, 4)
    for b in range(3):
        for k in range(3):
            what = streams.cls[b] @ adapter.roi_cls[k] + adapter.roi_bias[0, k]
            where = field[k] @ streams.patch[b] @ adapter.roi_patch[k] + adapter.roi_bias[1, k]
            share = torch.sigmoid(streams.gate[b] @ adapter.roi_gate[k] + adapter.roi_gate_bias[k])
            torch.testing.assert_close(found.value[b, k], share * what + (1 - share) * where)


def test_local_readout_is_roi_value_plus_receptive_field_plus_residual(adapter):
    roi, local, residual = torch.randn(2, 3), torch.randn(2, 16, 3), torch.randn(2, 3, 2)
    found = adapter.local(roi, local, residual)
    field = gaussian_field(adapter.voxel_place, adapter.voxel_log_size, 4)
    for v, k in enumerate(PARCEL):
        seen = field[v] @ local[1] @ adapter.voxel_local[v]
        expected = roi[1, k] + seen + residual[1, k] @ adapter.voxel_residual[v]
        torch.testing.assert_close(found[1, v], expected)


def test_holistic_readout_is_linear_in_the_components(adapter):
    components = torch.randn(2, TINY_BACKBONE.n_component)
    expected = components @ adapter.voxel_component.T + adapter.voxel_bias
    torch.testing.assert_close(adapter.holistic(components), expected)


def test_the_default_adapter_of_16000_voxels_has_at_most_two_million_numbers():
    parcel = torch.arange(16_000) // 30
    adapter = Adapter(parcel, 16, BackboneConfig())
    assert sum(parameter.numel() for parameter in adapter.parameters()) <= 2_000_000


def test_a_fresh_adapter_gates_both_streams_alike(adapter):
    fresh = Adapter(PARCEL, 4, TINY_BACKBONE)
    width = TINY_BACKBONE.width
    streams = Streams(cls=torch.randn(3, width), patch=torch.randn(3, 16, width), gate=torch.randn(3, 3))
    torch.testing.assert_close(fresh.roi_values(streams).share, torch.full((3, 3), 0.5))
    assert (fresh.n_voxel, fresh.n_roi) == (7, 3)
