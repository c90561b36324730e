"""One-bit gradients: sign bits with an error tail at every author, and their exact average with a residual at its owner.

For R authors, a common scale s >= 0 per matrix or row, and of each element, in whole units of UNITS per bit
    encode (every author):   v = tail + g;  bit = v < 0;  tail = v - b s                       b = -1 if the bit is set, else 1
    average (its owner):     t = UNITS sum of b over authors + residual;  out = sign(t);  residual = t - size out
                             size = mean |t| over 128 elements, rounded, 1 to UNITS R;  UNITS R where any |t| is above 4 UNITS R
    decode (everybody):      g = out s size / (UNITS R)
so that  UNITS sum of b = size out + change of residual:  what the average loses is kept, in whole numbers, and |residual| <= 4 UNITS R.
A size of UNITS R throughout would be TScale's rule (for R = 2 its majority(a, b, carry), carry = a xor b xor carry). With it the average
of R authors is as loud as one of them, however little they agree: the common part of their gradients then moves the weights up to sqrt(R)
times less than the exact mean does. A byte of size per 128 bits mends that for 3 % of the bytes.
(Error feedback: 1-bit SGD, Seide et al. 2014. A second feedback at the owner of a part: 1-bit Adam, Tang et al. 2021.)

Elements whose scale is 0 are silent: their tail takes the gradient up, their residual stays, they decode to 0.
Elements are packed 8 to a byte, lowest bit first. Scales are one for 128 elements, or one for each (then in plain torch only). All but the
tail is in whole numbers, and the tail is element-wise, so every backend and device gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.flat_blocks import GROUP

__all__ = ["MAX_AUTHORS", "UNITS", "average", "decode", "encode"]

UNITS = 4
"""Quarters: how finely the loudness of an average is told."""
MAX_AUTHORS = 255 // UNITS
"""A size is a byte."""
_LOUDEST = 4
"""Times UNITS R: from where on a group is decoded at full size. Bounds residuals."""
_BLOCK_GROUPS = 16
"""Groups of 128 elements that one program takes (guess)."""


# -- reference ---------------------------------------------------------------------------------------------------------


def ref_encode(gradient: Tensor, tail: Tensor, scale: Tensor, bits: Tensor) -> None:
    """See `encode`."""
    tail += gradient
    negative = tail < 0
    wide = scale.repeat_interleave(tail.numel() // scale.numel()) if scale.numel() != tail.numel() else scale
    tail -= torch.where(negative, -wide, wide)
    bits.copy_(_pack(negative))


def ref_average(received: Tensor, residual: Tensor, scale: Tensor, out: Tensor, size: Tensor) -> None:
    """See `average`."""
    full = UNITS * received.shape[0]
    total = residual.to(torch.int32)
    for bits in received:
        total += UNITS * _signs(bits, torch.int32)
    positive = total >= 0
    loudness = total.abs().view(-1, GROUP)
    sizes = ((loudness.sum(1) + GROUP // 2) // GROUP).clamp(1, full)
    sizes = torch.where(loudness.amax(1) > _LOUDEST * full, full, sizes)
    taken = sizes.repeat_interleave(GROUP)
    silent = (scale == 0).repeat_interleave(total.numel() // scale.numel())
    after = total - torch.where(positive, taken, -taken)
    residual.copy_(torch.where(silent, residual, after.to(torch.int16)))
    out.copy_(_pack(~positive))
    size.copy_(sizes)


def ref_decode(bits: Tensor, size: Tensor, scale: Tensor, gradient: Tensor, authors: int) -> None:
    """See `decode`."""
    groups = gradient.numel() // GROUP
    amount = size[:groups].float() * (1.0 / (UNITS * authors))
    loud = scale.view(groups, -1) * amount[:, None]
    torch.mul(_signs(bits[: gradient.numel() // 8], gradient.dtype).view(groups, GROUP), loud, out=gradient.view(groups, GROUP))


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
    def average_kernel(  # type: ignore[no-untyped-def]
        received, residual, scale, out, size, groups,
        AUTHORS: tl.constexpr, UNITS: tl.constexpr, LOUDEST: tl.constexpr, GROUPS: tl.constexpr,
    ):  # fmt: skip
        """received uint8 [AUTHORS, groups * 16], residual int16 [groups * 128], scale fp32 [groups], out uint8 [groups * 16], size uint8
        [groups]."""
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        o_byte, o_lane = tl.arange(0, 16), tl.arange(0, 8)
        place = group[:, None] * 16 + o_byte[None, :]
        m_place = (group < groups)[:, None] & (o_byte >= 0)[None, :]
        offsets = place[:, :, None] * 8 + o_lane[None, None, :]
        mask = m_place[:, :, None] & (o_lane >= 0)[None, None, :]
        before = tl.load(residual + offsets, mask=mask, other=0).to(tl.int32)
        total = before
        p_bits = received + place
        for _ in range(AUTHORS):
            bits = tl.load(p_bits, mask=m_place, other=0).to(tl.int32)
            p_bits += groups * 16
            total += UNITS - 2 * UNITS * ((bits[:, :, None] >> o_lane[None, None, :]) & 1)
        negative = total < 0
        loudness = tl.reshape(tl.abs(total), (GROUPS, 128))
        full: tl.constexpr = UNITS * AUTHORS
        taken = tl.minimum(tl.maximum((tl.sum(loudness, axis=1) + 64) // 128, 1), full)
        taken = tl.where(tl.max(loudness, axis=1) > LOUDEST * full, full, taken)
        loud = (tl.load(scale + group, mask=group < groups, other=0.0) != 0)[:, None, None]
        after = tl.where(loud, total + tl.where(negative, 1, -1) * taken[:, None, None], before)
        tl.store(residual + offsets, after.to(tl.int16), mask=mask)
        tl.store(out + place, tl.sum(negative.to(tl.int32) << o_lane[None, None, :], axis=2).to(tl.uint8), mask=m_place)
        tl.store(size + group, taken.to(tl.uint8), mask=group < groups)

    @triton.jit
    def decode_kernel(bits, size, scale, gradient, groups, inverse, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        """gradient fp32 [groups * 128] = +-scale * (size * inverse) of its group."""
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        o_byte, o_lane = tl.arange(0, 16), tl.arange(0, 8)
        m_place = (group < groups)[:, None] & (o_byte >= 0)[None, :]
        packed = tl.load(bits + group[:, None] * 16 + o_byte[None, :], mask=m_place, other=0).to(tl.int32)
        s = tl.load(scale + group, mask=group < groups, other=0.0)
        amount = (s * (tl.load(size + group, mask=group < groups, other=0).to(tl.float32) * inverse))[:, None, None]
        sign = 1 - 2 * ((packed[:, :, None] >> o_lane[None, None, :]) & 1)
        offsets = group[:, None, None] * 128 + o_byte[None, :, None] * 8 + o_lane[None, None, :]
        mask = m_place[:, :, None] & (o_lane >= 0)[None, None, :]
        tl.store(gradient + offsets, amount * sign.to(tl.float32), mask=mask)


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


def average(received: Tensor, residual: Tensor, scale: Tensor, out: Tensor, size: Tensor, backend: BackendName | None = None) -> None:
    """out uint8 [n / 8] and size uint8 [n / 128]: the average of the authors' bits, uint8 [R, n / 8]; what it loses stays in `residual`,
    int16 [n], zero at first, in place.

    scale as for `encode`. Raises ValueError for more than MAX_AUTHORS, and for lengths that do not match.
    """
    authors = received.shape[0]
    if authors > MAX_AUTHORS:
        raise ValueError(f"{authors} authors, at most {MAX_AUTHORS} can be averaged")
    if residual.numel() != 8 * out.numel() or received.shape[1] != out.numel() or size.numel() * GROUP != residual.numel():
        raise ValueError(f"{residual.numel()} residuals, {received.shape[1]} bytes of each author and {size.numel()} sizes do not fit")
    if _by_kernel(residual.numel(), scale, backend):
        average_kernel[_grid(scale.numel())](
            received, residual, scale, out, size, scale.numel(), AUTHORS=authors, UNITS=UNITS, LOUDEST=_LOUDEST, GROUPS=_BLOCK_GROUPS,
            num_warps=4,
        )  # fmt: skip
    else:
        ref_average(received, residual, scale, out, size)


def decode(bits: Tensor, size: Tensor, scale: Tensor, gradient: Tensor, authors: int, backend: BackendName | None = None) -> None:
    """gradient fp32 [n] from what `average` gave, at least [n / 8] and [n / 128]. scale as for `encode`."""
    if bits.numel() * 8 < gradient.numel() or size.numel() * GROUP < gradient.numel():
        raise ValueError(f"{bits.numel()} bytes and {size.numel()} sizes are too few for {gradient.numel()} elements")
    if _by_kernel(gradient.numel(), scale, backend):
        inverse = 1.0 / (UNITS * authors)
        decode_kernel[_grid(scale.numel())](bits, size, scale, gradient, scale.numel(), inverse, GROUPS=_BLOCK_GROUPS, num_warps=4)
    else:
        ref_decode(bits, size, scale, gradient, authors)


def _by_kernel(elements: int, scale: Tensor, backend: BackendName | None) -> bool:
    """Raises ValueError if `scale` is neither for every group of 128 nor for every element."""
    if scale.numel() not in (elements, elements // GROUP) or elements % GROUP:
        raise ValueError(f"{scale.numel()} scales do not fit {elements} elements: one for each, or one for {GROUP}")
    whole_groups = scale.numel() * GROUP == elements
    return whole_groups and elements > 0 and choose(scale.device, backend).name == "triton"
