"""Deltas of low rank on an exact grid: two int8 factors and a power of two; encode a displacement, add a decoded delta.

A displacement d [R, C] is written as P [R, r] and Q [C, r], int8, and one exponent e. With the author's coefficient c and
u = 2**unit_exponent:
    sum_xy        = sum over j of P_xj * Q_yj                                an int32, below 2**21 for r <= 128
    decoded delta = sum_xy * 2**e                                            for e >= 0
                    (sum_xy + 2**(-e-1)) >> -e                               for e < 0: rounded to the nearest unit, halves up
an integer multiple of u in both cases. The author gives up that very number, so the rounding stays in its displacement as well.

Encoding (PowerSGD, Vogels et al. 2019): one subspace iteration from the last publication's Q,
    P = orthonormal(d Q_last), rounded to int8;  M = d^T P;  Q = M (P^T P)^-1, the least-squares partner of the rounded P, rounded to int8.
The remainder is checked before it is made: with q = P Q^T, |d - q|^2 < |d|^2 if and only if 2 <M, Q> > <P^T P, Q^T Q>; a delta for which
that fails is sent as zero. So error feedback shrinks d whatever the rounding does, up to the rounding of values to units.

Exactness: `apply` is integer arithmetic alone (the reference multiplies in fp32, where sums below 2**24 are exact in every order).
`encode` runs on the author's side only and in fp32: another backend may find other factors. Receivers never repeat it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tscale_kernels import limits
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.dither import ref_noise

_LARGEST_CODE = 127
_START_SALT = 0x10F


def start(cols: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [C, r]: where the first iteration starts, and what `encode` keeps up to date afterwards (`warm`)."""
    if not 1 <= rank <= limits.max_rank:
        raise ValueError(f"rank {rank} must be between 1 and {limits.max_rank}")
    seed = torch.ones(1, dtype=torch.int32, device=device)
    return (ref_noise(cols, rank, seed, _START_SALT) - 0.5) * math.sqrt(12.0 / cols)


def valid(p: Tensor, q: Tensor, exponent: Tensor) -> Tensor:
    """bool [1], on the device: exponent in range, no code is -128, and a delta of zeros is spelt as one. Shapes as in `apply`."""
    in_range = (exponent >= limits.lowrank_min_exponent) & (exponent <= limits.lowrank_max_exponent)
    codes = (p != -_LARGEST_CODE - 1).all() & (q != -_LARGEST_CODE - 1).all()
    one_zero = ((p == 0).all() == (q == 0).all()) & ((exponent == 0) | (p != 0).any())
    return (in_range & codes & one_zero).reshape(1)


def largest_step(p: Tensor, q: Tensor, exponent: Tensor) -> int:
    """No value of the decoded delta is above this many units: Cauchy-Schwarz over the rows of P and of Q. Shapes as in `apply`."""
    if not p.numel() or not q.numel():
        return 0
    squares = [int(factor.to(torch.int32).square().sum(dim=1).max()) for factor in (p, q)]
    bound = math.isqrt(squares[0] * squares[1]) + 1 if min(squares) else 0
    return bound << int(exponent) if int(exponent) >= 0 else (bound >> -int(exponent)) + 1


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_decode(p: Tensor, q: Tensor, exponent: Tensor) -> Tensor:
    """int32 [R, C]: the delta in units. Shapes as in `apply`."""
    total = (p.float() @ q.float().T).to(torch.int32)
    left, right = exponent.clamp(min=0), (-exponent).clamp(min=0)
    half = (torch.ones_like(right) << right) >> 1
    return ((total << left) + half) >> right


def ref_apply(basepoint: Tensor, p: Tensor, q: Tensor, exponent: Tensor, sign: int = 1) -> None:
    """See `apply`."""
    for first, last in _passes(basepoint):
        basepoint[first:last].add_(ref_decode(p[first:last], q, exponent), alpha=sign)


def ref_leak(displacement: Tensor, p: Tensor, q: Tensor, exponent: Tensor, amount: float) -> None:
    """See `leak`."""
    for first, last in _passes(displacement):
        displacement[first:last].sub_(ref_decode(p[first:last], q, exponent).to(displacement.dtype).mul_(amount))


def _passes(matrix: Tensor) -> list[tuple[int, int]]:
    """(first, last) row of parts that stay in a CPU's cache; elsewhere everything at once."""
    rows, cols = matrix.shape
    each = max(1, limits.cpu_block_elements // max(1, cols)) if matrix.device.type == "cpu" else max(1, rows)
    return [(first, min(rows, first + each)) for first in range(0, rows, each)]


# -- encoding (plain torch on every device: thin matrix products that torch's library does at the speed of memory) -----------------------


def refine(displacement: Tensor, warm: Tensor) -> None:
    """One subspace iteration without factors, in place: a start that knows nothing of the displacement wants one or two before `encode`.

    displacement: fp32 or fp64 [R, C], contiguous. warm: fp32 [C, r]; unchanged if the displacement is zero or not finite.
    """
    d = displacement.float()
    found = (_orthonormal(_unit_peak(_projected(d, warm))).T @ d).T
    peak = _peak(found)
    warm.copy_(torch.where((peak > 0) & torch.isfinite(peak), _unit_peak(found), warm))


def encode(displacement: Tensor, coefficient: float, unit_exponent: int, warm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of one matrix.

    displacement: fp32 or fp64 [R, C], contiguous, any device. coefficient: > 0. warm: fp32 [C, r] from `start`, updated in place.
    Returns p int8 [R, r], q int8 [C, r], exponent int32 [1]. Raises ValueError if a value is not finite.
    """
    p, q, exponent = encode_unchecked(displacement, coefficient, unit_exponent, warm)
    if int(exponent) < limits.lowrank_min_exponent:
        raise ValueError("the displacement holds NaN or infinite values")
    return p, q, exponent


def encode_unchecked(displacement: Tensor, coefficient: float, unit_exponent: int, warm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`encode` without waiting for the device: of a displacement that is not finite the exponent is below the least, for the caller to find
    later; `warm` stays as it was then."""
    d = displacement.float()
    projected = _projected(d, warm)
    p = _rounded(_orthonormal(_unit_peak(projected)))
    products = p.T @ d
    gram = p.T @ p
    q_exact = torch.cholesky_solve(products, _cholesky(gram)).T
    scale = coefficient * 2.0**-unit_exponent
    q, exponent = _second_factor(q_exact, scale)
    unit = torch.exp2(exponent.float()) / scale
    shrinks = 2.0 * (products * q.T).sum() > unit * (gram * (q.T @ q)).sum()
    finite = torch.isfinite(_peak(projected))
    keep = shrinks & (q != 0).any() & finite
    # A direction that the displacement lacked has been lost; a little of the start brings every one of them back.
    fresh = _orthonormal(_unit_peak(q_exact)) + limits.lowrank_fresh * start(warm.shape[0], warm.shape[1], warm.device)
    warm.copy_(torch.where((_peak(q_exact) > 0) & finite, fresh, warm))
    none = torch.zeros((), device=d.device)
    exponent = torch.where(finite, torch.where(keep, exponent, none), none + (limits.lowrank_min_exponent - 1))
    return torch.where(keep, p, none).to(torch.int8), torch.where(keep, q, none).to(torch.int8), exponent.to(torch.int32).reshape(1)


def _projected(d: Tensor, warm: Tensor) -> Tensor:
    """d @ warm [R, r]: written with the long sides last, which torch's CPU library does in a quarter of the time."""
    return (warm.T @ d.T).T


def _orthonormal(columns: Tensor) -> Tensor:
    """Cholesky QR: orthonormal columns of the same span; what is linearly dependent comes out small. fp32 [n, r]."""
    lower = _cholesky(columns.T @ columns)
    return torch.linalg.solve_triangular(lower, columns.T, upper=False).T


def _cholesky(gram: Tensor) -> Tensor:
    """Lower factor of a positive semi-definite [r, r], made definite by a part of its trace."""
    part = limits.lowrank_ridge * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
    return torch.linalg.cholesky_ex(gram + part * torch.eye(len(gram), device=gram.device)).L


def _peak(values: Tensor) -> Tensor:
    """Largest magnitude, 0-dim."""
    return values.abs().amax() if values.numel() else torch.zeros((), device=values.device)


def _unit_peak(values: Tensor) -> Tensor:
    """Scaled to a largest magnitude of 1 (zeros stay), so that squares neither overflow nor vanish."""
    return values / _peak(values).clamp(min=torch.finfo(torch.float32).tiny)


def _rounded(factor: Tensor) -> Tensor:
    """Numbers -127..127 in fp32, proportional to `factor` up to rounding; zeros stay."""
    return (_unit_peak(factor) * _LARGEST_CODE).round()


def _second_factor(exact: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """exact * scale as codes fp32 [C, r] times 2**exponent (fp32 0-dim), the least in range for which no code clips."""
    in_units = exact * scale
    exponent = torch.ceil(torch.log2(_peak(in_units) / _LARGEST_CODE)).clamp(limits.lowrank_min_exponent, limits.lowrank_max_exponent)
    codes = (in_units * torch.exp2(-exponent)).round().clamp(-_LARGEST_CODE, _LARGEST_CODE)
    return codes, exponent


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program handles one tile. The contraction is filled up with zeros to what the tensor cores take.

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def add_kernel(  # type: ignore[no-untyped-def]
        target, p, q, exponent, amount, rows, cols, rank,
        BR: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        """target[x, y] += amount * delta[x, y]. target: int32 (amount an int) or fp32 pointer; p, q: int8; exponent: int32."""
        column_tiles = tl.cdiv(cols, BC)
        o_row = (tl.program_id(0) // column_tiles).to(tl.int64) * BR + tl.arange(0, BR)
        o_col = (tl.program_id(0) % column_tiles) * BC + tl.arange(0, BC)
        o_rank = tl.arange(0, RANK)
        m_rank = o_rank < rank
        b_p = tl.load(p + o_row[:, None] * rank + o_rank[None, :], mask=(o_row < rows)[:, None] & m_rank[None, :], other=0)
        b_q = tl.load(q + o_col[None, :] * rank + o_rank[:, None], mask=(o_col < cols)[None, :] & m_rank[:, None], other=0)
        total = tl.dot(b_p, b_q, out_dtype=tl.int32)
        power = tl.load(exponent)
        right = tl.maximum(-power, 0)
        delta = ((total << tl.maximum(power, 0)) + ((1 << right) >> 1)) >> right
        p_value = target + o_row[:, None] * cols + o_col[None, :]
        m_value = (o_row < rows)[:, None] & (o_col < cols)[None, :]
        b_value = tl.load(p_value, mask=m_value, other=0)
        tl.store(p_value, b_value + delta.to(b_value.dtype) * amount, mask=m_value)


def _launch_add(target: Tensor, p: Tensor, q: Tensor, exponent: Tensor, amount: float) -> None:
    if not target.is_contiguous() or target.dtype not in (torch.float32, torch.int32):
        raise ValueError(f"the triton backend needs contiguous fp32 or int32, not {target.dtype} with strides {target.stride()}")
    rows, cols = target.shape
    rank = p.shape[1]
    block_rows, block_cols = limits.lowrank_tile
    grid = (-(-rows // block_rows) * -(-cols // block_cols),)
    add_kernel[grid](
        target, p, q, exponent, amount, rows, cols, rank,
        BR=block_rows, BC=block_cols, RANK=max(32, 1 << (rank - 1).bit_length()), num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def apply(basepoint: Tensor, p: Tensor, q: Tensor, exponent: Tensor, sign: int = 1, backend: BackendName | None = None) -> None:
    """basepoint += sign * delta, in place, in integers.

    basepoint: int32 [R, C], contiguous. p: int8 [R, r], q: int8 [C, r], r in 1..128. exponent: int32 [1] within the limits.
    sign: +1 or -1. All on one device. The caller keeps the sum within int32.
    """
    if choose(basepoint.device, backend).name == "triton" and basepoint.numel():
        _launch_add(basepoint, p, q, exponent, sign)
        return
    ref_apply(basepoint, p, q, exponent, sign)


def leak(displacement: Tensor, p: Tensor, q: Tensor, exponent: Tensor, amount: float, backend: BackendName | None = None) -> None:
    """displacement -= amount * delta, in place: what the author gives up of its own displacement.

    displacement: fp32 or fp64 (reference only) [R, C], contiguous. amount: u / c. Exact wherever product and difference are representable.
    """
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        _launch_add(displacement, p, q, exponent, -amount)
        return
    ref_leak(displacement, p, q, exponent, amount)
