"""Group normalisation inside kernels: the epilogue that all forward products share.

In every group of 128 consecutive channels of a row (spec/model.md 2):
    root = sqrt(sum v^2 / 128),   y = v / root   (0 where root is 0)
Codes are `encode(y * scale)`, computed as v * (scale / root): one multiplication per element. A group is one head or one tile of the state,
so it always lies inside one tile of a product.

The division and the root are IEEE-rounded everywhere; the sum's order is the backend's own, so roots differ by some 1e-7 and a code can
differ by one where a value lies at a rounding boundary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import has_triton

GROUP_CHANNELS = 128


def ref_normalise(values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """values fp32 [M, N], N a multiple of 128 -> (normalised values times `scale` [M, N], roots [M, N / 128])."""
    groups = values.unflatten(1, (-1, GROUP_CHANNELS))
    root = groups.square().mean(2).sqrt()
    multiplier = torch.where(root > 0, scale / root, 0.0)
    return (groups * multiplier[:, :, None]).flatten(1), root


if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def normalise_tile(values, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`ref_normalise` of an fp32 tile -> (normalised [ROWS, COLUMNS], roots [ROWS, COLUMNS / 128])."""
        groups = tl.reshape(values, (ROWS, COLUMNS // 128, 128))
        root = tl.sqrt_rn(tl.sum(groups * groups, axis=2) * 0.0078125)
        multiplier = tl.where(root > 0, tl.div_rn(scale, root), 0.0)
        return tl.reshape(groups * multiplier[:, :, None], (ROWS, COLUMNS)), root
