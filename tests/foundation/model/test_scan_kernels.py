"""The scan by mamba-ssm's own Triton kernels, interpreted on the CPU, against the definition and the chunked one."""

import pytest
import torch

from foundation.model.scan import chunked_scan, reference_scan
from tests.foundation.model import triton_shim
from tests.foundation.model.scan_cases import RECIPES, differentiated, largest_errors, recipe_inputs, scan_inputs

SINGLE = torch.float32
CASES = {
    "one chunk": (scan_inputs(16, 0, headdim=16, d_state=16, dtype=SINGLE), 16),
    "a rest": (scan_inputs(37, 1, headdim=16, d_state=16, dtype=SINGLE), 16),
    "wide states": (scan_inputs(50, 2, batch=1, heads=2, headdim=64, d_state=64, dtype=SINGLE), 32),
    **{recipe: (recipe_inputs(recipe), 32) for recipe in RECIPES},
}
# Relative to an array's largest number. Where decays are strong, both lose digits in sums of their logarithms.
TOLERANCE = dict.fromkeys(CASES, 3e-5) | dict.fromkeys(RECIPES, 5e-6)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    if absent := triton_shim.missing():
        pytest.skip(f"{', '.join(absent)} missing; `make test` installs mamba-ssm without its CUDA extension")
    results = triton_shim.run_kernels(list(CASES.values()), tmp_path_factory.mktemp("kernels"))
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_mamba_ssms_kernels_give_the_values_and_gradients_of_the_definition(case, kernels):
    given, _ = CASES[case]
    expected = differentiated(reference_scan, {name: value.double() for name, value in given.items()})
    errors = largest_errors(kernels[case], expected)
    assert max(errors.values()) < TOLERANCE[case], errors


@pytest.mark.parametrize("case", CASES)
def test_the_chunked_scan_gives_the_values_and_gradients_of_mamba_ssms_kernels(case, kernels):
    given, chunk_size = CASES[case]
    errors = largest_errors(differentiated(chunked_scan, given, chunk_size=chunk_size), kernels[case])
    assert max(errors.values()) < TOLERANCE[case], errors
