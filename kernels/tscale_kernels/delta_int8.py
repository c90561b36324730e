"""Eight-bit deltas on an exact grid: a code per value, a step per block of 128; encode a displacement, add a decoded delta.

The values of a displacement d [R, C] are taken in row-major order and cut into blocks of 128 (the last may be shorter). Codes -127..127 and
steps are those of `delta_blocks`; with u = 2**unit_exponent
    decoded delta = code_x * step_b, an integer multiple of u
The remainder is at most half a step: |d - q| <= |d| for every value that the codes reach, and the remainder stays in the author's
displacement (error feedback).

Exactness: `apply` is integer arithmetic alone. `encode` is exact maxima, single fp32 products and quotients, and integer rounding, so every
backend and device gives the same codes and steps too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tscale_kernels import limits
from tscale_kernels.delta_blocks import Grid, kernel_size, passes, scale_of
from tscale_kernels.dispatch import BackendName, choose, has_triton

GRID = Grid(limits.delta_block, 127, limits.max_block_step)


def blocks(size: int) -> int:
    """Blocks of a matrix of `size` values: the number of its steps."""
    return GRID.blocks(size)


def valid(codes: Tensor) -> Tensor:
    """bool [1], on the device: no code is -128, which no encoder writes. codes: int8, any shape."""
    return (codes != -GRID.largest_code - 1).all().reshape(1)


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_encode(displacement: Tensor, coefficient: float, unit_exponent: int) -> tuple[Tensor, Tensor]:
    """See `encode`; a block that holds NaN or infinite values gets step -1."""
    flat = displacement.reshape(-1)
    codes = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
    steps = torch.empty(blocks(flat.numel()), dtype=torch.int32, device=flat.device)
    for first, last in passes(flat):
        found, step = GRID.encode(GRID.whole(flat[first:last].float()), scale_of(coefficient, unit_exponent))
        codes[first:last] = found.to(torch.int8).view(-1)[: last - first]
        steps[first // limits.delta_block : blocks(last)] = step
    return codes, steps


def ref_apply(basepoint: Tensor, codes: Tensor, steps: Tensor, sign: int = 1) -> None:
    """See `apply`."""
    _each_block(basepoint, codes, steps * sign)


def ref_leak(displacement: Tensor, codes: Tensor, amounts: Tensor) -> None:
    """See `leak`."""
    _each_block(displacement, codes, -amounts)


def _each_block(target: Tensor, codes: Tensor, amounts: Tensor) -> None:
    flat = target.view(-1)
    for first, last in passes(flat):
        GRID.add_products(flat[first:last], codes[first:last], amounts[first // limits.delta_block : blocks(last)])


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program handles some whole blocks, so a block's step is found and used by the same program.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import ROUND_MAGIC

    @triton.jit
    def encode_kernel(displacement, codes, steps, size, scale, limit, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Codes and steps of BLOCKS blocks of BLOCK values; step -1 where a value is not finite. Pointers: fp32, int8, int32."""
        o_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        o_value = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        m_value = o_value < size
        b_value = tl.load(displacement + o_value, mask=m_value, other=0.0)
        # Magnitudes are compared as integers: NaN and infinity then come out on top instead of being skipped.
        peak_bits = tl.max(b_value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        finite = peak_bits < 0x7F800000
        units = tl.minimum(peak_bits.to(tl.float32, bitcast=True) * scale, limit)
        step = tl.where(finite, tl.maximum(tl.ceil(units * (1.0 / 127.0)), 1.0), 1.0).to(tl.int32)
        # The exponent field of an exact fp32 integer is its bit length; 11 bits of it are kept.
        drop = tl.maximum((step.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126 - 11, 0)
        step = ((step + (1 << drop) - 1) >> drop) << drop
        inverse = tl.div_rn(1.0, step.to(tl.float32))
        scaled = tl.minimum(tl.maximum((b_value * scale) * inverse[:, None], -127.0), 127.0)
        code = ((scaled + ROUND_MAGIC) - ROUND_MAGIC).to(tl.int8)
        tl.store(codes + o_value, code, mask=m_value)
        step = tl.where(tl.max(tl.abs(code.to(tl.int32)), axis=1) > 0, step, 0)
        tl.store(steps + o_block, tl.where(finite, step, -1), mask=o_block * BLOCK < size)

    @triton.jit
    def add_kernel(target, codes, amounts, size, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """target[x] += codes[x] * amounts[block of x]. target and amounts: int32 or fp32 pointers of one type; codes: int8."""
        o_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        o_value = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        m_value = o_value < size
        amount = tl.load(amounts + o_block, mask=o_block * BLOCK < size, other=0)
        code = tl.load(codes + o_value, mask=m_value, other=0)
        b_value = tl.load(target + o_value, mask=m_value, other=0)
        tl.store(target + o_value, b_value + code.to(amount.dtype) * amount[:, None], mask=m_value)


def _grid(size: int) -> tuple[int]:
    return (-(-blocks(size) // limits.delta_blocks_per_program),)


def _launch_encode(displacement: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    size = kernel_size(displacement)
    codes = torch.empty(size, dtype=torch.int8, device=displacement.device)
    steps = torch.empty(blocks(size), dtype=torch.int32, device=displacement.device)
    encode_kernel[_grid(size)](displacement, codes, steps, size, scale, GRID.most_units, **_launch())
    return codes, steps


def _launch_add(target: Tensor, codes: Tensor, amounts: Tensor) -> None:
    size = kernel_size(target)
    add_kernel[_grid(size)](target, codes, amounts, size, **_launch())


def _launch() -> dict[str, Any]:
    """Multiplications and additions stay two roundings, as in the reference."""
    return {"BLOCKS": limits.delta_blocks_per_program, "BLOCK": limits.delta_block, "num_warps": 4, "enable_fp_fusion": False}


# -- run ---------------------------------------------------------------------------------------------------------------


def encode(displacement: Tensor, coefficient: float, unit_exponent: int, backend: BackendName | None = None) -> tuple[Tensor, Tensor]:
    """Codes and steps of one matrix.

    displacement: fp32 or fp64 (reference only) [R, C], contiguous, any device. coefficient: > 0.
    Returns codes int8 [R*C] and steps int32 [blocks(R*C)]. Raises ValueError if a value is not finite.
    """
    codes, steps = encode_unchecked(displacement, coefficient, unit_exponent, backend)
    if bool((steps < 0).any()):
        raise ValueError("the displacement holds NaN or infinite values")
    return codes, steps


def encode_unchecked(
    displacement: Tensor, coefficient: float, unit_exponent: int, backend: BackendName | None = None
) -> tuple[Tensor, Tensor]:
    """`encode` without waiting for the device: a block with a value that is not finite has step -1, for the caller to find later."""
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        return _launch_encode(displacement, scale_of(coefficient, unit_exponent))
    return ref_encode(displacement, coefficient, unit_exponent)


def apply(basepoint: Tensor, codes: Tensor, steps: Tensor, sign: int = 1, backend: BackendName | None = None) -> None:
    """basepoint[x] += sign * codes[x] * steps[x // 128], in place, in integers.

    basepoint: int32 [R, C], contiguous. codes: int8 [R*C]. steps: int32 [blocks(R*C)]. sign: +1 or -1. All on one device.
    The caller keeps the sum within int32.
    """
    if choose(basepoint.device, backend).name == "triton" and basepoint.numel():
        _launch_add(basepoint, codes, steps * sign)
        return
    ref_apply(basepoint, codes, steps, sign)


def leak(displacement: Tensor, codes: Tensor, amounts: Tensor, backend: BackendName | None = None) -> None:
    """displacement[x] -= codes[x] * amounts[x // 128], in place: what the author gives up of its own displacement.

    displacement: fp32 or fp64 (reference only) [R, C], contiguous. amounts: same dtype, [blocks(R*C)], as steps * u / c.
    Exact wherever product and difference are representable, as they are on the grid with c = 1.
    """
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        _launch_add(displacement, codes, -amounts)
        return
    ref_leak(displacement, codes, amounts)
