"""Codecs "topk-sign" and "topk-2bit": the largest values alone, with shared power-of-two sizes and Rice-coded places.

Enters and leaves: as every codec (codec_contract.py). The values of each tensor's part of a chunk are cut into stretches of 4096; of each,
the K of largest magnitude are picked (K = 64 unless the name says otherwise; all of a stretch that has no more).
topk-sign: a pick adds or takes away 2**e units, one e per stretch (`tscale_kernels.delta_topk` says which).
topk-2bit: a pick adds or takes away 2**e or 3 * 2**e units. Of six e around the logarithm of the picks' mean the one with the least squared
    error, in whole units; a pick is large if it is above twice 2**e. Of the pairs of sizes tried (1:2, 1:4, 2:3, 3:4 and others) 1:3
    leaves least on heavy-tailed values and close to the least on Gaussian ones (`tscale_fed.bench codecs` shows both codecs).
A stretch of zeros has no picks. What is not sent stays in the author's displacement (TopK-SGD with error feedback, Stich et al. 2018;
SparseLoCo's stretches of 4096). The choice is made by integers and comparisons, so every device encodes the same bytes.

Payload, all parts bit strings, lowest bit first, filled up with zero bits to whole bytes:
    u8 r                the Rice parameter, 0..11: the least that makes the payload of these picks shortest
    5 bit planes        e + 1 of every stretch (0: a stretch of zeros): the lowest bits of all stretches, then the next ones, ...
                        topk-2bit has 2 planes more: has large picks; has small picks
    bit planes of the picks, in ascending order: r planes of gap & (2**r - 1); sign (set if negative); then, in topk-2bit, set if large, of
                        the picks in stretches that have both
    unary               of every pick: gap >> r zeros, then a one
A gap is the number of values skipped since the pick before in the same stretch, or since its start. Error feedback keeps the picks of a
stretch close to the size at which they are sent, so in training hardly any stretch has both sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tscale_kernels import delta_topk
from tscale_kernels.limits import max_step, topk_max_exponent, topk_stretch
from tscale_peers import limits
from tscale_peers.codec_contract import CodecMemory, Placed, host_array, not_finite
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk
from tscale_peers.rice import BitReader, Bits, Ints, best_parameter, bytes_of, is_best_parameter, numbers_of, pack, planes_of

_EXPONENT_BITS = 5
_LARGE = 3
_CANDIDATES = range(-3, 3)
"""Exponents tried beside the logarithm of the mean."""


# -- where the stretches lie -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The stretches of a chunk, one after the other: first value, length, and number of picks unless all values are zero. int64 [S]."""

    starts: Ints
    lengths: Ints
    counts: Ints

    @staticmethod
    def of(chunk: Chunk, k: int) -> _Plan:
        starts = np.concatenate([np.arange(s.start, s.stop, topk_stretch) for s in chunk.segments])
        ends = np.concatenate([np.minimum(np.arange(s.start, s.stop, topk_stretch) + topk_stretch, s.stop) for s in chunk.segments])
        return _Plan(starts, ends - starts, np.minimum(ends - starts, k))

    @cached_property
    def picks(self) -> int:
        return int(self.counts.sum())

    def spread(self, r: int) -> int:
        """Largest sum of `gap >> r` over all picks."""
        return int(((self.lengths - self.counts) >> r).sum())


def _picks_before(counts: Ints) -> Ints:
    """Number of picks before each stretch."""
    before: Ints = np.cumsum(counts) - counts
    return before


# -- delta -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """Placed: place in the chunk and step, int32 [picks]. ends: number of picks up to the end of each segment."""

    chunk: Chunk
    placed: Placed
    ends: tuple[int, ...]
    largest_step: int

    def add_to(self, basepoint: Tensor, sign: int = 1) -> None:
        places, steps = self.placed.on(basepoint.device)
        basepoint.index_add_(0, places, steps, alpha=sign)

    @staticmethod
    def add_many(deltas: Sequence[SparseDelta], basepoint: Tensor) -> None:
        """`add_to` of several deltas of one chunk in one operation (delta_batch.py); places may repeat, integers add up in any order."""
        placed = [delta.placed.on(basepoint.device) for delta in deltas]
        places, steps = (torch.cat(listed) for listed in zip(*placed, strict=True))
        basepoint.index_add_(0, places, steps)

    def take_from(self, displacement: Tensor, divisor: float = 1.0) -> None:
        places, steps = self.placed.on(displacement.device)
        first = 0
        for s, end in zip(self.chunk.segments, self.ends, strict=True):
            amounts = (steps[first:end].to(torch.float64) * (s.unit / divisor)).to(displacement.dtype)
            displacement.index_add_(0, places[first:end], amounts, alpha=-1)
            first = end


# -- codecs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TopkCodec:
    """See the module's head. k: picks per stretch. two_sizes: topk-2bit."""

    name: str = "topk-sign"
    k: int = limits.topk_default
    two_sizes: bool = False
    basepoint_dtype: torch.dtype = torch.int32

    def max_payload_bytes(self, chunk: Chunk) -> int:
        plan = _Plan.of(chunk, self.k)
        costs = []
        for r in range(limits.rice_max_parameter + 1):
            costs.append(bytes_of(plan.picks * (r + 1 + self.two_sizes)) + bytes_of(plan.picks + plan.spread(r)))
        # The encoder takes the fewest bits, which in whole bytes may be one more than the fewest bytes.
        return 1 + bytes_of(self._stretch_bits * len(plan.counts)) + min(costs) + 1

    def encode(self, displacement: Tensor, chunk: Chunk, coefficient: float, memory: CodecMemory | None = None) -> bytes:
        picks, exponents, large = self._pick(displacement, chunk, coefficient)
        if bool((exponents < -1).any()):
            raise not_finite(chunk)
        counts = _Plan.of(chunk, self.k).counts
        sent = np.repeat(exponents >= 0, counts)
        position = picks[sent] >> 1
        before = np.empty_like(position)
        before[1:] = position[:-1]
        before[_firsts(np.where(exponents >= 0, counts, 0))] = -1
        gaps = position - before - 1
        r = best_parameter(gaps)
        shape, sizes = _planes_of_sizes(large[sent], np.where(exponents >= 0, counts, 0)) if self.two_sizes else ([], [])
        planes = [*planes_of(gaps, r), (picks[sent] & 1).astype(np.uint8), *sizes]
        unary = np.zeros(len(gaps) + int((gaps >> r).sum()), dtype=np.uint8)
        unary[np.cumsum((gaps >> r) + 1) - 1] = 1
        return bytes([r]) + pack([*planes_of(exponents + 1, _EXPONENT_BITS), *shape]) + pack(planes) + pack([unary])

    def open(self, payload: bytes, chunk: Chunk) -> SparseDelta:
        most = self.max_payload_bytes(chunk)
        if len(payload) > most:
            raise refuse("packet-oversized", f"a payload of {len(payload)} bytes where its chunk and codec allow {most}")
        plan, reader = _Plan.of(chunk, self.k), BitReader(payload)
        r = reader.byte()
        if r > limits.rice_max_parameter:
            raise refuse("packet-payload", f"Rice parameter {r}, which no encoder writes")
        shape = reader.planes(self._stretch_bits, len(plan.counts))
        exponents = numbers_of(shape[:_EXPONENT_BITS]) - 1
        self._check_exponents(exponents, chunk)
        counts = np.where(exponents >= 0, plan.counts, 0)
        both = np.repeat(_both_sizes(shape[_EXPONENT_BITS:], exponents), counts) if self.two_sizes else np.zeros(0, np.bool_)
        picks = int(counts.sum())
        bits = reader.bits((r + 1) * picks + int(both.sum()))
        gaps = reader.unary(picks) << r | numbers_of(bits[: r * picks].reshape(r, picks))
        if not is_best_parameter(gaps, r):
            raise refuse("packet-payload", f"Rice parameter {r} is not the one that makes the payload of these picks shortest")
        places = self._places(gaps, counts, plan, chunk)
        steps = np.left_shift(1, np.repeat(exponents, counts))
        if self.two_sizes:
            large = np.repeat(shape[_EXPONENT_BITS], counts)
            large[both] = bits[(r + 1) * picks :]
            _check_both(large, both, counts, chunk)
            steps = np.where(large != 0, _LARGE * steps, steps)
        signed = np.where(bits[r * picks : (r + 1) * picks] != 0, -steps, steps)
        ends = np.searchsorted(places, [s.stop for s in chunk.segments])
        placed = Placed(torch.from_numpy(places.astype(np.int32)), torch.from_numpy(signed.astype(np.int32)))
        return SparseDelta(chunk, placed, tuple(int(end) for end in ends), int(steps.max(initial=0)))

    @property
    def _stretch_bits(self) -> int:
        return _EXPONENT_BITS + 2 * self.two_sizes

    def _check_exponents(self, exponents: Ints, chunk: Chunk) -> None:
        most = topk_max_exponent - 2 * self.two_sizes  # 3 * 2**22 is below max_step
        if int(exponents.max()) > most:
            at = int(exponents.argmax())
            raise refuse("packet-scale", f"stretch {at} of chunk {chunk.index} has exponent {int(exponents[at])}, above {most}")

    def _places(self, gaps: Ints, counts: Ints, plan: _Plan, chunk: Chunk) -> Ints:
        """Places in the chunk, ascending. counts: picks of each stretch."""
        sums = np.concatenate([[0], np.cumsum(gaps + 1)])
        skipped = sums[_picks_before(counts)]
        if bool((sums[np.cumsum(counts)] - skipped > plan.lengths).any()):
            raise refuse("packet-payload", f"chunk {chunk.index} has a pick beyond the end of its stretch")
        places: Ints = sums[1:] - 1 + np.repeat(plan.starts - skipped, counts)
        return places

    def _pick(self, displacement: Tensor, chunk: Chunk, coefficient: float) -> tuple[Ints, Ints, Bits]:
        """Picks and exponents as delta_topk has them, in segment order; of two sizes also which picks are large."""
        picks, exponents, large = [], [], []
        for s in chunk.segments:
            values = s.matrix(displacement)
            found, exponent = delta_topk.encode_unchecked(values, coefficient, s.unit_exponent, self.k)
            if self.two_sizes and s.stop > s.start:
                exponent, is_large = _two_sizes(values, found, exponent, coefficient * 2.0**-s.unit_exponent, self.k)
                large.append(is_large)
            picks.append(found)
            exponents.append(exponent)
        bits = host_array(large) if self.two_sizes else np.empty(0, dtype=np.uint8)
        return host_array(picks).astype(np.int64), host_array(exponents).astype(np.int64), bits


def _large_picks(large: Bits, counts: Ints) -> Ints:
    """How many of each stretch's picks are large."""
    sums = np.concatenate([[0], np.cumsum(large, dtype=np.int64)])
    before = _picks_before(counts)
    many: Ints = sums[before + counts] - sums[before]
    return many


def _planes_of_sizes(large: Bits, counts: Ints) -> tuple[list[Bits], list[Bits]]:
    """(has large, has small) of every stretch; large, of the picks in stretches that have both. counts: picks of each stretch."""
    many = _large_picks(large, counts)
    has_large, has_small = (many > 0).astype(np.uint8), (many < counts).astype(np.uint8)
    return [has_large, has_small], [large[np.repeat(has_large & has_small, counts) != 0]]


def _both_sizes(shape: Bits, exponents: Ints) -> NDArray[np.bool_]:
    """Which stretches have picks of both sizes. shape: the planes of `_planes_of_sizes`. Raises Refused if one has none, or zeros some."""
    if bool(((shape[0] | shape[1] != 0) != (exponents >= 0)).any()):
        raise refuse("packet-payload", "a stretch whose picks are neither small nor large, or a stretch of zeros with picks")
    both: NDArray[np.bool_] = (shape[0] & shape[1]) != 0
    return both


def _check_both(large: Bits, both: NDArray[np.bool_], counts: Ints, chunk: Chunk) -> None:
    """A stretch that is said to have both sizes has both."""
    ends = np.cumsum(counts)
    stretches = both[(ends - 1)[counts > 0]]
    many, all_of = _large_picks(large, counts)[counts > 0], counts[counts > 0]
    if bool((stretches & ((many == 0) | (many == all_of))).any()):
        raise refuse("packet-payload", f"chunk {chunk.index} has a stretch with one size that is spelt as one with both")


def _firsts(counts: Ints) -> Ints:
    """Number of the first pick of each stretch that has picks."""
    firsts: Ints = _picks_before(counts)[counts > 0]
    return firsts


def _two_sizes(values: Tensor, picks: Tensor, exponents: Tensor, scale: float, k: int) -> tuple[Tensor, Tensor]:
    """Exponents int8 [stretches] for sizes 2**e and 3 * 2**e, and uint8 [picks]: 1 where large. Stretches below 0 stay as they are.

    Squares of units up to 2**24 times 4096 picks stay within int64.
    """
    stretch = torch.arange(len(picks), device=picks.device) // k
    place = stretch * topk_stretch + (picks.to(torch.int64) >> 1)
    units = (values.reshape(-1)[place].float().abs() * scale).clamp(max=float(max_step)).round()
    units = torch.where((exponents >= 0)[stretch], units, torch.zeros_like(units)).to(torch.int64)
    rows = torch.nn.functional.pad(units, (0, -len(units) % k)).view(-1, k)  # filled up with zeros: the same error for every candidate ...
    real = torch.nn.functional.pad(torch.ones_like(units, dtype=torch.bool), (0, -len(units) % k)).view(-1, k)  # ... once masked
    middle = _floor_log2(rows.sum(dim=1) // real.sum(dim=1))
    tried = [(middle + beside).clamp(0, topk_max_exponent - 2) for beside in _CANDIDATES]
    errors = torch.stack([_squared_error(rows, real, e) for e in tried])
    # argmin's choice among equals is not promised to be the first: the first is taken by number.
    first = (errors == errors.amin(dim=0)).to(torch.int8).argmax(dim=0)
    best = torch.stack(tried).gather(0, first[None])[0]
    is_large = rows > (2 << best)[:, None]
    chosen = torch.where(exponents >= 0, best.to(torch.int8), exponents)
    return chosen, is_large.reshape(-1)[: len(picks)].to(torch.uint8)


def _squared_error(rows: Tensor, real: Tensor, exponent: Tensor) -> Tensor:
    small = (rows - (1 << exponent)[:, None]).square()
    large = (rows - (_LARGE << exponent)[:, None]).square()
    return torch.where(real, torch.minimum(small, large), torch.zeros_like(small)).sum(dim=1)


def _floor_log2(values: Tensor) -> Tensor:
    """int64 below 2**53, 0 for 0."""
    return (torch.frexp(values.to(torch.float64)).exponent.to(torch.int64) - 1).clamp(min=0)
