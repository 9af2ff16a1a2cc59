"""The scan by the Triton kernels of mamba-ssm, which need an NVIDIA GPU; the package is imported when asked for."""

from jaxtyping import Float
from torch import Tensor

from foundation.model.scan.reference import Scanned


def mamba_ssm_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    *,
    initial: Float[Tensor, "b h p n"] | None = None,
    chunk_size: int = 64,
) -> Scanned:
    """Return what `reference_scan` does; `chunk_size` is a power of two."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore

    return mamba_chunk_scan_combined(
        x, dt, A, B[:, :, None], C[:, :, None], chunk_size, initial_states=initial, return_final_states=True
    )
