"""Codecs over the displacements of many peers at once, as the rules bench needs them: dense integer steps instead of payload bytes.

Enters: displacements [P, n] of P peers and a coefficient c. Leaves: c * codec(d) as int32 [P, n], multiples of the grid's unit. Signs,
picks, codes and steps come from the kernels that the swarm's own codecs call, so every value is the one that a packet would add (tests
compare them); only the packing into bytes is left out, and a payload's size is computed.

    none          every value rounded to the grid                                                                      (4 bytes)
    fp16          half precision; what the original sends                                                              (2 bytes)
    sign          one bit, and the mean magnitude of each row                                              (delta_onebit)
    topk-K        of every 4096 values the K largest: a sign each, one power of two for all; topk-sign-K     (delta_topk)
    topk-2bit-K   the same picks with two sizes, 2**e and 3 * 2**e                     (as tscale_peers.codec_topk; K = 64 if left out)
    int8, int4    a code per value, a step per 128 or 64 values                                              (delta_int8, delta_int4)

Sizes of picks are those of Rice-coded gaps at random places, and of topk-2bit as if every stretch had both sizes, which is the most that it
takes; headers and signatures (1 % of a packet of a large model) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.model.shape import ModelShape
from tscale_fed.new_run import UNIT_EXPONENT
from tscale_kernels import delta_int4, delta_int8, delta_onebit, delta_topk, limits
from tscale_net.errors import Refused

UNIT = 2.0**UNIT_EXPONENT
DEFAULT_PICKS = 64
_EXPONENT_BITS = 5
_EXPONENTS_TRIED = range(-3, 3)
"""Beside the logarithm of the picks' mean."""
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
        return StackedCodec(name, 0.5 + 2.0 / limits.nibble_block, _int4)
    words = name.split("-")
    two_sizes, plain = words[:2] == ["topk", "2bit"], words[:2] == ["topk", "sign"]
    rest = words[2:] if two_sizes or plain else words[1:]
    if words[0] == "topk" and len(rest) <= 1 and all(each.isdecimal() for each in rest):
        k = int(rest[0]) if rest else DEFAULT_PICKS
        if 1 <= k <= limits.topk_stretch:
            size = (k * (rice_bits(k) + (2.0 if two_sizes else 1.0)) + _EXPONENT_BITS) / limits.topk_stretch / 8.0
            return StackedCodec(name, size, lambda d, c: _picks(d, c, k, two_sizes, flat))
    known = "none, fp16, sign, topk-sign-K, topk-2bit-K, int8, int4"
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
    flat = d.reshape(-1, limits.delta_block)
    packed, steps = delta_int4.encode(flat, c, UNIT_EXPONENT)
    out = torch.zeros_like(flat, dtype=torch.int32)
    delta_int4.apply(out, packed, steps)
    return out.view(d.shape)


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


def _picks(d: Tensor, c: float, k: int, two_sizes: bool, flat: FlatMap) -> Tensor:
    out = torch.empty(d.shape, dtype=torch.int32, device=d.device)
    for start, stop in flat.stretches:
        values = d[:, start:stop].contiguous()
        if (stop - start) % limits.topk_stretch == 0:
            decoded = _decoded_picks(values.view(-1, limits.topk_stretch), c, k, two_sizes).view_as(values)
        else:  # a last stretch is shorter: peers may not be joined
            decoded = torch.stack([_decoded_picks(peer.view(1, -1), c, k, two_sizes).view(-1) for peer in values])
        out[:, start:stop] = decoded
    return out


def _decoded_picks(values: Tensor, c: float, k: int, two_sizes: bool) -> Tensor:
    picks, exponents = delta_topk.encode(values, c, UNIT_EXPONENT, k)
    decoded = torch.zeros_like(values, dtype=torch.int32)
    if two_sizes:
        place = torch.arange(len(picks), device=picks.device) // k * limits.topk_stretch + (picks.long() >> 1)
        units = (values.reshape(-1)[place].abs() * (c * 2.0**-UNIT_EXPONENT)).clamp(max=float(limits.max_step)).round().long()
        steps = two_sizes_of(units, k)
        decoded.view(-1)[place] = torch.where((picks & 1) != 0, -steps, steps).int()
    else:
        delta_topk.apply(decoded, picks, exponents, k)
    return decoded


def two_sizes_of(units: Tensor, k: int) -> Tensor:
    """Magnitudes of picks, int64 units, k to a stretch -> 2**e or 3 * 2**e, e of each stretch that with the least squared error."""
    short = -len(units) % k
    rows = torch.nn.functional.pad(units, (0, short)).view(-1, k)
    real = torch.nn.functional.pad(torch.ones_like(units), (0, short)).view(-1, k)
    middle = (torch.frexp((rows.sum(1) // real.sum(1)).double()).exponent.long() - 1).clamp(min=0)
    tried = [(middle + beside).clamp(0, limits.topk_max_exponent - 2) for beside in _EXPONENTS_TRIED]
    sizes = torch.stack([torch.where(rows > (2 << e)[:, None], (3 << e)[:, None], (1 << e)[:, None]) for e in tried])
    lost = ((rows - sizes).square() * real).sum(2)
    first = (lost == lost.amin(0)).to(torch.int8).argmax(0)
    best = sizes.gather(0, first[None, :, None].expand(1, *rows.shape))[0]
    return torch.where(rows.sum(1, keepdim=True) > 0, best, torch.zeros_like(best)).reshape(-1)[: len(units)]
