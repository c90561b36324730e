"""Derivative of the group normalisation over full rows, for the final layer, whose product is made elsewhere (`head.py`).

dx += normalise'(d_n) = (d_n - y * mean(y d_n)) / rms   over groups of 128 channels, y = code / vector_scale;   row_max[t] = max |dx[t]|
"""

from __future__ import annotations

from torch import Tensor

from tscale_kernels import launch_table, tiles
from tscale_kernels.codes import vector_scale
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.matmul_dgrad import ref_through_norm

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_through_norm_add_rows(d_n: Tensor, *, n: Tensor, rms: Tensor, dx: Tensor, row_max: Tensor) -> None:
    """See `through_norm_add_rows`."""
    dx.copy_(dx.float() + ref_through_norm(d_n.float(), n, rms))
    row_max.copy_(dx.float().abs().amax(1))


# -- Triton ------------------------------------------------------------------------------------------------------------

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.matmul_dgrad import through_norm_tile

    @triton.jit
    def through_norm_add_rows_kernel(d_n, n, rms, dx, row_max, rows, width, code_unit, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """ROWS whole rows, a group of 128 channels at a time. All arguments but the sizes are pointers."""
        row = tl.program_id(0) * ROWS
        own_rows = row + tl.arange(0, ROWS)
        ones = tl.full((ROWS,), 1.0, tl.float32)
        largest = tl.zeros((ROWS,), tl.int32)
        for column in range(0, width, 128):
            at = own_rows[:, None].to(tl.int64) * width + column + tl.arange(0, 128)[None, :]
            codes = tl.load(n + at).to(tl.float32)
            d = through_norm_tile(tl.load(d_n + at).to(tl.float32), codes, ones, rms, row, column, rows, code_unit, ROWS, 128)
            new = (tl.load(dx + at).to(tl.float32) + d).to(dx.dtype.element_ty)
            tl.store(dx + at, new)
            # Bits of floats >= 0 compare as the floats do, and a NaN is above all.
            bits = new.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            largest = tl.maximum(largest, tl.max(bits, axis=1))
        tl.store(row_max + own_rows, largest.to(tl.float32, bitcast=True))


def _launch(d_n: Tensor, *, n: Tensor, rms: Tensor, dx: Tensor, row_max: Tensor) -> None:
    rows, width = dx.shape
    config = launch_table.launch("through_norm_add_rows", tiles.capability(dx.device))
    count = config.pop("BR")
    code_unit = 1.0 / vector_scale(n.dtype)
    through_norm_add_rows_kernel[(rows // count,)](
        d_n, n, rms, dx, row_max, rows, width, code_unit, ROWS=count, enable_fp_fusion=False, **config
    )


# -- run ---------------------------------------------------------------------------------------------------------------


def through_norm_add_rows(d_n: Tensor, *, n: Tensor, rms: Tensor, dx: Tensor, row_max: Tensor, backend: BackendName | None = None) -> None:
    """dx += normalise'(d_n) in place, row_max overwritten.

    d_n: bf16 or fp32 [M, E]; n: codes [M, E]; rms: fp32 [E / 128, M]; dx: fp32 or bf16 [M, E]; row_max: fp32 [M]. M and E are multiples of
    128.
    """
    run = _launch if choose(d_n.device, backend).name == "triton" else ref_through_norm_add_rows
    run(d_n, n=n, rms=rms, dx=dx, row_max=row_max)
