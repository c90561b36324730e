"""Codecs over the displacements of many peers at once, as the rules bench needs them: dense integer steps instead of payload bytes.

Enters: displacements [P, n] of P peers and a coefficient c. Leaves: c * codec(d) as int32 [P, n], multiples of the grid's unit. Signs,
picks, codes and steps come from the kernels that the swarm's own codecs call, so every value is the one that a packet would add; only the
packing into bytes is left out, and a payload's size is computed.

    none          every value rounded to the grid                                                                      (4 bytes)
    fp16          half precision; what the original sends                                                              (2 bytes)
    sign          one bit, and the mean magnitude of each row                                              (delta_onebit)
    topk-K        of every 4096 values the K largest: sign, one power of two for all                       (delta_topk)
    topk-2bit-K   the same picks in two magnitudes, L and 2 L, of the L = 2**e that loses least            (K = 64 if it is left out)
    int8, int4    a code per value, a step per 128 values                                                  (delta_int8; int4: codes to +-7)

Sizes of picks are those of Rice-coded gaps at random places; headers and signatures (1 % of a packet of a large model) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.model.shape import ModelShape
from tscale_fed.new_run import UNIT_EXPONENT
from tscale_kernels import delta_int8, delta_onebit, delta_topk, limits
from tscale_net.errors import Refused

UNIT = 2.0**UNIT_EXPONENT
DEFAULT_PICKS = 64
_INT4_LARGEST = 7
_FP16_SCALE = 1024.0
"""Displacements are near 1e-3: scaled like this they are normal numbers of fp16."""

Span = tuple[int, int]


@dataclass(frozen=True)
class FlatMap:
    """Where the matrices of a model lie in its flat vector, joined as far as one kernel call can take them."""

    size: int
    rows: dict[int, list[Span]]
    """Columns -> spans of whole rows of that length."""
    stretches: list[Span]
    """Spans whose stretches of 4096 values are those of their matrices."""

    @staticmethod
    def of(shape: ModelShape) -> FlatMap:
        rows: dict[int, list[Span]] = {}
        stretches: list[Span] = []
        at = 0
        for _, height, width in shape.tensors():
            span = (at, at + height * width)
            _join(rows.setdefault(width, []), span, True)
            aligned = bool(stretches) and (stretches[-1][1] - stretches[-1][0]) % limits.topk_stretch == 0
            _join(stretches, span, aligned)
            at = span[1]
        return FlatMap(at, rows, stretches)


def _join(spans: list[Span], span: Span, may: bool) -> None:
    if may and spans and spans[-1][1] == span[0]:
        spans[-1] = (spans[-1][0], span[1])
    else:
        spans.append(span)


@dataclass(frozen=True)
class StackedCodec:
    """See the module. `encode(d, c)`: d fp32 [P, n] contiguous, any device. Raises ValueError if a value is not finite."""

    name: str
    bytes_per_value: float
    encode: Callable[[Tensor, float], Tensor]


def codec_of(name: str, flat: FlatMap) -> StackedCodec:
    """Raises Refused("bad-bench") for a name that is unknown."""
    if name == "none":
        return StackedCodec(name, 4.0, _rounded)
    if name == "fp16":
        return StackedCodec(name, 2.0, lambda d, c: _rounded((d * _FP16_SCALE).half().float() / _FP16_SCALE, c))
    if name == "sign":
        all_rows = sum((stop - start) // columns for columns, spans in flat.rows.items() for start, stop in spans)
        return StackedCodec(name, 0.125 + 2.0 * all_rows / flat.size, lambda d, c: _signs(d, c, flat))
    if name == "int8":
        return StackedCodec(name, 1.0 + 2.0 / limits.delta_block, _int8)
    if name == "int4":
        return StackedCodec(name, 0.5 + 2.0 / limits.delta_block, _int4)
    words = name.split("-")
    two_bit = words[:2] == ["topk", "2bit"]
    rest = words[2:] if two_bit else words[1:]
    if words[0] == "topk" and len(rest) <= 1 and all(each.isdecimal() for each in rest):
        k = int(rest[0]) if rest else DEFAULT_PICKS
        if 1 <= k <= limits.topk_stretch:
            size = (k * (rice_bits(k) + (2.0 if two_bit else 1.0)) + 8.0) / limits.topk_stretch / 8.0
            return StackedCodec(name, size, lambda d, c: _picks(d, c, k, two_bit, flat))
    known = "none, fp16, sign, topk-K, topk-2bit-K, int8, int4"
    raise Refused("bad-bench", f"codec '{name}' is unknown; known are {known}, K of 1 to {limits.topk_stretch}")


def rice_bits(k: int) -> float:
    """Bits per gap between k random places of 4096, with the best Rice parameter."""
    density = k / limits.topk_stretch

    def bits(parameter: int) -> float:
        beyond = (1.0 - density) ** (1 << parameter)
        return parameter + 1 + beyond / (1.0 - beyond)

    return min(bits(parameter) for parameter in range(12))


# -- each value --------------------------------------------------------------------------------------------------------


def _rounded(d: Tensor, c: float) -> Tensor:
    _check(d)
    return torch.round(d.double() * (c / UNIT)).clamp_(-limits.max_step, limits.max_step).int()


def _int8(d: Tensor, c: float) -> Tensor:
    flat = d.reshape(-1, limits.delta_block)
    codes, steps = delta_int8.encode(flat, c, UNIT_EXPONENT)
    out = torch.zeros_like(flat, dtype=torch.int32)
    delta_int8.apply(out, codes, steps)
    return out.view(d.shape)


def _int4(d: Tensor, c: float) -> Tensor:
    """As int8, with 7 for 127."""
    _check(d)
    blocks = d.reshape(-1, limits.delta_block)
    units = blocks.abs().amax(1) * (c * 2.0**-UNIT_EXPONENT)
    found = torch.ceil(units * (1.0 / _INT4_LARGEST)).clamp(1.0, limits.max_block_step)
    step = torch.where(units > 0, found, torch.zeros_like(found))
    scaled = blocks * (c * 2.0**-UNIT_EXPONENT) * step.clamp(min=1.0).reciprocal()[:, None]
    codes = scaled.clamp_(-_INT4_LARGEST, _INT4_LARGEST).round_().int()
    return (codes * step.int()[:, None]).view(d.shape)


def _check(d: Tensor) -> None:
    if not bool(torch.isfinite(d).all()):
        raise ValueError("the displacement holds NaN or infinite values")


# -- rows --------------------------------------------------------------------------------------------------------------


def _signs(d: Tensor, c: float, flat: FlatMap) -> Tensor:
    out = torch.empty(d.shape, dtype=torch.int32, device=d.device)
    for columns, spans in flat.rows.items():
        rows = gathered(d, spans).view(-1, columns)
        bits, steps = delta_onebit.encode(rows, c, UNIT_EXPONENT)
        decoded = torch.zeros_like(rows, dtype=torch.int32)
        delta_onebit.apply(decoded, bits, steps)
        scatter(decoded.view(d.shape[0], -1), spans, out)
    return out


def gathered(d: Tensor, spans: Sequence[Span]) -> Tensor:
    """The spans of every peer, side by side: [P, values], a copy."""
    return torch.cat([d[:, start:stop] for start, stop in spans], 1)


def scatter(values: Tensor, spans: Sequence[Span], out: Tensor) -> None:
    """The way back."""
    at = 0
    for start, stop in spans:
        out[:, start:stop] = values[:, at : at + stop - start]
        at += stop - start


# -- picks -------------------------------------------------------------------------------------------------------------


def _picks(d: Tensor, c: float, k: int, two_bit: bool, flat: FlatMap) -> Tensor:
    out = torch.empty(d.shape, dtype=torch.int32, device=d.device)
    for start, stop in flat.stretches:
        values = d[:, start:stop].contiguous()
        if (stop - start) % limits.topk_stretch == 0:
            decoded = _decoded_picks(values.view(-1, limits.topk_stretch), c, k, two_bit).view_as(values)
        else:  # a last stretch is shorter: peers may not be joined
            decoded = torch.stack([_decoded_picks(peer.view(1, -1), c, k, two_bit).view(-1) for peer in values])
        out[:, start:stop] = decoded
    return out


def _decoded_picks(values: Tensor, c: float, k: int, two_bit: bool) -> Tensor:
    picks, exponents = delta_topk.encode(values, c, UNIT_EXPONENT, k)
    decoded = torch.zeros_like(values, dtype=torch.int32)
    delta_topk.apply(decoded, picks, exponents, k)
    return _two_magnitudes(values, decoded, c) if two_bit else decoded


def _two_magnitudes(values: Tensor, decoded: Tensor, c: float) -> Tensor:
    """Of every stretch the picked values (+-2**e in `decoded`) as +-L or +-2 L, L the power of two up to 2**e that loses least."""
    size = values.numel()
    short = -size % limits.topk_stretch
    wanted = torch.nn.functional.pad(values.reshape(-1) * (c * 2.0**-UNIT_EXPONENT), (0, short)).view(-1, limits.topk_stretch)
    sign = torch.nn.functional.pad(decoded.reshape(-1), (0, short)).view(-1, limits.topk_stretch).sign()
    level = decoded.abs().reshape(-1)
    level = torch.nn.functional.pad(level, (0, short)).view(-1, limits.topk_stretch).amax(1, keepdim=True)
    least = torch.full_like(level, math.inf, dtype=torch.float64)
    chosen = torch.zeros_like(sign)
    for halvings in range(3):
        low = (level >> halvings).clamp(min=1)
        trial = sign * torch.where(wanted.abs() > 1.5 * low, 2 * low, low)
        lost = torch.where(sign != 0, (wanted - trial).double().square(), 0.0).sum(1, keepdim=True)
        better = lost < least
        chosen = torch.where(better, trial, chosen)
        least = torch.where(better, lost, least)
    return chosen.reshape(-1)[:size].view(values.shape).int()
