"""One optimizer step over flat buffers: second moments of matrices or rows, then momentum and weights in a single pass.

With g the gradient of the summed loss, per matrix (or per row of it, where tokens are rows):
    s = mean(g^2);  S = beta S + s;  h = -g / sqrt(S / N)        0 where S is 0; N = beta N + 1 is kept by the caller
    m = m + (1 - beta) (h - m);  W = W (1 - rate * l2) + rate (0.8 m + 0.2 h)
(The rule and its reasons: tscale_fed/optimizer/rule.py.) Nothing is written if any s is not finite; then `bad_matrix` says where.
A bf16 momentum is rounded with dither (dither.py): its steps are smaller than its spacing and would be lost otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_kernels.dispatch import BackendName
from tscale_kernels.dither import mixed_seed, ref_hash
from tscale_kernels.flat_blocks import GROUP, Span, ref_block_squares

MOMENTUM_WEIGHT, GRADIENT_WEIGHT = 0.8, 0.2
ALL_FINITE = 2**31 - 1
"""Value of `bad_matrix` while no bad matrix was found."""
MOMENTUM_SALT = 0x6D6F6D


def step_scalars(rate: float, beta: float, count: float, l2: float = 0.0) -> list[float]:
    """What `optimizer_step` reads from its `scalars`: rate, 1 - beta, 1 / N, 1 - rate * l2."""
    return [rate, 1.0 - beta, 1.0 / count, 1.0 - rate * l2]


@dataclass(frozen=True)
class UpdateMatrix:
    """One matrix: flat[start : start + rows * columns], columns a multiple of 128.

    per_row   one second moment per row instead of one in all
    sums      (first, count) of its part of `square_sums`, if the gradient kernel leaves sums of squares; None: the gradient is read once more
    """

    start: int
    rows: int
    columns: int
    per_row: bool = False
    sums: tuple[int, int] | None = None

    @property
    def span(self) -> Span:
        return Span(self.start, self.rows * self.columns)


class UpdatePlan:
    """Tables and scratch of a list of matrices on `device`.

    moments   length of `moment_sums`: matrices and rows, in order
    blocks    length of `weight_squares`: blocks of all matrices, in order (flat_blocks.py)
    Raises ValueError for columns that are not multiples of 128, and for sums of a matrix with per_row.
    """

    def __init__(self, matrices: Sequence[UpdateMatrix], device: torch.device | str) -> None:
        self.matrices = list(matrices)
        for index, matrix in enumerate(self.matrices):
            if matrix.columns % GROUP or (matrix.per_row and matrix.sums is not None):
                raise ValueError(f"matrix {index} of {matrix.rows} x {matrix.columns}: columns must be a multiple of {GROUP}, rows have no given sums")
        self.moment_starts, self.moments = [], 0
        for matrix in self.matrices:
            self.moment_starts.append(self.moments)
            self.moments += matrix.rows if matrix.per_row else 1
        self.blocks = sum(matrix.span.blocks for matrix in self.matrices)
        self.mean_squares = torch.zeros(self.moments, device=device)

    def moments_of(self, moments: Tensor, index: int) -> Tensor:
        """View [rows] or [1] of matrix `index` in a tensor of `moments` elements."""
        start = self.moment_starts[index]
        return moments[start : start + (self.matrices[index].rows if self.matrices[index].per_row else 1)]


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_optimizer_step(
    weights: Tensor, momentum: Tensor, gradient: Tensor, plan: UpdatePlan, *, scalars: Tensor, moment_sums: Tensor, bad_matrix: Tensor,
    square_sums: Tensor | None = None, weight_squares: Tensor | None = None, seed: Tensor | None = None, clear: bool = False,
) -> None:  # fmt: skip
    """See `optimizer_step`."""
    rate, gap, inverse_count, decay = scalars.unbind()
    for index, matrix in enumerate(plan.matrices):
        g = gradient[matrix.start : matrix.start + matrix.rows * matrix.columns].view(matrix.rows, matrix.columns)
        if matrix.sums is not None and square_sums is not None:
            mean = square_sums[matrix.sums[0] : sum(matrix.sums)].double().sum().view(1) / g.numel()
        else:
            mean = g.double().square().mean(1) if matrix.per_row else g.double().square().mean().view(1)
        plan.moments_of(plan.mean_squares, index).copy_(mean)
        if not bool(plan.moments_of(plan.mean_squares, index).isfinite().all()):
            bad_matrix.clamp_(max=index)
    if int(bad_matrix) != ALL_FINITE:
        return
    moment_sums.mul_(1.0 - gap).add_(plan.mean_squares)
    multipliers = torch.where(moment_sums > 0, -torch.rsqrt(moment_sums * inverse_count), 0.0)
    for index, matrix in enumerate(plan.matrices):
        part = slice(matrix.start, matrix.start + matrix.rows * matrix.columns)
        h = (gradient[part].view(matrix.rows, matrix.columns) * plan.moments_of(multipliers, index)[:, None]).flatten()
        old = momentum[part].to(h.dtype)
        new = old + gap * (h - old)
        momentum[part] = _dithered(new, matrix.start, seed) if momentum.dtype == torch.bfloat16 else new
        weights[part] = weights[part] * decay + (rate * MOMENTUM_WEIGHT * new + rate * GRADIENT_WEIGHT * h)
    if clear:
        gradient.zero_()
    if weight_squares is not None:
        weight_squares.copy_(ref_block_squares(weights, [matrix.span for matrix in plan.matrices]))


def _dithered(values: Tensor, start: int, seed: Tensor | None) -> Tensor:
    """fp32 [n], standing at start in the flat buffer -> bf16: the low 16 bits are rounded away, up with the probability of their share."""
    if seed is None:
        raise ValueError("a bf16 momentum needs a seed")
    position = torch.arange(start, start + values.numel(), dtype=torch.int64, device=values.device) & 0xFFFFFFFF
    noise = ref_hash(position ^ mixed_seed(seed, MOMENTUM_SALT)) >> 16
    return (((values.view(torch.int32).to(torch.int64) + noise) >> 16) << 16).to(torch.int32).view(torch.float32).to(torch.bfloat16)


# -- run ---------------------------------------------------------------------------------------------------------------


def optimizer_step(
    weights: Tensor, momentum: Tensor, gradient: Tensor, plan: UpdatePlan, *, scalars: Tensor, moment_sums: Tensor, bad_matrix: Tensor,
    square_sums: Tensor | None = None, weight_squares: Tensor | None = None, seed: Tensor | None = None, clear: bool = False,
    backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Update momentum, second moments and weights in place.

    weights, gradient: fp32 [P]. momentum: fp32 or bf16 [P]. scalars: fp32 [4] of `step_scalars`, on the device. moment_sums: fp32 [plan.moments].
    bad_matrix: int32 [1], set to ALL_FINITE by the caller; falls to the index of the first matrix whose sum is not finite, and then, as when it
    is lower before, nothing else is written. square_sums: fp32, sums of squares that the gradient kernels left (`UpdateMatrix.sums`).
    weight_squares: fp64 [plan.blocks], gets sums of squares of the new weights: the sums that `pack_weights` takes for the same matrices in the
    same order. seed: int32 [1], new at each step, needed for a bf16 momentum. clear: set the gradient to zero.
    Raises ValueError where lengths do not match.
    """
    if not weights.numel() == momentum.numel() == gradient.numel() or moment_sums.numel() != plan.moments:
        raise ValueError(f"buffers of {weights.numel()}, {momentum.numel()}, {gradient.numel()} elements, moments {moment_sums.numel()} do not match")
    if weight_squares is not None and weight_squares.numel() != plan.blocks:
        raise ValueError(f"weight_squares of {weight_squares.numel()} elements does not fit {plan.blocks} blocks")
    if momentum.dtype == torch.bfloat16 and seed is None:
        raise ValueError("a bf16 momentum needs a seed")
    if any(matrix.sums is not None for matrix in plan.matrices) and square_sums is None:
        raise ValueError("the plan expects square sums of gradients")
    ref_optimizer_step(
        weights, momentum, gradient, plan, scalars=scalars, moment_sums=moment_sums, bad_matrix=bad_matrix, square_sums=square_sums,
        weight_squares=weight_squares, seed=seed, clear=clear,
    )  # fmt: skip
