"""One optimizer step over flat buffers: second moments of matrices or rows, then momentum and weights in a single pass.

With g the gradient of the summed loss, per matrix (or per row of it, where tokens are rows):
    s = mean(g^2);  S = beta S + s;  h = -g / sqrt(S / N)        0 where S is 0; N = beta N + 1 is kept by the caller
    m = m + (1 - beta) (h - m);  W = W (1 - rate * l2) + rate (0.8 m + 0.2 h)
(The rule and its reasons: tscale_fed/optimizer/rule.py.) Nothing is written if any s is not finite; then `bad_matrix` says where.
A bf16 momentum is rounded with dither (dither.py): its steps are smaller than its spacing and would be lost otherwise.

Launches: sums of squares of rows, of blocks of the matrices whose gradient kernels left none, of matrices from these; second moments; the
update of all blocks (flat_blocks.py). Where gradient kernels leave sums, the gradient is read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.dither import mixed_seed, ref_hash
from tscale_kernels.flat_blocks import BLOCK_GROUPS, launch_block_squares, ref_block_squares
from tscale_kernels.launch_table import launch
from tscale_kernels.tiles import capability
from tscale_kernels.update_plan import BLOCK_COLUMNS, MATRIX_COLUMNS, ROW_COLUMNS, UpdateMatrix, UpdatePlan

__all__ = ["ALL_FINITE", "UpdateMatrix", "UpdatePlan", "optimizer_step", "ref_optimizer_step", "step_scalars"]

MOMENTUM_WEIGHT, GRADIENT_WEIGHT = 0.8, 0.2
ALL_FINITE = 2**31 - 1
"""Value of `bad_matrix` while no bad matrix was found."""
MOMENTUM_SALT = 0x6D6F6D


def step_scalars(rate: float, beta: float, count: float, l2: float = 0.0) -> list[float]:
    """What `optimizer_step` reads from its `scalars`: rate, 1 - beta, 1 / N, 1 - rate * l2."""
    return [rate, 1.0 - beta, 1.0 / count, 1.0 - rate * l2]


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
    root = (moment_sums * inverse_count).double().sqrt().to(moment_sums.dtype)
    multipliers = torch.where(root > 0, -root.reciprocal(), 0.0)
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


# -- Triton ------------------------------------------------------------------------------------------------------------

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.dither import hash_u32, load_seed
    from tscale_kernels.flat_blocks import block_offsets, tile_squares

    @triton.jit
    def is_finite(x):  # type: ignore[no-untyped-def]
        """Whether an fp32 is neither infinite nor NaN."""
        return tl.abs(x) <= 3.4028234663852886e38

    @triton.jit
    def row_squares_kernel(  # type: ignore[no-untyped-def]
        gradient, table, mean_squares, bad_matrix, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
    ):
        """Mean squares of BR rows. table int64 [programs, 5]: first element, rows, columns, first moment, matrix."""
        entry = table + tl.program_id(0) * COLUMNS
        rows, columns = tl.load(entry + 1).to(tl.int32), tl.multiple_of(tl.load(entry + 2).to(tl.int32), 128)
        row = tl.arange(0, BR)
        start = gradient + tl.multiple_of(tl.load(entry), 128)
        total = tl.zeros((BR, BC), tl.float32)
        for first in range(0, columns, BC):
            column = first + tl.arange(0, BC)
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            values = tl.load(start + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
            total += values * values
        mean = tl.sum(total, axis=1) / columns.to(tl.float32)
        tl.store(mean_squares + tl.load(entry + 3) + row, mean, mask=row < rows)
        bad = (row < rows) & (is_finite(mean) == 0)
        if tl.max(bad.to(tl.int32), axis=0) > 0:
            tl.atomic_min(bad_matrix, tl.load(entry + 4).to(tl.int32))

    @triton.jit
    def matrix_squares_kernel(  # type: ignore[no-untyped-def]
        table, own_sums, given_sums, mean_squares, bad_matrix, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Mean square of one matrix. table int64 [programs, 6]: 1 if its sums are given, first sum, sums, elements, moment, matrix."""
        entry = table + tl.program_id(0) * COLUMNS
        first, sums = tl.load(entry + 1), tl.load(entry + 2)
        total = tl.zeros((BLOCK,), tl.float64)
        if tl.load(entry) == 1:
            for done in range(0, sums, BLOCK):
                place = done + tl.arange(0, BLOCK)
                total += tl.load(given_sums + first + place, mask=place < sums, other=0.0).to(tl.float64)
        else:
            for done in range(0, sums, BLOCK):
                place = done + tl.arange(0, BLOCK)
                total += tl.load(own_sums + first + place, mask=place < sums, other=0.0)
        mean = (tl.sum(total, axis=0) / tl.load(entry + 3).to(tl.float64)).to(tl.float32)
        tl.store(mean_squares + tl.load(entry + 4), mean)
        if is_finite(mean) == 0:
            tl.atomic_min(bad_matrix, tl.load(entry + 5).to(tl.int32))

    @triton.jit
    def moments_kernel(  # type: ignore[no-untyped-def]
        mean_squares, moment_sums, multipliers, scalars, bad_matrix, moments, FINE: tl.constexpr, BLOCK: tl.constexpr
    ):
        """S and -1 / sqrt(S / N) of BLOCK moments."""
        if tl.load(bad_matrix) == FINE:
            place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            inside = place < moments
            beta = 1.0 - tl.load(scalars + 1)
            sums = tl.load(moment_sums + place, mask=inside, other=0.0) * beta + tl.load(mean_squares + place, mask=inside, other=0.0)
            tl.store(moment_sums + place, sums, mask=inside)
            root = tl.sqrt_rn(sums * tl.load(scalars + 2))
            tl.store(multipliers + place, tl.where(root > 0, tl.div_rn(-1.0, root), 0.0), mask=inside)

    @triton.jit
    def dithered_bf16(values, position, seed):  # type: ignore[no-untyped-def]
        """`_dithered` of fp32 values at int64 positions of the flat buffer."""
        noise = (hash_u32(position.to(tl.uint32) ^ seed) >> 16).to(tl.int32)
        return (((values.to(tl.int32, bitcast=True) + noise) >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)

    @triton.jit
    def update_kernel(  # type: ignore[no-untyped-def]
        weights, momentum, gradient, table, multipliers, scalars, weight_squares, bad_matrix, seed,
        FINE: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, DITHER: tl.constexpr, SALT: tl.constexpr,
        CLEAR: tl.constexpr, SQUARES: tl.constexpr,
    ):  # fmt: skip
        """One block. table int64 [programs, 5]: first element, groups, first group in its matrix, groups per moment, first moment."""
        if tl.load(bad_matrix) == FINE:
            block = tl.program_id(0)
            entry = table + block * COLUMNS
            offsets, mask = block_offsets(table, block, COLUMNS, GROUPS)
            group = tl.load(entry + 2).to(tl.int32) + tl.arange(0, GROUPS)
            moment = tl.load(entry + 4).to(tl.int32) + group // tl.load(entry + 3).to(tl.int32)
            multiplier = tl.load(multipliers + moment[:, None], mask=mask, other=0.0)
            rate, gap, decay = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 3)
            h = tl.load(gradient + offsets, mask=mask, other=0.0) * multiplier
            old = tl.load(momentum + offsets, mask=mask, other=0.0).to(tl.float32)
            new = old + gap * (h - old)
            if DITHER:
                rounded = dithered_bf16(new, offsets, load_seed(seed, SALT))
                tl.store(momentum + offsets, rounded, mask=mask)
            else:
                tl.store(momentum + offsets, new, mask=mask)
            w = tl.load(weights + offsets, mask=mask, other=0.0)
            w = w * decay + (rate * 0.8 * new + rate * 0.2 * h)
            tl.store(weights + offsets, w, mask=mask)
            if CLEAR:
                tl.store(gradient + offsets, tl.zeros_like(w), mask=mask)
            if SQUARES:
                tl.store(weight_squares + block, tile_squares(w, GROUPS))


def _launch_update(
    weights: Tensor, momentum: Tensor, gradient: Tensor, plan: UpdatePlan, scalars: Tensor, moment_sums: Tensor, bad_matrix: Tensor,
    square_sums: Tensor | None, weight_squares: Tensor | None, seed: Tensor | None, clear: bool,
) -> None:  # fmt: skip
    card = capability(weights.device)
    if plan.row_table.shape[0]:
        row_squares_kernel[(plan.row_table.shape[0],)](
            gradient, plan.row_table, plan.mean_squares, bad_matrix, COLUMNS=ROW_COLUMNS, BR=plan.rows_at_once,
            **launch("row_squares", card),
        )  # fmt: skip
    launch_block_squares(gradient, plan.unsummed_table, plan.own_sums, **launch("block_squares", card))
    if plan.matrix_table.shape[0]:
        matrix_squares_kernel[(plan.matrix_table.shape[0],)](
            plan.matrix_table, plan.own_sums, plan.mean_squares if square_sums is None else square_sums, plan.mean_squares, bad_matrix,
            COLUMNS=MATRIX_COLUMNS, BLOCK=512, num_warps=4,
        )  # fmt: skip
    moments_kernel[(triton.cdiv(plan.moments, 512),)](
        plan.mean_squares, moment_sums, plan.multipliers, scalars, bad_matrix, plan.moments, FINE=ALL_FINITE, BLOCK=512, num_warps=4
    )
    update_kernel[(plan.blocks,)](
        weights, momentum, gradient, plan.update_table, plan.multipliers, scalars,
        plan.own_sums if weight_squares is None else weight_squares, bad_matrix, bad_matrix if seed is None else seed, FINE=ALL_FINITE,
        COLUMNS=BLOCK_COLUMNS, GROUPS=BLOCK_GROUPS, DITHER=momentum.dtype == torch.bfloat16, SALT=MOMENTUM_SALT, CLEAR=clear,
        SQUARES=weight_squares is not None, enable_fp_fusion=False, **launch("optimizer_step", card),
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def optimizer_step(
    weights: Tensor, momentum: Tensor, gradient: Tensor, plan: UpdatePlan, *, scalars: Tensor, moment_sums: Tensor, bad_matrix: Tensor,
    square_sums: Tensor | None = None, weight_squares: Tensor | None = None, seed: Tensor | None = None, clear: bool = False,
    backend: BackendName | None = None,
) -> None:  # fmt: skip
    """Update momentum, second moments and weights in place.

    weights, gradient: fp32 [P]. momentum: fp32 or bf16 [P]. scalars: fp32 [4] of `step_scalars`, on the device. moment_sums: fp32
    [plan.moments]. bad_matrix: int32 [1], set to ALL_FINITE by the caller; falls to the index of the first matrix whose sum of squares is
    not finite. If it is not ALL_FINITE then (or was not before), nothing else is written.
    square_sums: fp32, sums of squares that the gradient kernels left (`UpdateMatrix.sums`). weight_squares: fp64 [plan.blocks], gets sums
    of squares of the new weights: those that `pack_weights` takes for the same matrices in the same order. seed: int32 [1], new at each
    step, needed for a bf16 momentum. clear: set the gradient to zero. Raises ValueError where lengths do not match.
    """
    lengths = {weights.numel(), momentum.numel(), gradient.numel()}
    if len(lengths) > 1 or moment_sums.numel() != plan.moments or max(lengths) < plan.end:
        raise ValueError(f"buffers of {sorted(lengths)} elements and {moment_sums.numel()} moments do not fit {plan.end}, {plan.moments}")
    if weight_squares is not None and weight_squares.numel() != plan.blocks:
        raise ValueError(f"weight_squares of {weight_squares.numel()} elements does not fit {plan.blocks} blocks")
    if momentum.dtype == torch.bfloat16 and seed is None:
        raise ValueError("a bf16 momentum needs a seed")
    if square_sums is None and any(matrix.sums is not None for matrix in plan.matrices):
        raise ValueError("the plan expects square sums of gradients")
    if choose(weights.device, backend).name == "triton":
        _launch_update(
            weights, momentum, gradient, plan, scalars, moment_sums, bad_matrix, square_sums, weight_squares, seed, clear
        )  # fmt: skip
    else:
        ref_optimizer_step(
            weights, momentum, gradient, plan, scalars=scalars, moment_sums=moment_sums, bad_matrix=bad_matrix, square_sums=square_sums,
            weight_squares=weight_squares, seed=seed, clear=clear,
        )  # fmt: skip
