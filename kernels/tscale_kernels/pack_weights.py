"""Packing: the fp32 weights of a whole model to codes, transposed codes and units, in the order that the matrix kernels read.

    unit = sqrt(mean of W^2) / weight_scale             one per matrix, or per segment of a joined matrix (query, key, gate, value)
    codes[r, c] = encode(W[row_map[r], column_map[c]] * (1 / unit))         0 where the unit is 0
    transposed codes[c, r] = codes[r, c]
Every step from the weights to the codes is one fp32 operation with one rounding, and the mean is a sum that has no order (flat_blocks.py),
so all machines make the same codes of the same weights.

Four launches pack a model, whatever its depth: sums of squares of blocks, units, tiles of matrices whose columns keep their order, tiles of
the others (pack_plan.py has the tables). A tile is 128 x 128: so both the codes and their transposed copy are written in whole lines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.codes import encode, weight_scale
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.flat_blocks import launch_block_squares, ref_block_squares
from tscale_kernels.launch_table import launch
from tscale_kernels.pack_plan import TILE, TILE_COLUMNS, PackMatrix, PackPlan
from tscale_kernels.tiles import capability

__all__ = ["PackMatrix", "PackPlan", "pack_weights", "ref_pack_weights"]

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_pack_weights(
    flat: Tensor, plan: PackPlan, *, codes: Tensor, codes_t: Tensor, units: Tensor, square_sums: Tensor, sums_known: bool = False
) -> None:
    """See `pack_weights`."""
    if not sums_known:
        square_sums.copy_(ref_block_squares(flat, plan.spans))
    first = 0
    for index, span in enumerate(plan.spans):
        total = square_sums[first : first + span.blocks].sum().float()
        mean = total / torch.full_like(total, span.elements)  # a plain number as divisor would be multiplied by its inverse
        root = mean.double().sqrt().float()  # torch's own fp32 root on the CPU is not rounded to nearest
        units[index] = root * (1.0 / weight_scale(codes.dtype))
        first += span.blocks
    for index, matrix in enumerate(plan.matrices):
        unit = plan.units_of(units, index)
        inverse = torch.where(unit > 0, 1.0 / unit, 0.0).repeat_interleave(matrix.rows // matrix.segments)
        weights = flat[matrix.start : matrix.start + matrix.rows * matrix.columns].view(matrix.rows, matrix.columns)
        if matrix.row_map is not None:
            weights = weights[matrix.row_map.to(flat.device)]
        if matrix.column_map is not None:
            weights = weights[:, matrix.column_map.to(flat.device)]
        packed = plan.codes_of(codes, index)
        packed[: matrix.rows] = encode(weights * inverse[:, None], codes.dtype)
        packed[matrix.rows :].zero_()
        if matrix.transposed:
            plan.transposed_of(codes_t, index).copy_(packed.T)


# -- Triton ------------------------------------------------------------------------------------------------------------

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import encode_tile

    @triton.jit
    def units_kernel(sums, segments, units, INVERSE_SCALE: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
        """units[u] of segment u = program_id(0); segments int64 [units, 3]: first block, blocks, elements."""
        segment = tl.program_id(0)
        first, blocks = tl.load(segments + segment * 3), tl.load(segments + segment * 3 + 1)
        total = tl.zeros((BLOCKS,), tl.float64)
        for done in range(0, blocks, BLOCKS):
            block = done + tl.arange(0, BLOCKS)
            total += tl.load(sums + first + block, mask=block < blocks, other=0.0)
        elements = tl.load(segments + segment * 3 + 2).to(tl.float32)
        mean = tl.div_rn(tl.sum(total, axis=0).to(tl.float32), elements)
        tl.store(units + segment, tl.sqrt_rn(mean) * INVERSE_SCALE)

    @triton.jit
    def pack_kernel(  # type: ignore[no-untyped-def]
        flat, codes, codes_t, units, tiles, row_maps, column_maps,
        BR: tl.constexpr, TABLE: tl.constexpr, MAPPED: tl.constexpr, RUN: tl.constexpr,
    ):  # fmt: skip
        """BR rows of a tile of 128 columns; two programs share a tile if BR = 64. The numbers of a tile: see PackPlan.

        MAPPED: columns are read and written in the order of `column_maps`; aligned runs of RUN columns are written to consecutive places.
        """
        parts: tl.constexpr = 128 // BR
        entry = tiles + (tl.program_id(0) // parts) * TABLE
        first_row = tl.load(entry + 1).to(tl.int32) + (tl.program_id(0) % parts) * BR
        first_column = tl.multiple_of(tl.load(entry + 2).to(tl.int32), 128)
        columns = tl.multiple_of(tl.load(entry + 3).to(tl.int32), 128)
        rows, padded_rows = tl.load(entry + 4).to(tl.int32), tl.multiple_of(tl.load(entry + 5).to(tl.int32), 128)
        row_map, transposed_start = tl.load(entry + 7), tl.load(entry + 9)
        unit = tl.load(units + tl.load(entry + 6))
        w = flat + tl.multiple_of(tl.load(entry), 128)
        codes += tl.multiple_of(tl.load(entry + 8), 128)

        place = tl.multiple_of(first_row, BR) + tl.arange(0, BR)
        slot = first_column + tl.arange(0, 128)
        row, source, target = place, slot, slot
        if row_map >= 0:
            row = tl.load(row_maps + row_map + place, mask=place < rows, other=0)
        if MAPPED:
            order = column_maps + tl.load(entry + 10) + slot
            source = tl.load(order)
            target = tl.max_contiguous(tl.multiple_of(tl.load(order + columns), RUN), RUN)
        values = tl.load(w + row[:, None] * columns + source[None, :], mask=(place < rows)[:, None], other=0.0)
        inverse = tl.where(unit > 0, tl.div_rn(1.0, unit), 0.0)
        packed = encode_tile(values * inverse, codes.dtype.element_ty)
        tl.store(codes + place[:, None] * columns + target[None, :], packed)
        if transposed_start >= 0:
            codes_t += tl.multiple_of(transposed_start, 128)
            tl.store(codes_t + target[:, None] * padded_rows + place[None, :], tl.trans(packed))


def _launch_pack(
    flat: Tensor, plan: PackPlan, codes: Tensor, codes_t: Tensor, units: Tensor, square_sums: Tensor, sums_known: bool
) -> None:
    card = capability(flat.device)
    if not sums_known:
        launch_block_squares(flat, plan.block_table, square_sums, **launch("block_squares", card))
    if plan.units:
        units_kernel[(plan.units,)](
            square_sums, plan.segment_table, units, INVERSE_SCALE=1.0 / weight_scale(codes.dtype), BLOCKS=128, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    config = launch("pack_weights", card, codes.dtype)
    for tiles, mapped in ((plan.plain_tiles, False), (plan.mapped_tiles, True)):
        if tiles.shape[0]:
            pack_kernel[(tiles.shape[0] * (TILE // config["BR"]),)](
                flat, codes, codes_t, units, tiles, plan.row_maps, plan.column_maps,
                TABLE=TILE_COLUMNS, MAPPED=mapped, RUN=plan.run, enable_fp_fusion=False, **config,
            )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def pack_weights(
    flat: Tensor, plan: PackPlan, *, codes: Tensor, codes_t: Tensor, units: Tensor, square_sums: Tensor, sums_known: bool = False,
    backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Pack all matrices of the plan.

    flat: fp32 [P]. codes: code dtype [plan.elements]. codes_t: same dtype [plan.transposed_elements]. units: fp32 [plan.units].
    square_sums: fp64 [plan.blocks], sums of squares of the plan's blocks: written, or with sums_known=True read (`optimizer_step` leaves
    them, which saves a pass over the weights; wrong as soon as somebody else changes a weight).
    Raises ValueError where lengths do not match.
    """
    lengths = (codes.numel(), codes_t.numel(), units.numel(), square_sums.numel())
    wanted = (plan.elements, plan.transposed_elements, plan.units, plan.blocks)
    if lengths != wanted or codes.dtype != codes_t.dtype:
        raise ValueError(f"codes, transposed codes, units and square sums have {lengths} elements, the plan {wanted}")
    if choose(flat.device, backend).name == "triton":
        _launch_pack(flat, plan, codes, codes_t, units, square_sums, sums_known)
    else:
        ref_pack_weights(flat, plan, codes=codes, codes_t=codes_t, units=units, square_sums=square_sums, sums_known=sums_known)
