"""Sparse deltas on an exact grid: of every 4096 values the k largest, as a sign times a power of two that they share.

The values of a displacement d [R, C] are taken in row-major order and cut into stretches of 4096 (the last may be shorter: it gives
min(k, its length) values). With the author's coefficient c, u = 2**unit_exponent and S the k values of largest magnitude of a stretch
(of equal ones the first):
    total = sum of round(|d_x| * c / u) over S                            an integer
    e     = the largest e >= 0 with 3 k 2**e <= 4 total, at most 24       0 if there is none; -1 if the stretch is all zero
    decoded delta = sign(d_x) * 2**e for x in S, 0 elsewhere, an integer multiple of u
2**e lies in (2/3, 4/3] of the mean m of |d| over S, which makes it the best power of two: |d|^2 falls by at least 8/9 of k m^2 (c = 1).
What is left stays in the author's displacement (error feedback; TopK-SGD, Stich et al. 2018, and SparseLoCo with chunks of 4096).
A pick is (position << 1 | negative), 13 bits; picks of a stretch are sorted. Packing them tighter is the wire codec's business.

Exactness: `apply` is integer arithmetic alone. `encode` compares magnitudes and adds integers, so every backend gives the same picks and
exponents too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tscale_kernels import limits
from tscale_kernels.dispatch import BackendName, choose, has_triton

_LENGTH = limits.topk_stretch
_LENGTH_BITS = _LENGTH.bit_length() - 1
_INFINITE_BITS = 0x7F800000


def stretches(size: int) -> int:
    """Stretches of a matrix of `size` values: the number of its exponents."""
    return -(-size // _LENGTH)


def picked(size: int, k: int) -> int:
    """Values picked from a matrix of `size` values: the number of its picks. Those of stretch s begin at s * k."""
    if size == 0:
        return 0
    return (stretches(size) - 1) * k + min(k, size - (stretches(size) - 1) * _LENGTH)


def valid(picks: Tensor, exponents: Tensor, size: int, k: int) -> Tensor:
    """bool [1], on the device: exponents within -1..24, positions rising within every stretch and inside the matrix, and a stretch of zeros
    spelt as one. picks: int16 [picked(size, k)], exponents: int8 [stretches(size)], as they came from the wire."""
    rows = _rows(picks, k, fill=2 * _LENGTH)  # a value that no pick has, above all of them, fills up the last row
    position = rows >> 1
    inside = (picks >= 0).all() & (picks < 2 * _LENGTH).all()
    rising = ((position[:, 1:] > position[:, :-1]) | (rows[:, 1:] == 2 * _LENGTH)).all()
    last = picks[(stretches(size) - 1) * k :]
    ends = (last < 2 * (size - (stretches(size) - 1) * _LENGTH)).all()
    in_range = ((exponents >= -1) & (exponents <= limits.topk_max_exponent)).all()
    first_ones = torch.arange(k, device=picks.device, dtype=rows.dtype) * 2
    empty = ((exponents >= 0)[:, None] | (rows == first_ones) | (rows == 2 * _LENGTH)).all()
    return (inside & rising & ends & in_range & empty).reshape(1)


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_encode(displacement: Tensor, coefficient: float, unit_exponent: int, k: int) -> tuple[Tensor, Tensor]:
    """See `encode`; a stretch that holds NaN or infinite values gets exponent -2."""
    flat = displacement.reshape(-1)
    size, scale = flat.numel(), coefficient * 2.0**-unit_exponent
    picks = torch.empty(picked(size, k), dtype=torch.int16, device=flat.device)
    exponents = torch.empty(stretches(size), dtype=torch.int8, device=flat.device)
    whole = size // _LENGTH
    each = max(1, limits.cpu_block_elements // _LENGTH) if flat.device.type == "cpu" else max(1, whole)
    parts = [(first, min(whole, first + each), _LENGTH) for first in range(0, whole, each)]
    if size % _LENGTH:
        parts.append((whole, whole + 1, size % _LENGTH))
    for first, last, length in parts:
        values = flat[first * _LENGTH : (last - 1) * _LENGTH + length].float().view(last - first, length)
        found, exponents[first:last] = _encode_rows(values, scale, min(k, length))
        picks[first * k : first * k + found.numel()] = found.reshape(-1)
    return picks, exponents


def ref_apply(basepoint: Tensor, picks: Tensor, exponents: Tensor, k: int, sign: int = 1) -> None:
    """See `apply`."""
    _add(basepoint, picks, _amounts(exponents) * sign, k)


def ref_leak(displacement: Tensor, picks: Tensor, amounts: Tensor, k: int) -> None:
    """See `leak`."""
    _add(displacement, picks, -amounts, k)


def _encode_rows(values: Tensor, scale: float, k: int) -> tuple[Tensor, Tensor]:
    """values fp32 [n, length] -> picks int16 [n, k], exponents int8 [n]."""
    length = values.shape[1]
    bits = values.contiguous().view(torch.int32) & 0x7FFFFFFF
    # One number holds magnitude and place, so that equal magnitudes have an order: the first place is the largest.
    if values.device.type == "cpu" and length == _LENGTH and _groups(k) < length:
        keys = _few_keys(bits, k)
    else:
        keys = (bits.to(torch.int64) << _LENGTH_BITS) | torch.arange(length - 1, -1, -1, device=values.device, dtype=torch.int64)
    best = keys.topk(k, dim=1, sorted=False).values
    position = (length - 1 - (best & (_LENGTH - 1))).sort(dim=1).values
    chosen = values.gather(1, position)
    units = (chosen.abs() * scale).clamp(max=float(limits.max_step)).round()
    finite = bits.amax(dim=1) < _INFINITE_BITS
    total = torch.where(finite[:, None], units, torch.zeros_like(units)).to(torch.int64).sum(dim=1)
    powers = 3 * k << torch.arange(limits.topk_max_exponent + 1, device=values.device, dtype=torch.int64)
    exponent = ((powers <= 4 * total[:, None]).sum(dim=1) - 1).clamp(min=0)
    exponent = torch.where(chosen.ne(0).any(dim=1), exponent, -torch.ones_like(exponent))
    exponent = torch.where(finite, exponent, torch.full_like(exponent, -2))
    return (position << 1 | (chosen < 0)).to(torch.int16), exponent.to(torch.int8)


def _groups(k: int) -> int:
    """Groups of a stretch from whose maxima a bound is taken: a power of two, at least four times k."""
    return 1 << (4 * k - 1).bit_length()


def _few_keys(bits: Tensor, k: int) -> Tensor:
    """int64 [n, at least k]: magnitude and place of all values that may be among the k largest of their row, filled up with -1.

    The k-th largest maximum of the groups is a bound that k values reach; of Gaussian values hardly more than k do. On one core, k = 64,
    this takes 2 ns per value, where a search among all keys takes 12.
    """
    bound = bits.view(len(bits), -1, _groups(k)).amax(dim=1).topk(k, dim=1, sorted=False).values.amin(dim=1)
    reaches = np.greater_equal(bits.numpy(), bound.numpy()[:, None])  # numpy compares with a column three times as fast
    found = torch.from_numpy(np.flatnonzero(reaches))
    row = found >> _LENGTH_BITS
    counts = torch.bincount(row, minlength=len(bits))
    slot = torch.arange(len(found)) - (counts.cumsum(0) - counts)[row]
    keys = torch.full((len(bits), int(counts.max())), -1, dtype=torch.int64)
    place = _LENGTH - 1 - (found & (_LENGTH - 1))
    keys[row, slot] = (bits.view(-1)[found].to(torch.int64) << _LENGTH_BITS) | place
    return keys


def _amounts(exponents: Tensor) -> Tensor:
    """int32 steps of int8 exponents."""
    wide = exponents.to(torch.int32)
    return torch.where(wide >= 0, torch.ones_like(wide) << wide.clamp(min=0), torch.zeros_like(wide))


def _rows(picks: Tensor, k: int, fill: int) -> Tensor:
    """int32 [stretches, k], filled up."""
    return torch.nn.functional.pad(picks.to(torch.int32), (0, -picks.numel() % k), value=fill).view(-1, k)


def _add(target: Tensor, picks: Tensor, amounts: Tensor, k: int) -> None:
    """target[x] += amounts[stretch of x] or, for negative picks, -= ."""
    rows = _rows(picks, k, fill=0)
    start = torch.arange(len(rows), device=picks.device, dtype=torch.int64)[:, None] * _LENGTH
    index = (start + (rows >> 1)).reshape(-1)[: picks.numel()]
    value = torch.where((rows & 1) != 0, -amounts[:, None], amounts[:, None]).reshape(-1)[: picks.numel()]
    target.view(-1).index_add_(0, index, value)


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program handles one stretch, which it holds in registers. The k-th largest magnitude is found bit by bit.

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def encode_kernel(  # type: ignore[no-untyped-def]
        displacement, picks, exponents, size, k, scale, limit, LENGTH: tl.constexpr, MAX_EXPONENT: tl.constexpr
    ):
        """Picks and exponent of stretch program_id(0); exponent -2 where a value is not finite. Pointers: fp32, int16, int8."""
        stretch = tl.program_id(0).to(tl.int64)
        o_value = tl.arange(0, LENGTH)
        m_value = stretch * LENGTH + o_value < size
        b_value = tl.load(displacement + stretch * LENGTH + o_value, mask=m_value, other=0.0)
        wanted = tl.minimum(k, size - stretch * LENGTH).to(tl.int32)
        bits = tl.where(m_value, b_value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
        least = 0  # the k-th largest magnitude: the largest number that `wanted` values reach
        for step in range(31):
            trial = least | (1 << (30 - step))
            reach = tl.sum((bits >= trial).to(tl.int32), axis=0)
            least = tl.where(reach >= wanted, trial, least)
        above = (bits > least).to(tl.int32)
        equal = (bits == least).to(tl.int32)
        room = wanted - tl.sum(above, axis=0)
        chosen = above | (equal & (tl.cumsum(equal, axis=0) <= room).to(tl.int32))
        slot = tl.cumsum(chosen, axis=0) - 1
        pick = (o_value << 1) | (b_value < 0).to(tl.int32)
        tl.store(picks + stretch * k + slot, pick.to(tl.int16), mask=chosen != 0)

        finite = tl.max(bits, axis=0) < 0x7F800000
        # Adding 2**23 to a smaller fp32 >= 0 leaves no bits for a fraction: it is rounded to the nearest even. From 2**23 on there is none.
        scaled = tl.minimum(tl.abs(b_value) * scale, limit)
        rounded = tl.where(scaled < 8388608.0, (scaled + 8388608.0) - 8388608.0, scaled)
        units = tl.where((chosen != 0) & finite, rounded, 0.0).to(tl.int32)
        total = tl.sum(units.to(tl.int64), axis=0)
        exponent = 0
        for e in range(1, MAX_EXPONENT + 1):
            exponent += ((wanted.to(tl.int64) * 3) << e <= 4 * total).to(tl.int32)
        exponent = tl.where(tl.max(tl.where(chosen != 0, bits, 0), axis=0) > 0, exponent, -1)
        tl.store(exponents + stretch, tl.where(finite, exponent, -2).to(tl.int8))

    @triton.jit
    def add_kernel(target, picks, amounts, count, k, LENGTH: tl.constexpr, PICKS: tl.constexpr):  # type: ignore[no-untyped-def]
        """target[x] += amounts[stretch of x] or, for negative picks, -= . target and amounts: int32 or fp32 pointers; picks: int16."""
        o_pick = tl.program_id(0).to(tl.int64) * PICKS + tl.arange(0, PICKS)
        m_pick = o_pick < count
        pick = tl.load(picks + o_pick, mask=m_pick, other=0).to(tl.int32)
        stretch = o_pick // k
        amount = tl.load(amounts + stretch, mask=m_pick, other=0)
        p_value = target + stretch * LENGTH + (pick >> 1)
        b_value = tl.load(p_value, mask=m_pick, other=0)
        tl.store(p_value, b_value + tl.where((pick & 1) != 0, -amount, amount), mask=m_pick)


def _launch_encode(displacement: Tensor, scale: float, k: int) -> tuple[Tensor, Tensor]:
    size = _kernel_size(displacement)
    picks = torch.empty(picked(size, k), dtype=torch.int16, device=displacement.device)
    exponents = torch.empty(stretches(size), dtype=torch.int8, device=displacement.device)
    encode_kernel[(stretches(size),)](
        displacement, picks, exponents, size, k, scale, float(limits.max_step),
        LENGTH=_LENGTH, MAX_EXPONENT=limits.topk_max_exponent, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return picks, exponents


def _launch_add(target: Tensor, picks: Tensor, amounts: Tensor, k: int) -> None:
    _kernel_size(target)
    count = picks.numel()
    grid = (-(-count // limits.topk_picks_per_program),)
    add_kernel[grid](target, picks, amounts, count, k, LENGTH=_LENGTH, PICKS=limits.topk_picks_per_program, num_warps=4)


def _kernel_size(matrix: Tensor) -> int:
    if not matrix.is_contiguous() or matrix.dtype not in (torch.float32, torch.int32):
        raise ValueError(f"the triton backend needs contiguous fp32 or int32, not {matrix.dtype} with strides {matrix.stride()}")
    return matrix.numel()


# -- run ---------------------------------------------------------------------------------------------------------------


def encode(
    displacement: Tensor, coefficient: float, unit_exponent: int, k: int, backend: BackendName | None = None
) -> tuple[Tensor, Tensor]:
    """Picks and exponents of one matrix.

    displacement: fp32 or fp64 (reference only) [R, C], contiguous, any device. coefficient: > 0. k: 1..4096.
    Returns picks int16 [picked(R*C, k)] and exponents int8 [stretches(R*C)]. Raises ValueError if a value is not finite.
    """
    picks, exponents = encode_unchecked(displacement, coefficient, unit_exponent, k, backend)
    if bool((exponents < -1).any()):
        raise ValueError("the displacement holds NaN or infinite values")
    return picks, exponents


def encode_unchecked(
    displacement: Tensor, coefficient: float, unit_exponent: int, k: int, backend: BackendName | None = None
) -> tuple[Tensor, Tensor]:
    """`encode` without waiting for the device: a stretch with a value that is not finite has exponent -2, for the caller to find later."""
    if not 1 <= k <= _LENGTH:
        raise ValueError(f"k = {k} values of every {_LENGTH}: it must be between 1 and {_LENGTH}")
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        return _launch_encode(displacement, coefficient * 2.0**-unit_exponent, k)
    return ref_encode(displacement, coefficient, unit_exponent, k)


def apply(basepoint: Tensor, picks: Tensor, exponents: Tensor, k: int, sign: int = 1, backend: BackendName | None = None) -> None:
    """basepoint[x] += sign * (-1 if the pick is negative else 1) * 2**exponents[x // 4096] for every picked x, in place, in integers.

    basepoint: int32 [R, C], contiguous. picks: int16 [picked(R*C, k)], exponents: int8 [stretches(R*C)], `valid`. sign: +1 or -1.
    All on one device. The caller keeps the sum within int32.
    """
    if choose(basepoint.device, backend).name == "triton" and basepoint.numel():
        _launch_add(basepoint, picks, _amounts(exponents) * sign, k)
        return
    ref_apply(basepoint, picks, exponents, k, sign)


def leak(displacement: Tensor, picks: Tensor, amounts: Tensor, k: int, backend: BackendName | None = None) -> None:
    """displacement[x] -= amounts[x // 4096] * (-1 if the pick is negative else 1) for every picked x, in place.

    displacement: fp32 or fp64 (reference only) [R, C], contiguous. amounts: same dtype, [stretches(R*C)], as 2**e * u / c, 0 where e is -1.
    Exact wherever the difference is representable.
    """
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        _launch_add(displacement, picks, -amounts, k)
        return
    ref_leak(displacement, picks, amounts, k)
