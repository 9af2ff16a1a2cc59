"""A population's tuning: the second moment of its voxels' weights, without the dense matrix that defines it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foundation.closed_form.tuning import tuning_root
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from tests.tiny_store import TINY_BACKBONE

N_VOXELS = {"subj01": 30, "subj02": 7, "subj05": 12}
RANK = 3


@pytest.fixture
def model() -> EncodingModel:
    """A model whose first two subjects have weights in their fields, and whose third has none."""
    torch.manual_seed(0)
    parcels = {name: torch.arange(n) // 4 for name, n in N_VOXELS.items()}
    config = replace(TINY_BACKBONE, n_linear_field=RANK)
    made = EncodingModel(TokenShape(depth=2, patch=16, width=6), config, parcels)
    for scale, name in enumerate(("subj01", "subj02"), start=1):
        path = made.adapter(name).linear
        for buffer in (path.basis_field, path.weight_field):
            buffer.normal_(0, scale)
    return made.eval()


def dense(model: EncodingModel, subjects: list[str]) -> np.ndarray:
    """The mean over voxels of ``q q'``."""
    paths = [model.adapter(name).linear for name in subjects]
    q = np.concatenate([(path.weight_field @ path.basis_field.T).double().numpy() for path in paths])
    return q.T @ q / len(q)


def scaled(moment: np.ndarray) -> np.ndarray:
    return moment / np.trace(moment)


@pytest.mark.parametrize("subjects", [["subj01"], ["subj02", "subj01"], ["subj01", "subj02", "subj05"]])
def test_the_root_squared_is_the_second_moment_of_all_their_voxels_but_for_its_scale(model, subjects):
    root = tuning_root(model, subjects)
    assert root is not None
    np.testing.assert_allclose(scaled(root @ root.T), scaled(dense(model, subjects)), atol=1e-5)


def test_the_root_has_no_more_columns_than_there_are_directions(model):
    for subjects, rank in ((["subj01"], RANK), (["subj01", "subj02"], 2 * RANK)):
        root = tuning_root(model, subjects)
        assert root is not None
        assert root.shape == (12, rank)


def test_where_a_voxel_looks_and_what_else_it_sees_are_no_part_of_its_tuning(model):
    expected = tuning_root(model, ["subj01"])
    path = model.adapter("subj01").linear
    for buffer in (path.place, path.log_size, path.basis_whole, path.weight_whole, path.bias):
        buffer.uniform_(0.1, 0.9)
    np.testing.assert_array_equal(tuning_root(model, ["subj01"]), expected)


def test_subjects_without_weights_say_nothing(model):
    assert tuning_root(model, ["subj05"]) is None
    assert tuning_root(model, []) is None
