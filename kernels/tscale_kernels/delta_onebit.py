"""One-bit deltas on an exact grid: encode a displacement, add a decoded delta.

For each row r of a displacement d [R, C] and an author's coefficient c, with u = 2**unit_exponent:
    step_r = round(c * mean|d_r| / u)      at least 1 if the row is not zero, else 0; then rounded to 11 significant bits, at most max_step
    bit_rx = 1 if d_rx < 0 else 0          packed 8 to a byte, lowest bit first, row-major without gaps
    decoded delta = step_r * (1 - 2 * bit_rx), an integer multiple of u
The scale mean|d| is the least-squares one: ||d - q||^2 = ||d||^2 - ||d||_1^2 / n for q = mean|d| * sign(d) (1-bit SGD, Seide et al. 2014;
the remainder stays in the author's displacement, which is error feedback).

Exactness: `apply` is integer arithmetic alone, so every backend and device gives the same bits. `encode` runs on the author's side only;
its bits are exact everywhere, its steps depend on the order in which mean|d| is summed in fp32 (a relative 1e-6, so backends may differ
by one step or by one code on rows that lie at a rounding boundary). Receivers never repeat that sum.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from tscale_kernels import limits
from tscale_kernels.dispatch import BackendName, choose, has_triton

# -- the 16-bit step code ----------------------------------------------------------------------------------------------


def round_steps(steps: Tensor) -> Tensor:
    """Nearest values (half up) that the 16-bit code can hold, at most limits.max_step. int32 or int64 >= 0, any shape."""
    wide = steps.to(torch.int64).clamp(max=limits.max_step)
    drop = (bit_length(wide) - limits.step_mantissa_bits).clamp(min=0)
    half = torch.where(drop > 0, torch.ones_like(wide) << (drop - 1).clamp(min=0), torch.zeros_like(wide))
    return (((wide + half) >> drop) << drop).clamp(max=limits.max_step).to(torch.int32)


def steps_to_codes(steps: Tensor) -> Tensor:
    """16-bit codes (mantissa << 5 | exponent) of steps that `round_steps` returned. int32 -> int32 in 0..65535."""
    wide = steps.to(torch.int64)
    exponent = (bit_length(wide) - limits.step_mantissa_bits).clamp(min=0)
    return ((wide >> exponent) << limits.step_exponent_bits | exponent).to(torch.int32)


def codes_to_steps(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(steps int32, valid bool) of int32 codes in 0..65535.

    A code is valid if it is the only spelling of its value (a non-zero exponent needs a full mantissa) and at most max_step. The step of an
    invalid code is 0.
    """
    wide = codes.to(torch.int64)
    exponent = wide & ((1 << limits.step_exponent_bits) - 1)
    mantissa = wide >> limits.step_exponent_bits
    full = 1 << (limits.step_mantissa_bits - 1)
    value = mantissa << exponent
    valid = ((exponent == 0) | (mantissa >= full)) & (value <= limits.max_step)
    return torch.where(valid, value, torch.zeros_like(value)).to(torch.int32), valid


def bit_length(values: Tensor) -> Tensor:
    """Bits that hold each value (0 for 0). int64 in 0..2**24, exact in fp32, whose exponent field is the answer."""
    return torch.frexp(values.to(torch.float32)).exponent.to(torch.int64)


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_encode(displacement: Tensor, coefficient: float, unit_exponent: int) -> tuple[Tensor, Tensor]:
    """See `encode`."""
    mean = displacement.abs().mean(dim=1)
    if not bool(torch.isfinite(mean).all()):
        raise ValueError("the displacement holds NaN or infinite values")
    return _pack_signs(displacement), _steps_of_means(mean, coefficient, unit_exponent)


def ref_apply(basepoint: Tensor, bits: Tensor, steps: Tensor, sign: int = 1) -> None:
    """See `apply`."""
    _each_block(basepoint, bits, steps * sign)


def ref_leak(displacement: Tensor, bits: Tensor, amounts: Tensor) -> None:
    """See `leak`."""
    _each_block(displacement, bits, -amounts)


def _steps_of_means(mean: Tensor, coefficient: float, unit_exponent: int) -> Tensor:
    """Row means of |d| (fp32 or fp64) -> representable steps."""
    scaled = mean.to(torch.float64) * (coefficient * 2.0**-unit_exponent)
    rounded = torch.floor(scaled + 0.5).clamp(min=1.0, max=float(limits.max_step))
    return round_steps(torch.where(mean > 0, rounded, torch.zeros_like(rounded)).to(torch.int64))


def _pack_signs(displacement: Tensor) -> Tensor:
    """uint8 [ceil(R*C/8)]: 1 where negative. Minus zero counts as positive."""
    if displacement.device.type == "cpu":  # numpy's comparison is three times as fast as torch's here
        return torch.from_numpy(np.packbits(np.less(displacement.numpy(), 0).reshape(-1), bitorder="little"))
    negative = (displacement < 0).reshape(-1)
    short = -negative.numel() % 8
    lanes = torch.nn.functional.pad(negative, (0, short)).view(-1, 8).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=lanes.device)
    return (lanes * weights).sum(dim=1, dtype=torch.uint8)


@cache
def _sign_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 8] of +1 and -1: the signs that one packed byte stands for."""
    byte = torch.arange(256, device=device)[:, None]
    lane = torch.arange(8, device=device)[None, :]
    return (1 - 2 * ((byte >> lane) & 1)).to(dtype)


def _unpack(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """[8 * len(bits)] of +1 and -1."""
    return torch.index_select(_sign_table(bits.device, dtype), 0, bits.to(torch.int32)).reshape(-1)


def _each_block(target: Tensor, bits: Tensor, amounts: Tensor) -> None:
    """target[r, x] += amounts[r] * sign[r, x], in blocks of whole rows that stay in the cache."""
    rows, cols = target.shape
    if cols % 8:
        signs = _unpack(bits, target.dtype)[: rows * cols].view(rows, cols)
        target.addcmul_(signs, amounts[:, None])
        return
    per_block = max(1, limits.cpu_block_elements // cols) if target.device.type == "cpu" else max(1, rows)
    row_bytes = cols // 8
    for first in range(0, rows, per_block):
        last = min(rows, first + per_block)
        signs = _unpack(bits[first * row_bytes : last * row_bytes], target.dtype).view(last - first, cols)
        target[first:last].addcmul_(signs, amounts[first:last, None])


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program handles one row. Columns are a multiple of 8 (as in all layouts): a row's bits are whole bytes, which no two programs share.

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def encode_kernel(displacement, mean, bits, cols, inverse_cols, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
        """mean[r] = sum |d_r| * inverse_cols and the packed signs of row r = program_id(0). Pointers: fp32, fp32, uint8."""
        row = tl.program_id(0).to(tl.int64)
        o_byte = tl.arange(0, BYTES)
        o_lane = tl.arange(0, 8)
        total = tl.zeros([BYTES], tl.float32)
        for first in range(0, cols // 8, BYTES):
            m_byte = first + o_byte < cols // 8
            o_value = (first + o_byte)[:, None] * 8 + o_lane[None, :]
            b_value = tl.load(displacement + row * cols + o_value, mask=m_byte[:, None], other=0.0)
            packed = tl.sum((b_value < 0).to(tl.int32) << o_lane[None, :], axis=1)
            tl.store(bits + row * (cols // 8) + first + o_byte, packed.to(tl.uint8), mask=m_byte)
            total += tl.sum(tl.abs(b_value), axis=1)
        tl.store(mean + row, tl.sum(total, axis=0) * inverse_cols)

    @triton.jit
    def add_kernel(target, bits, amounts, cols, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
        """target[r, x] += amounts[r] or, where the bit is set, -= . target and amounts: int32 or fp32 pointers of one type; bits: uint8."""
        row = tl.program_id(0).to(tl.int64)
        amount = tl.load(amounts + row)
        o_byte = tl.arange(0, BYTES)
        o_lane = tl.arange(0, 8)
        for first in range(0, cols // 8, BYTES):
            m_byte = first + o_byte < cols // 8
            packed = tl.load(bits + row * (cols // 8) + first + o_byte, mask=m_byte, other=0).to(tl.int32)
            negative = (packed[:, None] >> o_lane[None, :]) & 1
            p_value = target + row * cols + (first + o_byte)[:, None] * 8 + o_lane[None, :]
            b_value = tl.load(p_value, mask=m_byte[:, None], other=0)
            tl.store(p_value, b_value + tl.where(negative != 0, -amount, amount), mask=m_byte[:, None])

    @triton.jit
    def add_many_kernel(target, bits, amounts, count, rows, cols, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
        """`add_kernel` for `count` deltas: bits [count, rows * cols / 8], amounts [count, rows]; target is read and written once."""
        row = tl.program_id(0).to(tl.int64)
        o_byte = tl.arange(0, BYTES)
        o_lane = tl.arange(0, 8)
        row_bytes = cols // 8
        for first in range(0, row_bytes, BYTES):
            m_byte = first + o_byte < row_bytes
            p_value = target + row * cols + (first + o_byte)[:, None] * 8 + o_lane[None, :]
            b_value = tl.load(p_value, mask=m_byte[:, None], other=0)
            for each in range(count):
                amount = tl.load(amounts + each * rows + row)
                packed = tl.load(bits + (each * rows + row) * row_bytes + first + o_byte, mask=m_byte, other=0).to(tl.int32)
                negative = (packed[:, None] >> o_lane[None, :]) & 1
                b_value += tl.where(negative != 0, -amount, amount)
            tl.store(p_value, b_value, mask=m_byte[:, None])


def _launch_encode(displacement: Tensor) -> tuple[Tensor, Tensor]:
    """(row means of |d| fp32 [R], bits)."""
    rows, cols = _kernel_shape(displacement)
    mean = torch.empty(rows, dtype=torch.float32, device=displacement.device)
    bits = torch.empty(rows * cols // 8, dtype=torch.uint8, device=displacement.device)
    encode_kernel[(rows,)](displacement, mean, bits, cols, 1.0 / cols, BYTES=limits.triton_block_bytes)
    return mean, bits


def _launch_add(target: Tensor, bits: Tensor, amounts: Tensor) -> None:
    rows, cols = _kernel_shape(target)
    add_kernel[(rows,)](target, bits, amounts, cols, BYTES=limits.triton_block_bytes)


def _kernel_shape(matrix: Tensor) -> tuple[int, int]:
    rows, cols = matrix.shape
    if cols % 8 or not matrix.is_contiguous():
        raise ValueError(f"the triton backend needs contiguous rows whose length is a multiple of 8, not {tuple(matrix.shape)}")
    return rows, cols


# -- run ---------------------------------------------------------------------------------------------------------------


def encode(displacement: Tensor, coefficient: float, unit_exponent: int, backend: BackendName | None = None) -> tuple[Tensor, Tensor]:
    """Signs and steps of one matrix.

    displacement: fp32 or fp64 [R, C], contiguous, any device. coefficient: > 0. Returns bits uint8 [ceil(R*C/8)] and steps int32 [R].
    Raises ValueError if a value is not finite.
    """
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        mean, bits = _launch_encode(displacement)
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("the displacement holds NaN or infinite values")
        return bits, _steps_of_means(mean, coefficient, unit_exponent)
    return ref_encode(displacement, coefficient, unit_exponent)


def apply(basepoint: Tensor, bits: Tensor, steps: Tensor, sign: int = 1, backend: BackendName | None = None) -> None:
    """basepoint[r, x] += sign * steps[r] * (-1 if the bit is set else 1), in place, in integers.

    basepoint: int32 [R, C], contiguous. bits: uint8 [ceil(R*C/8)]. steps: int32 [R]. sign: +1 or -1. All on one device.
    The caller keeps the sum within int32.
    """
    if choose(basepoint.device, backend).name == "triton" and basepoint.numel():
        _launch_add(basepoint, bits, steps * sign)
        return
    ref_apply(basepoint, bits, steps, sign)


def apply_many(basepoint: Tensor, bits: Tensor, steps: Tensor, backend: BackendName | None = None) -> None:
    """`apply` for several deltas of one matrix in one pass. bits: uint8 [N, ceil(R*C/8)]. steps: int32 [N, R]."""
    if choose(basepoint.device, backend).name == "triton" and basepoint.numel():
        rows, cols = _kernel_shape(basepoint)
        add_many_kernel[(rows,)](basepoint, bits, steps, len(bits), rows, cols, BYTES=limits.triton_block_bytes)
        return
    for each, amounts in zip(bits, steps, strict=True):
        ref_apply(basepoint, each, amounts)


def leak(displacement: Tensor, bits: Tensor, amounts: Tensor, backend: BackendName | None = None) -> None:
    """displacement[r, x] -= amounts[r] * (-1 if the bit is set else 1), in place: what the author gives up of its own displacement.

    displacement: fp32 or fp64 [R, C], contiguous. amounts: same dtype, [R]. Exact wherever the difference is representable.
    """
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        _launch_add(displacement, bits, -amounts)
        return
    ref_leak(displacement, bits, amounts)
