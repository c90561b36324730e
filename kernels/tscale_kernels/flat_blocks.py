"""Blocks of a flat buffer: how one kernel launch covers all matrices of a model, and a sum of squares that is the same on every machine.

A matrix is a span of the flat buffer whose length is a multiple of 128. It is cut in blocks of BLOCK_GROUPS groups of 128 elements (its last
block may be shorter); a table on the device tells program b where block b starts and how long it is.
Sum of squares of a block: x * x in fp32, four neighbours added in pairs in fp32, the quarters added in fp64. A sum of numbers of 24 bits in fp64
is exact while the largest is below 2**19 times the smallest that matters, so its order does not show, and the result is the same everywhere.
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


def block_table(spans: Sequence[Span], device: torch.device | str) -> Tensor:
    """int64 [blocks, 2] on `device`: first element and groups of every block, in the order of the spans. Raises ValueError for odd lengths."""
    parts = []
    for span in spans:
        if span.elements % GROUP:
            raise ValueError(f"a matrix of {span.elements} elements cannot be cut in groups of {GROUP}")
        first = torch.arange(span.blocks, dtype=torch.int64) * BLOCK_GROUPS
        parts.append(torch.stack((span.start + first * GROUP, (span.elements // GROUP - first).clamp(max=BLOCK_GROUPS)), 1))
    return torch.cat(parts or [torch.empty(0, 2, dtype=torch.int64)]).to(device)


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
    def tile_squares(values, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Sum of squares of an fp32 tile [ROWS, 128], fp64 scalar; launch with enable_fp_fusion=False."""
        even, odd = tl.split(tl.reshape(values * values, (ROWS * 64, 2)))
        first, second = tl.split(tl.reshape(even + odd, (ROWS * 32, 2)))
        return tl.sum((first + second).to(tl.float64), axis=0)
