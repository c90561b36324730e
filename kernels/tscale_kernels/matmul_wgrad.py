"""Weight gradients: a contraction over all tokens of two transposed code matrices.

    grad[row_map[n], k] (+)= column_unit_g[n] * column_unit_x[k] * factor * sum_t g_t[n, t] * x_t[k, t],       factor = 1 / sqrt(inputs)
One unit per channel on each side, fused in the epilogue: the token scales cancel between the sides (`balance.py`), so nothing is scaled
inside the loop. row_map puts rows in kernel order (rotary pairs, blocked heads) back to their canonical places. For int8 the sum is exact.
square_sums[n / 128, k / 128] is the sum of squares of the final gradient in each block of 128 x 128 (of kernel rows), so that the optimizer
need not read the gradient once more to know its size.
"""

from __future__ import annotations

from torch import Tensor

from tscale_kernels.codes import ref_product
from tscale_kernels.dispatch import BackendName, choose

_BLOCK = 128


def square_sum_count(rows: int, columns: int) -> int:
    """Elements of `square_sums` for a gradient [rows, columns]; row-major over blocks, so joined matrices own consecutive parts."""
    return (rows // _BLOCK) * (columns // _BLOCK)


def workspace_size(rows: int, columns: int) -> int:
    """int32 elements of `workspace` that a gradient [rows, columns] may need."""
    return rows * columns


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_weight_gradient(
    g_t: Tensor, x_t: Tensor, column_unit_g: Tensor, column_unit_x: Tensor,
    *, factor: float, row_map: Tensor | None, grad: Tensor, accumulate: bool, square_sums: Tensor | None, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """See `weight_gradient`."""
    rows = slice(None) if row_map is None else row_map.long()
    result = ref_product(g_t, x_t) * (column_unit_g * factor)[:, None] * column_unit_x
    if accumulate:
        result = grad[rows] + result
    grad[rows] = result
    if square_sums is not None:
        blocks = result.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
        square_sums.copy_(blocks.square().sum((1, 3)).flatten())


# -- run ---------------------------------------------------------------------------------------------------------------


def weight_gradient(
    g_t: Tensor,
    x_t: Tensor,
    column_unit_g: Tensor,
    column_unit_x: Tensor,
    *,
    factor: float,
    row_map: Tensor | None,
    grad: Tensor,
    accumulate: bool,
    square_sums: Tensor | None,
    workspace: Tensor | None,
    backend: BackendName | None = None,
) -> None:
    """Gradient of one matrix (or of joined ones), overwritten or added to.

    g_t: codes [N, M]; x_t: codes [K, M] of the same dtype; column_unit_g: fp32 [N]; column_unit_x: fp32 [K]; factor: 1 / sqrt(inputs).
    row_map: int32 [N], a permutation, or None. grad: fp32 [N, K]. square_sums: fp32 [square_sum_count(N, K)] or None.
    workspace: int32 [>= workspace_size(N, K)], zeroed once by the caller and left zeroed where it counts, shared by all calls of one
    stream; None: the contraction is not split. N, K and M are multiples of 128.
    """
    choose(g_t.device, backend)
    ref_weight_gradient(
        g_t, x_t, column_unit_g, column_unit_x, factor=factor, row_map=row_map, grad=grad, accumulate=accumulate, square_sums=square_sums
    )
