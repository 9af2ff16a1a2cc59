"""Token statistics, pooling of the grid, and that either stream hears of what it should."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from foundation.config import BackboneConfig
from foundation.model.dual_stream import DualStream, Streams, TokenShape, concatenated, pool_grid, scan_order
from tests.tiny_store import TINY_BACKBONE

SHAPE = TokenShape(depth=2, patch=16, width=5)


@pytest.fixture
def streams() -> DualStream:
    torch.manual_seed(0)
    return DualStream(SHAPE, TINY_BACKBONE).eval()


def tiny(**changes) -> BackboneConfig:
    return dataclasses.replace(TINY_BACKBONE, **changes)


def tokens(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 5, generator=made), torch.randn(n, 2, 16, 5, generator=made)


def test_statistics_are_per_depth_and_channel_and_over_images_and_places(streams):
    cls, patch = tokens(50)
    streams.set_statistics([(3 * cls + 1, patch - 2)])
    np.testing.assert_allclose(streams.cls_mean, (3 * cls + 1).numpy().mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(streams.cls_sd, 3 * cls.numpy().std(0), rtol=1e-5)
    np.testing.assert_allclose(streams.patch_mean, (patch - 2).numpy().mean((0, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(streams.patch_sd, patch.numpy().std((0, 2)), rtol=1e-5)


def test_with_statistics_of_the_tokens_their_scale_and_offset_do_not_matter(streams):
    cls, patch = tokens(50)
    streams.set_statistics([(cls, patch)])
    expected = streams(cls, patch)
    streams.set_statistics([(7 * cls - 3, 0.2 * patch + 5)])
    found = streams(7 * cls - 3, 0.2 * patch + 5)
    for name in ("cls", "patch", "gate"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_a_channel_that_never_varies_stays_finite(streams):
    cls, patch = tokens()
    cls[:, 0, 2], patch[:, 1, :, 3] = 4.0, -1.0
    streams.set_statistics([(cls, patch)])
    found = streams(cls, patch)
    assert torch.isfinite(found.cls).all()
    assert torch.isfinite(found.patch).all()


def test_the_cls_stream_reads_every_depth_and_no_patch_and_the_patch_stream_every_place_and_no_cls(streams):
    cls, patch = (t.requires_grad_() for t in tokens(1))
    found = streams(cls, patch)
    of_cls, of_patch = torch.autograd.grad(found.cls.sum(), [cls, patch], retain_graph=True, allow_unused=True)
    assert of_patch is None
    assert (of_cls.abs().sum(-1) > 0).all()
    of_cls, of_patch = torch.autograd.grad(found.patch[0, 5].sum(), [cls, patch], allow_unused=True)
    assert of_cls is None
    assert (of_patch.abs().sum(-1) > 0).all()


def test_images_do_not_see_each_other(streams):
    cls, patch = tokens()
    whole, alone = streams(cls, patch), streams(cls[3:4], patch[3:4])
    for name in ("cls", "patch", "gate", "summary"):
        torch.testing.assert_close(getattr(whole[3:4], name), getattr(alone, name), rtol=1e-4, atol=1e-5)
    assert len(whole[torch.tensor([0, 2])]) == 2


def test_a_grid_that_is_not_square_is_an_error():
    with pytest.raises(ValueError, match="15 patches are not a square grid"):
        DualStream(TokenShape(depth=1, patch=15, width=5), TINY_BACKBONE)


@pytest.mark.parametrize(("stream", "absent"), [("cls", "patch"), ("patch", "cls")])
def test_a_stream_alone_is_what_it_is_beside_the_other_which_gives_zeros_and_has_no_parameter(streams, stream, absent):
    alone = DualStream(SHAPE, tiny(streams=(stream,))).eval()
    alone.load_state_dict({key: streams.state_dict()[key] for key in alone.state_dict()})
    assert not [name for name, _ in alone.named_parameters() if name.startswith((f"{absent}_", "gate"))]
    found, both = alone(*tokens()), streams(*tokens())
    torch.testing.assert_close(getattr(found, stream), getattr(both, stream), rtol=0, atol=0)
    torch.testing.assert_close(getattr(found, absent), torch.zeros_like(getattr(both, absent)))


@pytest.mark.parametrize("stream", ["cls", "patch"])
def test_with_the_last_depth_alone_a_stream_is_deaf_to_the_others(stream):
    torch.manual_seed(0)
    deaf = DualStream(SHAPE, tiny(**{f"{stream}_depths": "last"})).eval()
    given = [t.requires_grad_() for t in tokens(1)]
    heard = torch.autograd.grad(getattr(deaf(*given), stream).sum(), given, allow_unused=True)[stream == "patch"]
    assert (heard[:, 0] == 0).all()
    assert (heard[:, 1] != 0).any()


@pytest.mark.parametrize(("side", "n_cells"), [(4, 2), (6, 3), (6, 1), (8, 4)])
def test_pooled_cells_that_divide_the_grid_keep_the_mean_and_are_means_of_their_own_patches(side, n_cells):
    patch = torch.randn(2, 3, side**2, 5)
    found = pool_grid(patch, n_cells)
    torch.testing.assert_close(found.mean(2), patch.mean(2))
    size = side // n_cells
    first_of_last_row = patch.view(2, 3, side, side, 5)[:, :, size * (n_cells - 1) :, :size].mean((2, 3))
    torch.testing.assert_close(found[:, :, n_cells * (n_cells - 1)], first_of_last_row)


@pytest.mark.parametrize(("side", "n_cells"), [(5, 2), (7, 3), (16, 6), (6, 3)])
def test_pooling_is_torchs_adaptive_average_whether_or_not_cells_divide_the_grid(side, n_cells):
    patch = torch.randn(2, 3, side**2, 5)
    for depth in range(3):
        images = patch[:, depth].mT.unflatten(-1, (side, side))
        expected = F.adaptive_avg_pool2d(images, n_cells).flatten(2).mT
        torch.testing.assert_close(pool_grid(patch, n_cells)[:, depth], expected)


@pytest.mark.parametrize("n_cells", [4, 9])
def test_a_grid_no_finer_than_the_cells_stays_as_it_is(n_cells):
    patch = torch.randn(2, 3, 16, 5)
    assert pool_grid(patch, n_cells) is patch


def test_a_token_budget_is_a_model_of_the_coarser_grid_given_pooled_tokens():
    torch.manual_seed(0)
    budget = DualStream(SHAPE, tiny(token_budget=2)).eval()
    coarse = DualStream(TokenShape(depth=2, patch=4, width=5), TINY_BACKBONE).eval()
    cls, patch = tokens(50)
    budget.set_statistics([(cls, patch)])
    coarse.load_state_dict(budget.state_dict())
    found, expected = budget(cls, patch), coarse(cls, pool_grid(patch, 2))
    assert budget.side == 2
    for name in ("cls", "patch", "gate"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)


def test_a_token_budget_beyond_the_grid_changes_nothing(streams):
    wide = DualStream(SHAPE, tiny(token_budget=9)).eval()
    wide.load_state_dict(streams.state_dict())
    torch.testing.assert_close(wide(*tokens()).patch, streams(*tokens()).patch, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("order", "path"),
    [
        ("raster", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("reversed", [8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ("column", [0, 3, 6, 1, 4, 7, 2, 5, 8]),
        ("column-reversed", [8, 5, 2, 7, 4, 1, 6, 3, 0]),
    ],
)
def test_a_scan_order_visits_the_grid_as_it_says(order, path):
    assert scan_order(order, 3).tolist() == path


def test_a_gate_of_the_image_is_one_number():
    torch.manual_seed(0)
    assert DualStream(SHAPE, tiny(gate="image")).eval()(*tokens()).gate.shape == (6, 1)


def test_the_summary_is_the_cls_stream_beside_the_mean_of_the_patch_stream(streams):
    found = streams(*tokens())
    expected = np.concatenate([found.cls.detach(), found.patch.detach().numpy().mean(1)], axis=1)
    np.testing.assert_allclose(found.summary.detach(), expected, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_put_together_again_are_the_batch(streams):
    whole = streams(*tokens())
    again = concatenated([whole[0:2], whole[2:2], whole[2:6]])
    for name in ("cls", "patch", "gate"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert isinstance(again, Streams)


@pytest.mark.parametrize("kind", ["dropout", "token_dropout", "drop_path"])
def test_what_is_dropped_in_training_is_not_in_evaluation(kind):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "token_dropout": 0.0, "drop_path": 0.0} | {kind: 0.5}
    dropping = DualStream(SHAPE, tiny(**options))
    outputs = {mode: [dropping.train(mode)(*tokens()).patch for _ in range(2)] for mode in (True, False)}
    assert not torch.allclose(*outputs[True], atol=1e-3)
    assert torch.equal(*outputs[False])
