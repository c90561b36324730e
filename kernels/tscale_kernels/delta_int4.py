"""Four-bit deltas on an exact grid: half a byte per value, a step per block of 64; encode a displacement, add a decoded delta.

The values of a displacement d [R, C] are taken in row-major order and cut into blocks of 64 (the last may be shorter). Codes -7..7 and
steps are those of `delta_blocks`; with u = 2**unit_exponent
    decoded delta = code_x * step_b, an integer multiple of u
    byte_i        = (code_2i & 15) | (code_2i+1 & 15) << 4         two's complement; a missing last code is 0
The remainder is at most half a step, and stays in the author's displacement (error feedback).

Exactness: as in `delta_int8`: `apply` is integer arithmetic alone, and every backend and device encodes the same bytes and steps too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tscale_kernels import limits
from tscale_kernels.delta_blocks import Grid, kernel_size, passes, scale_of
from tscale_kernels.dispatch import BackendName, choose, has_triton

GRID = Grid(limits.nibble_block, 7, limits.max_nibble_step)


def blocks(size: int) -> int:
    """Blocks of a matrix of `size` values: the number of its steps."""
    return GRID.blocks(size)


def packed_bytes(size: int) -> int:
    """Bytes that hold the codes of a matrix of `size` values."""
    return -(-size // 2)


def valid(packed: Tensor) -> Tensor:
    """bool [1], on the device: no code is -8, which no encoder writes. packed: uint8, any shape."""
    return (((packed & 15) != 8) & ((packed >> 4) != 8)).all().reshape(1)


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_encode(displacement: Tensor, coefficient: float, unit_exponent: int) -> tuple[Tensor, Tensor]:
    """See `encode`; a block that holds NaN or infinite values gets step -1."""
    flat = displacement.reshape(-1)
    packed = torch.empty(packed_bytes(flat.numel()), dtype=torch.uint8, device=flat.device)
    steps = torch.empty(blocks(flat.numel()), dtype=torch.int32, device=flat.device)
    for first, last in passes(flat):
        found, step = GRID.encode(GRID.whole(flat[first:last].float()), scale_of(coefficient, unit_exponent))
        pairs = found.to(torch.int8).view(torch.uint8).view(-1, 2)
        packed[first // 2 : packed_bytes(last)] = ((pairs[:, 0] & 15) | (pairs[:, 1] << 4))[: packed_bytes(last - first)]
        steps[first // limits.nibble_block : blocks(last)] = step
    return packed, steps


def ref_apply(basepoint: Tensor, packed: Tensor, steps: Tensor, sign: int = 1) -> None:
    """See `apply`."""
    _each_block(basepoint, packed, steps * sign)


def ref_leak(displacement: Tensor, packed: Tensor, amounts: Tensor) -> None:
    """See `leak`."""
    _each_block(displacement, packed, -amounts)


@cache
def _pairs_of_bytes(device: torch.device) -> Tensor:
    """int16 [256]: the two codes, int8, that a byte stands for, as one number: picking numbers is four times as fast as picking rows."""
    byte = torch.arange(256, dtype=torch.int16, device=device)
    return torch.stack([((byte & 15) ^ 8) - 8, ((byte >> 4) ^ 8) - 8], dim=1).to(torch.int8).view(torch.int16).view(-1)


def _each_block(target: Tensor, packed: Tensor, amounts: Tensor) -> None:
    flat = target.view(-1)
    for first, last in passes(flat):
        pairs = torch.index_select(_pairs_of_bytes(packed.device), 0, packed[first // 2 : packed_bytes(last)].to(torch.int32))
        codes = pairs.view(torch.int8)[: last - first]
        GRID.add_products(flat[first:last], codes, amounts[first // limits.nibble_block : blocks(last)])


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program handles some whole blocks: their steps and bytes belong to it alone.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import ROUND_MAGIC

    @triton.jit
    def encode_kernel(displacement, packed, steps, size, scale, limit, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Bytes and steps of BLOCKS blocks of BLOCK values; step -1 where a value is not finite. Pointers: fp32, uint8, int32."""
        o_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        o_value = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        b_value = tl.load(displacement + o_value, mask=o_value < size, other=0.0)
        # Magnitudes are compared as integers: NaN and infinity then come out on top instead of being skipped.
        peak_bits = tl.max(b_value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        finite = peak_bits < 0x7F800000
        units = tl.minimum(peak_bits.to(tl.float32, bitcast=True) * scale, limit)
        step = tl.where(finite, tl.maximum(tl.ceil(units * (1.0 / 7.0)), 1.0), 1.0).to(tl.int32)
        # The exponent field of an exact fp32 integer is its bit length; 11 bits of it are kept.
        drop = tl.maximum((step.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126 - 11, 0)
        step = ((step + (1 << drop) - 1) >> drop) << drop
        inverse = tl.div_rn(1.0, step.to(tl.float32))
        scaled = tl.minimum(tl.maximum((b_value * scale) * inverse[:, None], -7.0), 7.0)
        code = ((scaled + ROUND_MAGIC) - ROUND_MAGIC).to(tl.int32)
        even, odd = tl.split(tl.reshape(code, (BLOCKS, BLOCK // 2, 2)))
        o_byte = o_block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(packed + o_byte, ((even & 15) | ((odd & 15) << 4)).to(tl.uint8), mask=o_byte < (size + 1) // 2)
        step = tl.where(tl.max(tl.abs(code), axis=1) > 0, step, 0)
        tl.store(steps + o_block, tl.where(finite, step, -1), mask=o_block * BLOCK < size)

    @triton.jit
    def add_kernel(target, packed, amounts, size, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """target[x] += code_x * amounts[block of x]. target and amounts: int32 or fp32 pointers of one type; packed: uint8."""
        o_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        o_value = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        m_value = o_value < size
        amount = tl.load(amounts + o_block, mask=o_block * BLOCK < size, other=0)
        o_byte = o_block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        byte = tl.load(packed + o_byte, mask=o_byte < (size + 1) // 2, other=0).to(tl.int32)
        code = tl.reshape(tl.join(((byte & 15) ^ 8) - 8, ((byte >> 4) ^ 8) - 8), (BLOCKS, BLOCK))
        b_value = tl.load(target + o_value, mask=m_value, other=0)
        tl.store(target + o_value, b_value + code.to(amount.dtype) * amount[:, None], mask=m_value)


def _grid(size: int) -> tuple[int]:
    return (-(-blocks(size) // limits.delta_blocks_per_program),)


def _launch_encode(displacement: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    size = kernel_size(displacement)
    packed = torch.empty(packed_bytes(size), dtype=torch.uint8, device=displacement.device)
    steps = torch.empty(blocks(size), dtype=torch.int32, device=displacement.device)
    encode_kernel[_grid(size)](displacement, packed, steps, size, scale, GRID.most_units, **_launch())
    return packed, steps


def _launch_add(target: Tensor, packed: Tensor, amounts: Tensor) -> None:
    size = kernel_size(target)
    add_kernel[_grid(size)](target, packed, amounts, size, **_launch())


def _launch() -> dict[str, Any]:
    """Multiplications and additions stay two roundings, as in the reference."""
    return {"BLOCKS": limits.delta_blocks_per_program, "BLOCK": limits.nibble_block, "num_warps": 4, "enable_fp_fusion": False}


# -- run ---------------------------------------------------------------------------------------------------------------


def encode(displacement: Tensor, coefficient: float, unit_exponent: int, backend: BackendName | None = None) -> tuple[Tensor, Tensor]:
    """Packed codes and steps of one matrix.

    displacement: fp32 or fp64 (reference only) [R, C], contiguous, any device. coefficient: > 0.
    Returns uint8 [packed_bytes(R*C)] and steps int32 [blocks(R*C)]. Raises ValueError if a value is not finite.
    """
    packed, steps = encode_unchecked(displacement, coefficient, unit_exponent, backend)
    if bool((steps < 0).any()):
        raise ValueError("the displacement holds NaN or infinite values")
    return packed, steps


def encode_unchecked(
    displacement: Tensor, coefficient: float, unit_exponent: int, backend: BackendName | None = None
) -> tuple[Tensor, Tensor]:
    """`encode` without waiting for the device: a block with a value that is not finite has step -1, for the caller to find later."""
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        return _launch_encode(displacement, scale_of(coefficient, unit_exponent))
    return ref_encode(displacement, coefficient, unit_exponent)


def apply(basepoint: Tensor, packed: Tensor, steps: Tensor, sign: int = 1, backend: BackendName | None = None) -> None:
    """basepoint[x] += sign * code_x * steps[x // 64], in place, in integers.

    basepoint: int32 [R, C], contiguous. packed: uint8 [packed_bytes(R*C)]. steps: int32 [blocks(R*C)]. sign: +1 or -1. All on one device.
    The caller keeps the sum within int32.
    """
    if choose(basepoint.device, backend).name == "triton" and basepoint.numel():
        _launch_add(basepoint, packed, steps * sign)
        return
    ref_apply(basepoint, packed, steps, sign)


def leak(displacement: Tensor, packed: Tensor, amounts: Tensor, backend: BackendName | None = None) -> None:
    """displacement[x] -= code_x * amounts[x // 64], in place: what the author gives up of its own displacement.

    displacement: fp32 or fp64 (reference only) [R, C], contiguous. amounts: same dtype, [blocks(R*C)], as steps * u / c.
    Exact wherever product and difference are representable, as they are on the grid with c = 1.
    """
    if choose(displacement.device, backend).name == "triton" and displacement.numel():
        _launch_add(displacement, packed, -amounts)
        return
    ref_leak(displacement, packed, amounts)
