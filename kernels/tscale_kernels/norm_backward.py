"""Derivative of the group normalisation over full rows, for the final layer, whose product is made elsewhere (`head.py`).

dx += normalise'(d_n) = (d_n - y * mean(y d_n)) / rms   over groups of 128 channels, y = code / vector_scale;   row_max[t] = max |dx[t]|
"""

from __future__ import annotations

from torch import Tensor

from tscale_kernels.dispatch import BackendName, choose
from tscale_kernels.matmul_dgrad import ref_through_norm

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_through_norm_add_rows(d_n: Tensor, *, n: Tensor, rms: Tensor, dx: Tensor, row_max: Tensor) -> None:
    """See `through_norm_add_rows`."""
    dx.copy_(dx.float() + ref_through_norm(d_n.float(), n, rms))
    row_max.copy_(dx.float().abs().amax(1))


# -- run ---------------------------------------------------------------------------------------------------------------


def through_norm_add_rows(d_n: Tensor, *, n: Tensor, rms: Tensor, dx: Tensor, row_max: Tensor, backend: BackendName | None = None) -> None:
    """dx += normalise'(d_n) in place, row_max overwritten.

    d_n: bf16 or fp32 [M, E]; n: codes [M, E]; rms: fp32 [E / 128, M]; dx: fp32 or bf16 [M, E]; row_max: fp32 [M]. E is a multiple of 128.
    """
    choose(d_n.device, backend)
    ref_through_norm_add_rows(d_n, n=n, rms=rms, dx=dx, row_max=row_max)
