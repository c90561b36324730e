"""One-bit gradients: sign bits with an error tail at every author, and their exact average with a small residual at its owner.

For R authors, a common scale s >= 0 per group of elements, and of each element
    encode (every author):   v = tail + g;  bit = v < 0;  tail = v - b s                      b = -1 if the bit is set, else 1
    average (its owner):     t = sum of b over authors + residual;  out = sign(t);  residual = t - R out
    decode (everybody):      g = out s
so that  sum of b = R out + change of residual:  what the average loses is kept, in whole numbers, and |residual| <= R - 1.
The residual starts at 1 for even R and at 0 for odd R; then t is never 0. For R = 2 this is TScale's rule, majority(a, b, carry) with
carry = a xor b xor carry; for larger R it is its sum with one level instead of log2(R), and needs no power of two.
(Error feedback: 1-bit SGD, Seide et al. 2014. A second feedback at the owner of a part: 1-bit Adam, Tang et al. 2021.)

A group whose scale is 0 is silent: nothing of it is sent, its tail takes the gradient up, its residual stays, it decodes to 0.
Elements are packed 8 to a byte, lowest bit first. A group is 128 elements, or 1 (then in plain torch only). All is element-wise, so every
backend and device gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.flat_blocks import GROUP

__all__ = ["MAX_AUTHORS", "average", "decode", "encode", "first_residual"]

MAX_AUTHORS = 128
"""A residual, at most R - 1, is kept in int8."""
_BLOCK_GROUPS = 16
"""Groups of 128 elements that one program takes (guess)."""


def first_residual(authors: int) -> int:
    """What the residual of every element starts at."""
    return 1 - authors % 2


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_encode(gradient: Tensor, tail: Tensor, scale: Tensor, bits: Tensor) -> None:
    """See `encode`."""
    tail += gradient
    negative = tail < 0
    wide = scale.repeat_interleave(tail.numel() // scale.numel()) if scale.numel() != tail.numel() else scale
    tail -= torch.where(negative, -wide, wide)
    bits.copy_(_pack(negative))


def ref_average(received: Tensor, residual: Tensor, scale: Tensor, out: Tensor) -> None:
    """See `average`."""
    authors = received.shape[0]
    total = residual.to(torch.int16)
    for bits in received:
        total += _signs(bits, torch.int16)
    positive = total >= 0
    silent = (scale == 0).repeat_interleave(total.numel() // scale.numel())
    total += torch.where(positive, -authors, authors).to(torch.int16)
    residual.copy_(torch.where(silent, residual, total.to(torch.int8)))
    out.copy_(_pack(~positive))


def ref_decode(bits: Tensor, scale: Tensor, gradient: Tensor) -> None:
    """See `decode`."""
    signs = _signs(bits[: gradient.numel() // 8], gradient.dtype)
    torch.mul(signs.view(scale.numel(), -1), scale[:, None], out=gradient.view(scale.numel(), -1))


def _signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """[8 * len(bits)] of +1 and -1."""
    lanes = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (1 - 2 * ((bits[:, None] >> lanes) & 1).to(dtype)).view(-1)


def _pack(negative: Tensor) -> Tensor:
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=negative.device)
    return (negative.view(-1, 8).to(torch.uint8) * weights).sum(dim=1, dtype=torch.uint8)


# -- Triton ------------------------------------------------------------------------------------------------------------

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def encode_kernel(gradient, tail, scale, bits, groups, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        """GROUPS groups of 128 elements. Pointers: fp32, fp32, fp32 [groups], uint8."""
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        o_byte, o_lane = tl.arange(0, 16), tl.arange(0, 8)
        offsets = group[:, None, None] * 128 + o_byte[None, :, None] * 8 + o_lane[None, None, :]
        mask = (group < groups)[:, None, None] & (o_byte >= 0)[None, :, None] & (o_lane >= 0)[None, None, :]
        s = tl.load(scale + group, mask=group < groups, other=0.0)[:, None, None]
        v = tl.load(tail + offsets, mask=mask, other=0.0) + tl.load(gradient + offsets, mask=mask, other=0.0)
        negative = v < 0
        tl.store(tail + offsets, v - tl.where(negative, -s, s), mask=mask)
        packed = tl.sum(negative.to(tl.int32) << o_lane[None, None, :], axis=2).to(tl.uint8)
        tl.store(bits + group[:, None] * 16 + o_byte[None, :], packed, mask=(group < groups)[:, None] & (o_byte >= 0)[None, :])

    @triton.jit
    def average_kernel(received, residual, scale, out, groups, AUTHORS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        """received uint8 [AUTHORS, groups * 16], residual int8 [groups * 128], scale fp32 [groups], out uint8 [groups * 16]."""
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        o_byte, o_lane = tl.arange(0, 16), tl.arange(0, 8)
        place = group[:, None] * 16 + o_byte[None, :]
        m_place = (group < groups)[:, None] & (o_byte >= 0)[None, :]
        offsets = place[:, :, None] * 8 + o_lane[None, None, :]
        mask = m_place[:, :, None] & (o_lane >= 0)[None, None, :]
        before = tl.load(residual + offsets, mask=mask, other=0).to(tl.int32)
        total = before
        for author in range(AUTHORS):
            bits = tl.load(received + author * (groups.to(tl.int64) * 16) + place, mask=m_place, other=0).to(tl.int32)
            total += 1 - 2 * ((bits[:, :, None] >> o_lane[None, None, :]) & 1)
        negative = total < 0
        loud = (tl.load(scale + group, mask=group < groups, other=0.0) != 0)[:, None, None]
        after = tl.where(loud, total + tl.where(negative, AUTHORS, -AUTHORS), before)
        tl.store(residual + offsets, after.to(tl.int8), mask=mask)
        tl.store(out + place, tl.sum(negative.to(tl.int32) << o_lane[None, None, :], axis=2).to(tl.uint8), mask=m_place)

    @triton.jit
    def decode_kernel(bits, scale, gradient, groups, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        """gradient fp32 [groups * 128] = +-scale of its group."""
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        o_byte, o_lane = tl.arange(0, 16), tl.arange(0, 8)
        m_place = (group < groups)[:, None] & (o_byte >= 0)[None, :]
        packed = tl.load(bits + group[:, None] * 16 + o_byte[None, :], mask=m_place, other=0).to(tl.int32)
        s = tl.load(scale + group, mask=group < groups, other=0.0)[:, None, None]
        sign = 1 - 2 * ((packed[:, :, None] >> o_lane[None, None, :]) & 1)
        offsets = group[:, None, None] * 128 + o_byte[None, :, None] * 8 + o_lane[None, None, :]
        mask = m_place[:, :, None] & (o_lane >= 0)[None, None, :]
        tl.store(gradient + offsets, s * sign.to(tl.float32), mask=mask)


def _grid(groups: int) -> tuple[int]:
    return (triton.cdiv(groups, _BLOCK_GROUPS),)


# -- run ---------------------------------------------------------------------------------------------------------------


def encode(gradient: Tensor, tail: Tensor, scale: Tensor, bits: Tensor, backend: BackendName | None = None) -> None:
    """bits uint8 [n / 8] of tail + gradient, and what they leave in the tail.

    gradient: fp32 [n], only read; tail: fp32 [n], changed in place; scale: fp32 [n / 128] or [n]; n a multiple of 128; all contiguous on
    one device. Raises ValueError for lengths that do not match.
    """
    if tail.numel() != gradient.numel() or bits.numel() * 8 != gradient.numel():
        raise ValueError(f"{bits.numel()} bytes and {tail.numel()} tails do not fit {gradient.numel()} elements")
    if _by_kernel(gradient.numel(), scale, backend):
        encode_kernel[_grid(scale.numel())](gradient, tail, scale, bits, scale.numel(), GROUPS=_BLOCK_GROUPS, num_warps=4)
    else:
        ref_encode(gradient, tail, scale, bits)


def average(received: Tensor, residual: Tensor, scale: Tensor, out: Tensor, backend: BackendName | None = None) -> None:
    """out uint8 [n / 8]: the average of the authors' bits, uint8 [R, n / 8]; what it loses stays in `residual`, int8 [n], in place.

    scale as for `encode`. Raises ValueError for more than MAX_AUTHORS, and for lengths that do not match.
    """
    if received.shape[0] > MAX_AUTHORS:
        raise ValueError(f"{received.shape[0]} authors, at most {MAX_AUTHORS} can be averaged")
    if residual.numel() != 8 * out.numel() or received.shape[1] != out.numel():
        raise ValueError(f"{residual.numel()} residuals and {received.shape[1]} bytes of each author do not fit {out.numel()} bytes")
    if _by_kernel(residual.numel(), scale, backend):
        average_kernel[_grid(scale.numel())](
            received, residual, scale, out, scale.numel(), AUTHORS=received.shape[0], GROUPS=_BLOCK_GROUPS, num_warps=4
        )
    else:
        ref_average(received, residual, scale, out)


def decode(bits: Tensor, scale: Tensor, gradient: Tensor, backend: BackendName | None = None) -> None:
    """gradient fp32 [n] = scale with the sign of the bits (uint8, at least [n / 8]). scale as for `encode`."""
    if bits.numel() * 8 < gradient.numel():
        raise ValueError(f"{bits.numel()} bytes are too few for {gradient.numel()} elements")
    if _by_kernel(gradient.numel(), scale, backend):
        decode_kernel[_grid(scale.numel())](bits, scale, gradient, scale.numel(), GROUPS=_BLOCK_GROUPS, num_warps=4)
    else:
        ref_decode(bits, scale, gradient)


def _by_kernel(elements: int, scale: Tensor, backend: BackendName | None) -> bool:
    """Raises ValueError if `scale` is neither for every group of 128 nor for every element."""
    if scale.numel() not in (elements, elements // GROUP) or elements % 8:
        raise ValueError(f"{scale.numel()} scales do not fit {elements} elements: one for each, or one for {GROUP}")
    whole_groups = scale.numel() * GROUP == elements
    return whole_groups and elements > 0 and choose(scale.device, backend).name == "triton"
