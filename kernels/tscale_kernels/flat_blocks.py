"""Blocks of a flat buffer: how one kernel launch covers all matrices of a model, and a sum of squares that is the same on every machine.

A matrix is a span of the flat buffer whose length is a multiple of 128. It is cut in blocks of BLOCK_GROUPS groups of 128 elements (its
last block may be shorter); a table on the device tells program b where block b starts and how long it is.
Sum of squares of a block: x * x in fp32, four neighbours added in pairs in fp32, the quarters added in fp64. A sum of numbers of 24 bits in
fp64 is exact while the largest is below some 2**18 times the smallest that matters, so its order does not show: all machines get the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tscale_kernels.dispatch import has_triton

GROUP = 128
BLOCK_GROUPS = 32
"""Groups of a block: 4096 elements, 16 KiB in fp32."""


class Span(NamedTuple):
    """Elements start to start + elements of the flat buffer."""

    start: int
    elements: int

    @property
    def blocks(self) -> int:
        return -(-self.elements // (GROUP * BLOCK_GROUPS))


def block_table(spans: Sequence[Span]) -> Tensor:
    """int64 [blocks, 3] on the CPU: first element, number of groups, and place of the first group within its span, of every block.

    Raises ValueError for a span that does not consist of groups of 128.
    """
    parts = [torch.empty(0, 3, dtype=torch.int64)]
    for span in spans:
        if span.start % GROUP or span.elements % GROUP:
            raise ValueError(f"elements {span.start} to {span.start + span.elements} of the flat buffer are not groups of {GROUP}")
        first = torch.arange(span.blocks, dtype=torch.int64) * BLOCK_GROUPS
        parts.append(torch.stack((span.start + first * GROUP, (span.elements // GROUP - first).clamp(max=BLOCK_GROUPS), first), 1))
    return torch.cat(parts)


def ref_block_squares(flat: Tensor, spans: Sequence[Span]) -> Tensor:
    """Sum of squares of every block, fp64 [blocks]; flat fp32."""
    sums = [torch.empty(0, dtype=torch.float64, device=flat.device)]
    for span in spans:
        values = flat[span.start : span.start + span.elements]
        pairs = (values * values).view(-1, 2, 2)
        quarters = ((pairs[:, 0, 0] + pairs[:, 0, 1]) + (pairs[:, 1, 0] + pairs[:, 1, 1])).double()
        short = -quarters.numel() % (BLOCK_GROUPS * GROUP // 4)
        sums.append(torch.nn.functional.pad(quarters, (0, short)).view(span.blocks, -1).sum(1))
    return torch.cat(sums)


if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def block_offsets(table, block, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        """(offsets int64 [GROUPS, 128], mask) of a block in the flat buffer; COLUMNS numbers per row of the table."""
        start = tl.multiple_of(tl.load(table + block * COLUMNS), 128)
        groups = tl.load(table + block * COLUMNS + 1)
        group = tl.arange(0, GROUPS)[:, None]
        return start + (group * 128 + tl.arange(0, 128)[None, :]), group < groups

    @triton.jit
    def tile_squares(values, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Sum of squares of an fp32 tile [GROUPS, 128], an fp64 scalar; launch with enable_fp_fusion=False."""
        even, odd = tl.split(tl.reshape(values * values, (GROUPS * 64, 2)))
        first, second = tl.split(tl.reshape(even + odd, (GROUPS * 32, 2)))
        return tl.sum((first + second).to(tl.float64), axis=0)

    @triton.jit
    def block_squares_kernel(flat, table, sums, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`ref_block_squares` of block program_id(0); table int64 [blocks, 3]."""
        offsets, mask = block_offsets(table, tl.program_id(0), 3, GROUPS)
        values = tl.load(flat + offsets, mask=mask, other=0.0)
        tl.store(sums + tl.program_id(0), tile_squares(values, GROUPS))


def launch_block_squares(flat: Tensor, table: Tensor, sums: Tensor, num_warps: int) -> None:
    """sums fp64 [blocks] of flat fp32 [P]; table int64 [blocks, 3] on the same device."""
    if table.shape[0]:
        block_squares_kernel[(table.shape[0],)](flat, table, sums, GROUPS=BLOCK_GROUPS, num_warps=num_warps, enable_fp_fusion=False)
