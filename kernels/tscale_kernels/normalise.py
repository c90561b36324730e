"""Group normalisation inside kernels: the epilogue that all forward products share.

In every group of 128 consecutive channels of a row (spec/model.md 2):
    root = sqrt(sum v^2 / 128),   y = v / root   (0 where root is 0)
Codes are `encode(y * scale)`, computed as v * (scale / root): one multiplication per element. A group is one head or one tile of the state,
so it always lies inside one tile of a product.

Exactness: the order of the sum is prescribed, so every backend and card gets the same bits from the same fp32 values. Squares are added by
halves of the group (channel c with c + 64, then with c + 32, c + 16, c + 8), then neighbours; the last four sums are added in fp64, exact
whatever their order (unless one is above 2**27 times another). Halves of a group and neighbours lie in one thread of a product's
accumulator, the last four in neighbouring threads, so the order costs nothing. Root and division are IEEE-rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import has_triton

GROUP_CHANNELS = 128


def ref_normalise(values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """values fp32 [M, N], N a multiple of 128 -> (normalised values times `scale` [M, N], roots [M, N / 128])."""
    groups = values.unflatten(1, (-1, GROUP_CHANNELS))
    root = ieee_sqrt(_sum_in_order(groups * groups) * (1.0 / GROUP_CHANNELS))
    multiplier = torch.where(root > 0, torch.full_like(root, scale) / root, 0.0)  # scalar / tensor would multiply by a reciprocal
    return (groups * multiplier[:, :, None]).flatten(1), root


def ieee_sqrt(x: Tensor) -> Tensor:
    """Correctly rounded root of fp32, as tl.sqrt_rn: torch's own misses by one last bit in every fifth number on some CPUs."""
    return x.double().sqrt().to(x.dtype)


def _sum_in_order(squares: Tensor) -> Tensor:
    """[..., 128] -> [...]"""
    for half in (64, 32, 16, 8):
        squares = squares[..., :half] + squares[..., half:]
    quads = squares[..., 0::2] + squares[..., 1::2]
    return quads.double().sum(-1).to(squares.dtype)


if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _add_halves(values, ROWS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        low, high = tl.split(tl.permute(tl.reshape(values, (ROWS, GROUPS, 2, HALF)), (0, 1, 3, 2)))
        return low + high

    @triton.jit
    def normalise_tile(values, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`ref_normalise` of an fp32 tile -> (normalised [ROWS, COLUMNS], roots [ROWS, COLUMNS / 128])."""
        GROUPS: tl.constexpr = COLUMNS // 128
        groups = tl.reshape(values, (ROWS, GROUPS, 128))
        sums = _add_halves(groups * groups, ROWS, GROUPS, 64)
        sums = _add_halves(sums, ROWS, GROUPS, 32)
        sums = _add_halves(sums, ROWS, GROUPS, 16)
        sums = _add_halves(sums, ROWS, GROUPS, 8)
        even, odd = tl.split(tl.reshape(sums, (ROWS, GROUPS, 4, 2)))
        total = tl.sum((even + odd).to(tl.float64), axis=2).to(tl.float32)
        root = tl.sqrt_rn(total * 0.0078125)
        multiplier = tl.where(root > 0, tl.div_rn(scale, root), 0.0)
        return tl.reshape(groups * multiplier[:, :, None], (ROWS, COLUMNS)), root

    @triton.jit
    def store_roots(rms, root, row, column, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        """rms[(column + 128 g) / 128, row + i] = root[i, g]; rms has `rows` columns."""
        group = column // 128 + tl.arange(0, COLUMNS // 128)
        tl.store(rms + group[None, :].to(tl.int64) * rows + (row + tl.arange(0, ROWS))[:, None], root)
