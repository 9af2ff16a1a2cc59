"""Which backend computes a scan: by name, by `auto`, and what is said and refused."""

import logging
import sys
import types

import pytest
import torch

from foundation.model.scan import backends, chosen_backend, selective_scan
from tests.foundation.model.scan_cases import differentiated, scan_inputs


@pytest.fixture
def forgetful(monkeypatch) -> None:
    """Nothing has been logged yet."""
    monkeypatch.setattr(backends, "_logged", set())


@pytest.fixture
def installed(monkeypatch) -> None:
    """A mamba-ssm that can be imported."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.fixture
def missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.delitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", raising=False)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_a_cpus_backends_give_the_same_values_and_gradients(backend):
    given = scan_inputs(13, seed=0)
    expected = differentiated(selective_scan, given, backend="reference")
    for name, value in differentiated(selective_scan, given, backend=backend, chunk_size=4).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


def test_auto_takes_the_kernels_on_a_gpu_that_has_them(installed):
    assert chosen_backend("auto", "cuda") == "mamba-ssm"
    assert chosen_backend("mamba-ssm", "cuda") == "mamba-ssm"
    assert chosen_backend("auto", "cpu") == "chunked"


def test_auto_says_what_it_chose_and_why_and_says_it_once(forgetful, missing, caplog):
    with caplog.at_level(logging.INFO):
        chosen = [chosen_backend("auto", device) for device in ("cuda", "cuda", "cpu", "cpu")]
    assert chosen == ["chunked"] * 4
    on_gpu, on_cpu = caplog.messages
    assert on_gpu.startswith("scan backend on cuda: chunked (")
    assert "mamba_ssm" in on_gpu
    assert on_cpu == "scan backend on cpu: chunked (mamba-ssm needs an NVIDIA GPU)"


def test_a_backend_by_name_that_is_missing_is_an_error_with_the_remedy(missing):
    with pytest.raises(ValueError, match=r"'mamba-ssm' can't be imported \(.*\); install manybrains\[cuda\]"):
        chosen_backend("mamba-ssm", "cuda")


def test_kernels_asked_for_on_a_cpu_are_an_error_with_the_remedy(installed):
    with pytest.raises(ValueError, match=r"'mamba-ssm' runs on NVIDIA GPUs only, and this tensor is on cpu; move"):
        selective_scan(**scan_inputs(3, seed=0), backend="mamba-ssm")


def test_an_unknown_backend_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'fast' is unknown; there are auto, reference, chunked and mamba-ssm"):
        chosen_backend("fast", "cpu")
