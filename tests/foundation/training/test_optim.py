"""The schedule's closed form, and what is decayed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foundation.config import OptimConfig
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.optim import build_optimiser, learning_rate, parameter_groups, set_rates, stage_at, stage_of
from tests.tiny_store import TINY_BACKBONE

CONFIG = OptimConfig(lr=0.02, warmup=0.1, weight_decay=0.05)


@pytest.fixture
def model() -> EncodingModel:
    return EncodingModel(TokenShape(depth=2, patch=4, width=5), TINY_BACKBONE, {"subj01": torch.arange(9) // 3})


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    rates = [learning_rate(step, 100, CONFIG) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 0.02 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 0.01 * (1 + np.cos(np.pi * np.arange(90) / 90)))


@given(n_steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_the_rate_is_always_positive_and_never_above_the_highest(n_steps, warmup):
    config = OptimConfig(lr=0.02, warmup=warmup)
    rates = np.array([learning_rate(step, n_steps, config) for step in range(n_steps)])
    assert (rates > 0).all()
    assert math.isclose(rates.max(), 0.02)
    assert (np.diff(rates[rates.argmax() :]) <= 0).all()


def test_every_parameter_is_in_one_group(model):
    grouped = [id(p) for group in build_optimiser(model, CONFIG).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_only_weight_matrices_decay(model):
    named = dict(model.named_parameters())
    decayed = {id(p) for group in parameter_groups(named, CONFIG) for p in group["params"] if group["weight_decay"]}
    names = {name for name, parameter in named.items() if id(parameter) in decayed}
    expected = {"weight", "roi_cls", "roi_patch", "roi_gate", "voxel_component", "voxel_local", "voxel_residual"}
    assert {name.rsplit(".", 1)[-1] for name in names} == expected
    assert all("norm" not in name for name in names)
    free = {name.rsplit(".", 1)[-1] for name in named.keys() - names}
    assert free >= {"bias", "roi_bias", "voxel_bias", "dt_bias", "A_log", "D", "place", "log_size", "queries"}


def test_the_first_share_of_the_steps_is_stage_1s_and_without_a_share_both_train():
    staged = replace(CONFIG, stage1_share=0.3)
    assert [stage_at(step, 10, staged) for step in range(10)] == 3 * ["stage1"] + 7 * ["stage2"]
    assert {stage_at(step, 10, CONFIG) for step in range(10)} == {None}


def test_stage_1_owns_the_streams_and_what_reads_rois_from_them_and_stage_2_the_rest(model):
    named = dict(model.named_parameters())
    first = {name for name in named if stage_of(name) == "stage1"}
    assert first > {name for name in named if name.startswith("streams.")}
    of_subject = {name.split(".", 2)[2] for name in first if name.startswith("adapters.")}
    assert of_subject == {
        "roi_cls", "roi_patch", "roi_bias", "roi_gate", "roi_gate_bias", "roi_field.place", "roi_field.log_size",
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["stage1", "stage2", None])
def test_a_stage_that_rests_has_no_rate(model, stage):
    groups = build_optimiser(model, CONFIG).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    set_rates(groups, 0.5, stage)
    for group in groups:
        stages = {stage_of(names[id(parameter)]) for parameter in group["params"]}
        assert group["lr"] == (0.5 if stage is None or stages == {stage} else 0)
        assert len(stages) == 1
