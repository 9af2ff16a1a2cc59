"""Settings that can't be are refused where they are made, by name."""

import pytest

from foundation.config import BackboneConfig, OptimConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": ()}, r"backbone.streams is \(\); name one at least"),
        ({"streams": ("cls", "cls")}, "backbone.streams is .*each once"),
        ({"decoders": ()}, "backbone.decoders is"),
        ({"scan_orders": ()}, "backbone.scan_orders is"),
        ({"token_budget": 0}, "backbone.token_budget is 0; it must be 1 at least"),
        ({"token_budget": -1}, "backbone.token_budget is -1"),
        ({"linear_grid": 0}, "backbone.linear_grid is 0"),
        ({"n_linear_field": 0}, "backbone.n_linear_field is 0"),
        ({"latent": 0}, "backbone.latent is 0"),
        ({"n_component": 0}, "backbone.n_component is 0"),
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
