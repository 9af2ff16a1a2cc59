"""One scan, three ways to compute it; parameters and numbers are the same, so a checkpoint passes between them."""

import importlib
import logging
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foundation.model.scan.chunked import chunked_scan
from foundation.model.scan.kernels import mamba_ssm_scan
from foundation.model.scan.reference import Scanned, reference_scan

Backend = Literal["reference", "chunked", "mamba-ssm"]
_LOG = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


def selective_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    *,
    initial: Float[Tensor, "b h p n"] | None = None,
    backend: str = "auto",
    chunk_size: int = 32,
) -> Scanned:
    """Return the outputs and the final state, from which the scan of what follows can go on.

    Parameters
    ----------
    initial : the state before the first token; None: zero.
    backend : see `chosen_backend`.
    chunk_size : tokens per chunk, which changes speed and memory only; `reference` has none.
    """
    chosen = chosen_backend(backend, x.device.type)
    if chosen == "reference":
        return reference_scan(x, dt, A, B, C, initial=initial)
    scan = chunked_scan if chosen == "chunked" else mamba_ssm_scan
    return scan(x, dt, A, B, C, initial=initial, chunk_size=chunk_size)


@torch.compiler.assume_constant_result
def chosen_backend(backend: str, device: str) -> Backend:
    """Return the backend itself, or for ``auto``: mamba-ssm on a GPU if it can be imported, else chunked; logged once.

    Raises
    ------
    ValueError
        If a backend asked for by name is unknown, not installed, or can't run on this device.
    """
    if backend == "reference" or backend == "chunked":
        return backend
    if backend == "mamba-ssm":
        if device != "cuda":
            raise ValueError(
                f"scan backend 'mamba-ssm' runs on NVIDIA GPUs only, and this tensor is on {device}; "
                "move the model, or set the backend to 'chunked' or 'auto'"
            )
        if reason := _mamba_ssm_is_missing():
            raise ValueError(
                f"scan backend 'mamba-ssm' can't be imported ({reason}); install manybrains[cuda], "
                "or set the backend to 'chunked' or 'auto'"
            )
        return "mamba-ssm"
    if backend != "auto":
        raise ValueError(f"scan backend {backend!r} is unknown; there are auto, reference, chunked and mamba-ssm")
    reason = _mamba_ssm_is_missing() if device == "cuda" else "mamba-ssm needs an NVIDIA GPU"
    chosen = "chunked" if reason else "mamba-ssm"
    if (chosen, device) not in _logged:
        _logged.add((chosen, device))
        _LOG.info("scan backend on %s: %s%s", device, chosen, f" ({reason})" if reason else "")
    return chosen


def _mamba_ssm_is_missing() -> str | None:
    """Return why mamba-ssm can't be imported; None if it can."""
    try:
        importlib.import_module("mamba_ssm")  # first: when it fails, it leaves modules below it that then import
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except ImportError as error:
        return str(error)
    return None
