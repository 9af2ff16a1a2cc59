"""What may stand in for Mamba-2 in the streams' blocks, and one joint stream in the place of two."""

from typing import get_args

import pytest
import torch

from foundation.config import BackboneConfig, Mixer
from foundation.model.encoding_model import EncodingModel
from foundation.model.mamba import MambaStack
from foundation.model.mixers import make_mixer
from foundation.recipes import RECIPES
from tests.foundation.model.small_model import ROWS, made_with, tokens
from tests.tiny_store import TINY_BACKBONE

MIXERS: tuple[Mixer, ...] = get_args(Mixer)
SUBJECT = "subj05"


def joint(mixer: Mixer, **changes) -> EncodingModel:
    return made_with(streams=("joint",), mixer=mixer, **changes)


def predicted(model: EncodingModel, cls: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.predict(cls, patch, SUBJECT)


@pytest.mark.parametrize("streams", [("joint",), ("cls", "patch")], ids=["joint", "dual"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_of_any_mixer_learns_and_each_of_its_parameters_has_a_gradient(mixer, streams):
    model = made_with(streams=streams, mixer=mixer).train()
    cls, patch = tokens()
    targets = {name: torch.randn(rows.stop - rows.start, model.adapter(name).n_voxel) for name, rows in ROWS.items()}
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        output = model(cls, patch, ROWS)
        loss = sum((output.subjects[name].voxel - targets[name]).square().mean() for name in ROWS)
        assert isinstance(loss, torch.Tensor)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    without = [name for name, p in model.streams.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if not name.startswith(("align", "gate"))] == []


@pytest.mark.parametrize("order", ["raster", "reversed"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_joint_stream_hears_of_every_global_token_and_of_every_patch_in_any_order(mixer, order):
    model, (cls, patch) = joint(mixer, scan_orders=(order,)), tokens()
    with torch.no_grad():
        before = model.streams(cls, patch).patch
        for depth in range(cls.shape[1]):
            other = cls.clone()
            other[:, depth] += 1
            change = (model.streams(other, patch).patch - before).abs().amax((0, 2))
            assert change.min() > 1e-6  # heard of at every patch
    for place in range(patch.shape[2]):
        other = patch.clone()
        other[:, :, place] += 1
        assert (predicted(model, cls, other) - predicted(model, cls, patch)).abs().max() > 1e-6


@pytest.mark.parametrize("mixer", ["transformer", "mlp"])
def test_what_does_not_scan_does_not_depend_on_the_order_of_the_scan(mixer):
    cls, patch = tokens()
    found = [predicted(joint(mixer, scan_orders=(order,)), cls, patch) for order in ("raster", "column-reversed")]
    torch.testing.assert_close(*found)


def test_a_recurrent_mixer_hears_of_what_came_before_and_of_nothing_after():
    torch.manual_seed(0)
    mixer, sequence = make_mixer("gru", 8, TINY_BACKBONE.mamba), torch.randn(1, 6, 8)
    other = sequence.clone()
    other[:, 3] += 1
    change = (mixer(other) - mixer(sequence)).abs().amax((0, 2))
    assert not change[:3].any()
    assert change[3:].all()


def test_a_joint_stream_leaves_the_cls_branch_at_zero_and_gives_it_no_share():
    model, (cls, patch) = joint("mamba"), tokens()
    streams = model.streams(cls, patch)
    assert not streams.cls.any()
    assert not model.adapter(SUBJECT).roi_values(streams).share.any()


def test_blocks_of_mamba_are_the_same_whether_made_by_name_or_by_default():
    stacks = []
    for make in (None, lambda: make_mixer("mamba", 8, TINY_BACKBONE.mamba)):
        torch.manual_seed(0)
        stacks.append(MambaStack(8, 2, TINY_BACKBONE.mamba, make=make).state_dict())
    torch.testing.assert_close(*stacks, rtol=0, atol=0)


def test_padding_is_refused_by_mixers_that_know_of_none():
    stack = MambaStack(8, 1, TINY_BACKBONE.mamba, make=lambda: make_mixer("mlp", 8, TINY_BACKBONE.mamba))
    with pytest.raises(TypeError):
        stack(torch.randn(2, 3, 8), real=torch.ones(2, 3, dtype=torch.bool))


def test_the_single_stream_recipes_have_numbers_of_parameters_within_a_factor_of_two():
    def n_parameters(config: BackboneConfig) -> int:
        blocks = (make_mixer(config.mixer, config.width, config.mamba) for _ in range(config.n_patch_layer))
        return sum(p.numel() for block in blocks for p in block.parameters())

    found = [n_parameters(RECIPES[f"single-{mixer}"].backbone) for mixer in MIXERS]
    assert max(found) < 2 * min(found)
