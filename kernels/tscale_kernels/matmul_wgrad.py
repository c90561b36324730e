"""Weight gradients: a contraction over all tokens of two transposed code matrices.

    grad[row_map[n], k] (+)= column_unit_g[n] * column_unit_x[k] * factor * sum_t g_t[n, t] * x_t[k, t],       factor = 1 / sqrt(inputs)
One unit per channel on each side, fused in the epilogue: the token scales cancel between the sides (`balance.py`), so nothing is scaled
inside the loop. row_map puts rows in kernel order (rotary pairs, blocked heads) back to their canonical places. For int8 the sum is exact.
square_sums[n / 128, k / 128] is the sum of squares of the final gradient in each block of 128 x 128 (of kernel rows), so that the optimizer
need not read the gradient once more to know its size.

An H100 runs 264 tiles of 128 x 128 at once, so the last wave of 800 (10240 x 1280) would be 8 tiles that take as long as 264, and 200 tiles
(2560 x 1280) leave a quarter of the places empty. The contraction of the tiles that do not fill a wave is therefore split (`split_of`):
every part leaves its sums in the workspace, and the one that comes last adds all of them, in their order, and goes on. Sums of int8 do not
depend on the split; others are the same in every run on one kind of card.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tscale_kernels import launch_table, tiles
from tscale_kernels.codes import ref_product
from tscale_kernels.dispatch import BackendName, choose, has_triton

_BLOCK = 128
_LARGEST_SPLIT = 8
_MOST_PARTS = 1024
"""Parts of 128 x 128 sums that a workspace holds at most: 64 MiB, of the order of an H100's cache."""
_MOST_TILES = 1024
"""Counters of arrived parts at the start of the workspace, one for each tile that is split."""
_COST_OF_A_PART = 0.02
"""Of the time of a tile: a further part is stored and loaded once more (guess)."""
_INTERPRETER_PROCESSORS = 3
"""Few, so that the small matrices of tests have tiles of both kinds."""


def square_sum_count(rows: int, columns: int) -> int:
    """Elements of `square_sums` for a gradient [rows, columns]; row-major over blocks, so joined matrices own consecutive parts."""
    return (rows // _BLOCK) * (columns // _BLOCK)


def workspace_size(rows: int, columns: int) -> int:
    """int32 elements of `workspace` for a gradient [rows, columns]; with fewer, it may be split less than would be best."""
    return _MOST_TILES + min(_MOST_PARTS, square_sum_count(rows, columns) * _LARGEST_SPLIT) * _BLOCK * _BLOCK


def split_of(count: int, places: int, largest: int, room: int) -> tuple[int, int]:
    """(tiles made by one program each, parts of every other tile) of `count` tiles on a card that runs `places` programs at once.

    Full waves are not split. What remains is cut in the number of parts, at most `largest` and `room` in all, that should end first."""
    alone = count // places * places
    remain = count - alone
    if remain == 0 or remain > _MOST_TILES:
        return count, 1
    allowed = [parts for parts in range(1, largest + 1) if parts == 1 or remain * parts <= room]
    parts = min(allowed, key=lambda parts: -(-remain * parts // places) / parts + _COST_OF_A_PART * (parts - 1))
    return (alone, parts) if parts > 1 else (count, 1)


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
    def arrive(sums, workspace, tile, part, parts, BR: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
        """Leaves the sums of one part of a tile in the workspace. (whether it was the last part to come, the sums of all if so)."""
        counter = workspace + tile
        within = tl.arange(0, BR)[:, None] * BC + tl.arange(0, BC)[None, :]
        first = workspace + 1024 + tile.to(tl.int64) * parts * (BR * BC)  # _MOST_TILES
        tl.store(first + part * (BR * BC) + within, sums.to(tl.int32, bitcast=True))
        tl.debug_barrier()  # every thread has stored before one of them says so
        last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if last:
            sums = tl.load(first + within, cache_modifier=".cg").to(ACC, bitcast=True)
            for other in range(1, parts):
                sums += tl.load(first + other * (BR * BC) + within, cache_modifier=".cg").to(ACC, bitcast=True)
            tl.store(counter, 0)
        return last, sums

    @triton.jit(do_not_specialize=["alone", "parts"])
    def weight_gradient_kernel(  # type: ignore[no-untyped-def]
        g_t, x_t, unit_g, unit_x, row_map, grad, square_sums, workspace, row_tiles, column_tiles, tokens, columns, factor, alone, parts,
        ACC: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr, ACCUMULATE: tl.constexpr,
        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Programs below `alone` make a whole tile, those behind one of `parts` parts of a tile. g_t, x_t are operands (tiles.py), the rest
        pointers."""
        tile = tl.program_id(0)
        part = 0
        if SPLIT:
            behind = tile - alone
            if behind >= 0:
                tile = alone + behind // parts
                part = behind % parts
            else:
                parts = 1
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * BR
        column = column_tile * BC
        blocks = tokens // BK
        if SPLIT:
            first = part * blocks // parts
            blocks = (part + 1) * blocks // parts - first
            sums = product_tile(g_t, x_t, row, column, first * BK, blocks, tokens, tokens, BR, BC, BK, ACC, TMA)
            complete = True
            if parts > 1:
                complete, sums = arrive(sums, workspace, tile - alone, part, parts, BR, BC, ACC)
            if complete:
                finish_tile(
                    sums.to(tl.float32), unit_g, unit_x, row_map, grad, square_sums, row, column, columns, factor, BR, BC, ACCUMULATE
                )
        else:
            sums = product_tile(g_t, x_t, row, column, 0, blocks, tokens, tokens, BR, BC, BK, ACC, TMA)
            finish_tile(sums.to(tl.float32), unit_g, unit_x, row_map, grad, square_sums, row, column, columns, factor, BR, BC, ACCUMULATE)


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a card."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    g_t: Tensor, x_t: Tensor, column_unit_g: Tensor, column_unit_x: Tensor,
    *, factor: float, row_map: Tensor | None, grad: Tensor, accumulate: bool, square_sums: Tensor | None, workspace: Tensor | None,
) -> None:  # fmt: skip
    (rows, tokens), columns = g_t.shape, x_t.shape[0]
    config = launch_table.launch("weight_gradient", tiles.capability(g_t.device), g_t.dtype)
    config = launch_table.fitted(config, BR=rows, BC=columns, BK=tokens)
    places, largest = config.pop("PROGRAMS") * processors_of(g_t.device), config.pop("SPLIT")
    row_tiles, column_tiles = rows // config["BR"], columns // config["BC"]
    room = 0 if workspace is None else (workspace.numel() - _MOST_TILES) // (config["BR"] * config["BC"])
    alone, parts = split_of(row_tiles * column_tiles, places, largest, room)
    tma = tiles.uses_tma(g_t.device)
    weight_gradient_kernel[(alone + (row_tiles * column_tiles - alone) * parts,)](
        tiles.operand(g_t, config["BR"], config["BK"], tma), tiles.operand(x_t, config["BC"], config["BK"], tma),
        column_unit_g, column_unit_x, row_map, grad, square_sums, workspace, row_tiles, column_tiles, tokens, columns, factor, alone, parts,
        ACC=tiles.accumulator(g_t.dtype), TMA=tma, SPLIT=parts > 1, ACCUMULATE=accumulate, enable_fp_fusion=False, **config,
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
    workspace: int32, of workspace_size(N, K) or another size, zeroed once by the caller (its counters are left zero), shared by all calls
    of one stream; None: the contraction is not split. N, K and M are multiples of 128.
    """
    run = _launch if choose(g_t.device, backend).name == "triton" else ref_weight_gradient
    run(
        g_t, x_t, column_unit_g, column_unit_x, factor=factor, row_map=row_map, grad=grad, accumulate=accumulate,
        square_sums=square_sums, workspace=workspace,
    )  # fmt: skip
