"""Settings that can't be are refused where they are made, by name."""

import pytest

from foundation.config import BackboneConfig, DataConfig, OptimConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": ()}, r"backbone.streams is \(\); name one at least"),
        ({"streams": ("cls", "cls")}, "backbone.streams is .*each once"),
        ({"streams": ("joint", "cls")}, "joint has the tokens of both, so it stands alone"),
        ({"width": 48, "mixer": "transformer"}, "backbone.width 48 is no multiple of backbone.mamba.headdim 32"),
        ({"decoders": ()}, "backbone.decoders is"),
        ({"scan_orders": ()}, "backbone.scan_orders is"),
        ({"token_budget": 0}, "backbone.token_budget is 0; it must be 1 at least"),
        ({"token_budget": -1}, "backbone.token_budget is -1"),
        ({"linear_grid": 0}, "backbone.linear_grid is 0"),
        ({"n_linear_field": 0}, "backbone.n_linear_field is 0"),
        ({"latent": 0}, "backbone.latent is 0"),
        ({"n_component": 0}, "backbone.n_component is 0"),
        ({"drop_path": 1.5}, "backbone.drop_path is 1.5; it is a share, from 0 to below 1"),
        ({"token_dropout": -0.1}, "backbone.token_dropout is -0.1"),
        (
            {"width": 33},
            "backbone.width 33 times backbone.mamba.expand 2 is 66, no multiple of backbone.mamba.headdim 32",
        ),
    ],
)
def test_a_backbone_that_cant_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**options)


def test_an_order_may_come_twice():
    assert BackboneConfig(scan_orders=("raster", "raster")).scan_orders == ("raster", "raster")


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -1.0])
def test_a_share_of_stage_1_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=f"optim.stage1_share is {share}; it must lie between 0 and 1"):
        OptimConfig(stage1_share=share)


def test_no_sessions_are_refused():
    with pytest.raises(ValueError, match=r"data\.sessions is 0; it must be 1 at least"):
        DataConfig(sessions=0)


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
def test_no_epochs_and_no_images_are_refused(name):
    with pytest.raises(ValueError, match=f"optim.{name} is 0; it must be 1 at least"):
        OptimConfig(**{name: 0})
