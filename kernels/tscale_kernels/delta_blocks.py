"""Blocks of values with one integer step each: what the deltas of 8 and of 4 bits share.

Enters: fp32 values of a displacement in row-major order, cut into blocks (the last may be shorter). Leaves: codes and steps.
With the author's coefficient c, u = 2**unit_exponent and codes -L..L:
    step_b = ceil(max|d_b| * c / u / L)     at least 1; then rounded up to 11 significant bits
    code_x = round(d_x * c / u / step_b)    to the nearest even, within -L..L
    step_b = 0                              if all codes of the block are 0, so that a delta of zeros has one spelling
Rounding the step up means that no code clips: the remainder is at most half a step. Steps are those of the 16-bit code in `delta_onebit`.
All of it is exact maxima, single fp32 products and quotients, and integer rounding: the same on every backend and device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_kernels import limits
from tscale_kernels.delta_onebit import bit_length


@dataclass(frozen=True, slots=True)
class Grid:
    """values: in a block. largest_code: L. max_step: in units; L times it stays within limits.max_step."""

    values: int
    largest_code: int
    max_step: int

    def blocks(self, size: int) -> int:
        """Blocks of a matrix of `size` values: the number of its steps."""
        return -(-size // self.values)

    @property
    def most_units(self) -> float:
        """Where the largest magnitude of a block, in units, is cut off: a displacement beyond it is a diverged run."""
        return float(self.largest_code * self.max_step)

    def encode(self, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """values: fp32 [blocks, self.values]. scale: c / u. Returns codes fp32 of that shape and steps int32 [blocks]; -1 if the
        block holds NaN or infinite values."""
        peak = values.abs().amax(dim=1)
        units = (peak * scale).clamp(max=self.most_units)
        found = torch.ceil(units * (1.0 / self.largest_code)).clamp(min=1.0)
        finite = torch.isfinite(peak)
        step = _round_up(torch.where(finite, found, torch.ones_like(found)).to(torch.int32))
        inverse = step.float().reciprocal()
        codes = values.mul(scale).mul_(inverse[:, None]).clamp_(-self.largest_code, self.largest_code).round_()
        step = torch.where(codes.abs().amax(dim=1) > 0, step, torch.zeros_like(step))  # six times as fast as any()
        return codes, torch.where(finite, step, -torch.ones_like(step))

    def whole(self, flat: Tensor) -> Tensor:
        """[blocks, self.values], filled up with zeros."""
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.values)).view(-1, self.values)

    def add_products(self, target: Tensor, codes: Tensor, amounts: Tensor) -> None:
        """target[x] += codes[x] * amounts[block of x], in place. target, codes: flat, of one length; amounts: target's dtype."""
        values = self.whole(codes.to(target.dtype)).mul_(amounts[:, None]).view(-1)
        target.add_(values[: target.numel()])


def passes(flat: Tensor) -> list[tuple[int, int]]:
    """(first, last) of slices of whole blocks: of a size that stays in a CPU's cache, elsewhere everything at once."""
    size = flat.numel()
    each = limits.cpu_block_elements if flat.device.type == "cpu" else max(1, size)
    return [(first, min(size, first + each)) for first in range(0, size, each)]


def scale_of(coefficient: float, unit_exponent: int) -> float:
    """c / u: weight units to units of the grid."""
    return coefficient * 2.0**-unit_exponent


def kernel_size(matrix: Tensor) -> int:
    """Values of a matrix that a Triton kernel can take. Raises ValueError for another dtype or a matrix with gaps."""
    if not matrix.is_contiguous() or matrix.dtype not in (torch.float32, torch.int32):
        raise ValueError(f"the triton backend needs contiguous fp32 or int32, not {matrix.dtype} with strides {matrix.stride()}")
    return matrix.numel()


def _round_up(steps: Tensor) -> Tensor:
    """The smallest numbers of 11 significant bits that are not below `steps`. int32 in 0..2**24."""
    drop = (bit_length(steps) - limits.step_mantissa_bits).clamp(min=0).to(torch.int32)
    return ((steps + (torch.ones_like(steps) << drop) - 1) >> drop) << drop
