"""Weight gradients: a contraction over all tokens of two transposed code matrices.

    grad[row_map[n], k] (+)= column_unit_g[n] * column_unit_x[k] * factor * sum_t g_t[n, t] * x_t[k, t],       factor = 1 / sqrt(inputs)
One unit per channel on each side, fused in the epilogue: the token scales cancel between the sides (`balance.py`), so nothing is scaled
inside the loop. row_map puts rows in kernel order (rotary pairs, blocked heads) back to their canonical places. For int8 the sum is exact.
square_sums[n / 128, k / 128] is the sum of squares of the final gradient in each block of 128 x 128 (of kernel rows), so that the optimizer
need not read the gradient once more to know its size.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tscale_kernels import launch_table, tiles
from tscale_kernels.codes import ref_product
from tscale_kernels.dispatch import BackendName, choose, has_triton

_BLOCK = 128
_MOST_PARTS = 4
"""Of a contraction: each part costs a pass over the workspace."""
_PROGRAMS_PER_PROCESSOR = 2
_INTERPRETER_PROGRAMS = 4
"""As many as make the small matrices of tests split."""


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


# -- Triton ------------------------------------------------------------------------------------------------------------
# Few output tiles (a matrix of 2560 x 1280 has 200, an H100 holds 264 at once) leave processors idle, so their contraction is split: parts
# add into a workspace, a second kernel makes the gradient of it. Two parts at most for fp8 and bf16, as 0 + a + b has one result only.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.tiles import product_tile, tile_position

    @triton.jit
    def finish_tile(  # type: ignore[no-untyped-def]
        sums, unit_g, unit_x, row_map, grad, square_sums, row, column, columns, factor,
        BR: tl.constexpr, BC: tl.constexpr, ACCUMULATE: tl.constexpr,
    ):  # fmt: skip
        """Sums (fp32) of a tile -> grad, and the sums of its squares."""
        rows = row + tl.arange(0, BR)
        at_column = column + tl.arange(0, BC)
        result = sums * (tl.load(unit_g + rows) * factor)[:, None] * tl.load(unit_x + at_column)[None, :]
        to_row = rows if row_map is None else tl.load(row_map + rows)
        at = grad + to_row.to(tl.int64)[:, None] * columns + at_column[None, :]
        if ACCUMULATE:
            result = tl.load(at) + result
        tl.store(at, result)
        if square_sums is not None:
            blocks = tl.reshape(result * result, (BR // 128, 128, BC // 128, 128))
            totals = tl.sum(tl.sum(blocks, axis=3), axis=1)
            block_row = row // 128 + tl.arange(0, BR // 128)
            block_column = column // 128 + tl.arange(0, BC // 128)
            tl.store(square_sums + block_row[:, None] * (columns // 128) + block_column[None, :], totals)

    @triton.jit
    def weight_gradient_kernel(  # type: ignore[no-untyped-def]
        g_t, x_t, unit_g, unit_x, row_map, grad, square_sums, workspace, row_tiles, column_tiles, tokens, columns, factor,
        ACC: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr, ACCUMULATE: tl.constexpr,
        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Tile program_id(0), part program_id(1) of SPLIT of the contraction. g_t, x_t are operands (tiles.py), the rest pointers."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row = row_tile * BR
        column = column_tile * BC
        blocks = tokens // BK
        first = tl.program_id(1) * blocks // SPLIT
        after = (tl.program_id(1) + 1) * blocks // SPLIT
        sums = product_tile(g_t, x_t, row, column, first * BK, after - first, tokens, tokens, BR, BC, BK, ACC, TMA)
        if SPLIT == 1:
            finish_tile(
                sums.to(tl.float32), unit_g, unit_x, row_map, grad, square_sums, row, column, columns, factor, BR, BC, ACCUMULATE
            )
        else:
            at = (row + tl.arange(0, BR)).to(tl.int64)[:, None] * columns + column + tl.arange(0, BC)[None, :]
            tl.atomic_add(workspace + at, sums, sem="relaxed")

    @triton.jit
    def finish_kernel(  # type: ignore[no-untyped-def]
        unit_g, unit_x, row_map, grad, square_sums, workspace, column_tiles, columns, factor, ACCUMULATE: tl.constexpr
    ):
        """One block of 128 x 128 of the workspace, which is left zeroed."""
        row = tl.program_id(0) // column_tiles * 128
        column = tl.program_id(0) % column_tiles * 128
        at = workspace + (row + tl.arange(0, 128)).to(tl.int64)[:, None] * columns + column + tl.arange(0, 128)[None, :]
        sums = tl.load(at)
        tl.store(at, tl.zeros_like(sums))
        finish_tile(sums.to(tl.float32), unit_g, unit_x, row_map, grad, square_sums, row, column, columns, factor, 128, 128, ACCUMULATE)


@cache
def programs_at_once(device: torch.device) -> int:
    """How many programs a card runs side by side."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def parts_of(tiles_in_all: int, parts_allowed: int, slots: int) -> int:
    """Into how many parts to split the contraction: enough that the last round of programs is a small part of the whole."""
    parts = 1
    while parts < parts_allowed and tiles_in_all * parts < slots:
        parts *= 2
    return parts


def _launch(
    g_t: Tensor, x_t: Tensor, column_unit_g: Tensor, column_unit_x: Tensor,
    *, factor: float, row_map: Tensor | None, grad: Tensor, accumulate: bool, square_sums: Tensor | None, workspace: Tensor | None,
) -> None:  # fmt: skip
    (rows, tokens), columns = g_t.shape, x_t.shape[0]
    config = launch_table.launch("weight_gradient", tiles.capability(g_t.device), g_t.dtype)
    config = launch_table.fitted(config, BR=rows, BC=columns, BK=tokens)
    row_tiles, column_tiles = rows // config["BR"], columns // config["BC"]
    allowed = 1 if workspace is None else _MOST_PARTS if g_t.dtype == torch.int8 else min(_MOST_PARTS, 2)
    split = parts_of(row_tiles * column_tiles, allowed, programs_at_once(g_t.device))
    space = None if workspace is None else workspace if g_t.dtype == torch.int8 else workspace.view(torch.float32)
    tma = tiles.uses_tma(g_t.device)
    weight_gradient_kernel[(row_tiles * column_tiles, split)](
        tiles.operand(g_t, config["BR"], config["BK"], tma), tiles.operand(x_t, config["BC"], config["BK"], tma),
        column_unit_g, column_unit_x, row_map, grad, square_sums, space, row_tiles, column_tiles, tokens, columns, factor,
        ACC=tiles.accumulator(g_t.dtype), TMA=tma, SPLIT=split, ACCUMULATE=accumulate, enable_fp_fusion=False, **config,
    )  # fmt: skip
    if split > 1:
        blocks = columns // _BLOCK
        finish_kernel[(rows // _BLOCK * blocks,)](
            column_unit_g, column_unit_x, row_map, grad, square_sums, space, blocks, columns, factor,
            ACCUMULATE=accumulate, enable_fp_fusion=False, num_warps=8,
        )  # fmt: skip


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
    run = _launch if choose(g_t.device, backend).name == "triton" else ref_weight_gradient
    run(
        g_t, x_t, column_unit_g, column_unit_x, factor=factor, row_map=row_map, grad=grad, accumulate=accumulate,
        square_sums=square_sums, workspace=workspace,
    )  # fmt: skip
