"""The selective state-space scan of Mamba-2 (Dao & Gu 2024, "Transformers are SSMs", eqs. 1 and 16).

For each head, with a scalar decay::

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T          y_t = h_t C_t

Legend: b batch, l length, h heads, p head width, n state size. `A` is negative, `dt` positive (after softplus). One
group: `B` and `C` are shared by the heads. `selective_scan` is the one to call.
"""

from foundation.model.scan.backends import Backend, chosen_backend, selective_scan
from foundation.model.scan.chunked import chunked_scan
from foundation.model.scan.kernels import mamba_ssm_scan
from foundation.model.scan.reference import Scanned, reference_scan
