"""Stacking weights against non-negative least squares."""

import numpy as np
import pytest
from scipy.optimize import nnls

from foundation.closed_form.stacking import stack


@pytest.mark.parametrize("alike", [0.0, 0.9, -0.9], ids="alike {}".format)
def test_stacking_weights_are_those_of_non_negative_least_squares(alike):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((30, 200))
    b = alike * a + rng.standard_normal((30, 200))
    y = rng.normal(size=200) * a + rng.normal(size=200) * b + rng.standard_normal((30, 200)) + 5
    found = stack([a.astype(np.float32), b.astype(np.float32) - 3], y.astype(np.float32))
    for v in range(200):
        design = np.column_stack([m[:, v] - m[:, v].mean() for m in (a, b)])
        np.testing.assert_allclose(found[:, v], nnls(design, y[:, v] - y[:, v].mean())[0], atol=1e-4)
    assert {tuple(row) for row in (found > 0).T.tolist()} == {
        (False, False), (True, False), (False, True), (True, True)
    }  # fmt: skip


def test_stacking_a_prediction_with_itself_is_least_squares():
    a, noise = np.random.default_rng(0).standard_normal((2, 30, 5)).astype(np.float32)
    np.testing.assert_allclose(stack([a, a], a + 0.1 * noise).sum(0), 1, atol=0.1)
    assert (stack([0 * a, 0 * a], noise) == 0).all()
