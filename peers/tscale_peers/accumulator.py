"""What the owner of chunks has received and no sum contains yet.

Enters: contributions addressed to this peer, checked; sums that it published. Leaves: when a chunk is due, the values to encode, and the
list of contributions that the sum contains.
Rule: A += c*q for each contribution, once; a sum is codec(A); A -= sum. What the codec lost stays in A (two-level error feedback), so what
authors gave comes out in full, if not at once. All in integer units of the chunk, so B + sum of all d + sum of all A is conserved to the
last bit, d being on the grid.
A chunk is due when as many contributions wait as there are peers that train, which is once per mean interval whatever the owner's own
speed; or when the oldest has waited for two intervals of its authors; or when the list is full.

In a checkpoint: A, what waits in it, and which contributions were ever taken. Sums that the log has and the checkpoint lacks were made of
contributions that are lost with the crash: for these chunks A starts at zero, and what they list counts as taken.
Thread-safe by one lock: contributions are taken off the loop, sums are made by the thread that meets.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from tscale_peers import included, limits, ranges
from tscale_peers.codec import CodecMemory, Delta
from tscale_peers.errors import refuse
from tscale_peers.included import ShortId
from tscale_peers.layout import Chunk
from tscale_peers.packet import Packet, Terms
from tscale_peers.ranges import Range

SAVED_VERSION = 1
Numbers = dict[ShortId, list[Range]]
"""Contributions: canonical ranges of numbers by author."""


@dataclass(slots=True)
class _Sum:
    """One chunk. `units`: A, flat, in the codec's integers. `bound`: no |value| of it is larger."""

    units: Tensor
    bound: float = 0.0
    waiting: Numbers = field(default_factory=dict)
    count: int = 0
    batches: int = 0
    since: float = 0.0
    memory: CodecMemory = field(default_factory=CodecMemory)


class _SavedChunk(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    chunk: int
    units: bytes
    waiting: dict[ShortId, list[Range]]
    taken: dict[ShortId, list[Range]]
    batches: int
    published: int
    """Number of the newest sum."""


class _Saved(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    batches: int
    chunks: list[_SavedChunk]


class Accumulators:
    """See the module's head. Chunks come into being with the first contribution to them, whoever should own them."""

    def __init__(self, me: bytes, terms: Terms, most_batches: int = limits.count_max) -> None:
        """me: this peer's public key. most_batches: what one contribution counts for at most, whatever it states."""
        self.batches = 0
        """Batches of all authors that the sums of chunk 0 have stated so far."""
        self.closed = False
        """This peer leaves: nothing more is taken."""
        self.taken = 0
        """Contributions summed since the start."""
        self._me = me
        self._terms = terms
        self._most_batches = most_batches
        self._lock = threading.Lock()
        self._sums: dict[int, _Sum] = {}
        self._known: dict[int, Numbers] = {}
        """Chunk -> contributions ever taken."""
        self._published: dict[int, int] = {}
        self._spacing_s = 0.0
        self._heard: dict[tuple[int, ShortId], float] = {}

    # -- contributions -------------------------------------------------------------------------------------------------

    def take(self, packet: Packet, now: float) -> None:
        """A += c*q of a checked contribution.

        Raises Refused, before anything has changed: "wrong-owner", "contribution-known", "owner-busy", "out-of-range".
        """
        header, chunk = packet.header, self._terms.layout.chunks[packet.chunk]
        author = included.short_id(packet.stream_key)
        if header.owner != self._me:
            raise refuse("wrong-owner", f"a contribution to chunk {chunk.index} that is addressed to another peer")
        if self.closed:
            raise refuse("owner-busy", f"a contribution to chunk {chunk.index} came while this peer leaves; its author takes it back")
        with self._lock:
            known = self._known.get(chunk.index, {}).get(author, [])
            if ranges.contains(known, packet.seq):
                raise refuse("contribution-known", f"contribution {packet.seq} to chunk {chunk.index} is summed already")
            sum_ = self._sums.get(chunk.index)
            self._check_room(chunk, sum_, author, packet.delta)
            if sum_ is None:
                sum_ = self._sums[chunk.index] = self._new_sum(chunk)
            packet.delta.add_to(sum_.units)
            sum_.bound += packet.delta.largest_step
            ranges.insert(sum_.waiting.setdefault(author, []), packet.seq)
            self._note_known(chunk.index, author, [(packet.seq, packet.seq)])
            sum_.since = sum_.since if sum_.count else now
            sum_.count += 1
            sum_.batches += min(header.batches_total, self._most_batches)
            self.taken += 1
            self._note_spacing(chunk.index, author, now)

    def _check_room(self, chunk: Chunk, sum_: _Sum | None, author: ShortId, delta: Delta) -> None:
        if sum_ is None:
            return
        mine = sum(last - first + 1 for first, last in sum_.waiting.get(author, ()))
        if mine >= limits.waiting_per_author or included.count(sum_.waiting) >= limits.included_entries:
            raise refuse("owner-busy", f"more contributions to chunk {chunk.index} than one sum can list: {mine} of this author wait")
        if sum_.bound + delta.largest_step > limits.basepoint_range:
            low, high = torch.aminmax(sum_.units)
            sum_.bound = max(-low.item(), high.item())
            if sum_.bound + delta.largest_step > limits.basepoint_range:
                raise refuse("out-of-range", f"contributions to chunk {chunk.index} add up to more than 2**30 units")

    def _new_sum(self, chunk: Chunk) -> _Sum:
        return _Sum(torch.zeros(chunk.size, dtype=self._terms.codec_of(chunk).basepoint_dtype))

    def _note_known(self, chunk: int, author: ShortId, numbers: Iterable[Range]) -> None:
        """Bounded: of many gaps the oldest is closed, so what came before counts as known; authors long silent are forgotten."""
        known = self._known.setdefault(chunk, {})
        pairs = known.pop(author, [])
        for first, last in numbers:
            for number in range(first, last + 1):
                ranges.insert(pairs, number)
        if len(pairs) > limits.known_ranges:
            pairs[0:2] = [(pairs[0][0], pairs[1][1])]
        known[author] = pairs
        if len(known) > limits.known_authors:
            known.pop(next(iter(known)))

    def _note_spacing(self, chunk: int, author: ShortId, now: float) -> None:
        """How often authors contribute to one chunk, on average."""
        before = self._heard.pop((chunk, author), None)
        self._heard[chunk, author] = now
        if len(self._heard) > limits.known_authors:
            self._heard.pop(next(iter(self._heard)))
        if before is not None:
            self._spacing_s += limits.spacing_weight * (now - before - self._spacing_s) if self._spacing_s else now - before

    # -- sums ----------------------------------------------------------------------------------------------------------

    def due(self, now: float, training_peers: int) -> list[int]:
        """Chunks of which a sum should be published now."""
        patience = max(limits.sum_patience_s, 2 * self._spacing_s)
        with self._lock:
            return [
                chunk
                for chunk, sum_ in self._sums.items()
                if sum_.count >= max(1, training_peers)
                or (sum_.count and now - sum_.since >= patience)
                or included.count(sum_.waiting) >= limits.included_entries
            ]

    def waiting(self) -> list[int]:
        """Chunks with contributions that no sum lists yet."""
        with self._lock:
            return [chunk for chunk, sum_ in self._sums.items() if sum_.count]

    def encode_sum(self, chunk: Chunk) -> tuple[bytes, bytes, int]:
        """(payload, list of contributions, batches that they state if it is chunk 0). Nothing changes until `published`.

        More contributions may be taken meanwhile; they go into the next sum.
        """
        with self._lock:
            sum_ = self._sums[chunk.index]
            values = sum_.units.to(torch.float32)
            listed = included.encode(sum_.waiting)
            batches = sum_.batches if chunk.index == 0 else 0
        for s in chunk.segments:
            values[s.start : s.stop].mul_(s.unit)
        coefficient = self.coefficient
        return self._terms.codec_of(chunk, is_sum=True).encode(values, chunk, coefficient, sum_.memory), listed, batches

    @property
    def coefficient(self) -> float:
        """c of sums: all of A that the run allows to go out at once."""
        return min(1.0, self._terms.max_coefficient)

    def published(self, packet: Packet, batches: int) -> None:
        """A -= sum, which everybody adds; what it lists waits no more."""
        with self._lock:
            sum_ = self._sums[packet.chunk]
            packet.delta.add_to(sum_.units, sign=-1)
            sum_.bound += packet.delta.largest_step
            for author, first, last in included.decode(packet.header.included):
                left = ranges.subtract(sum_.waiting.get(author, []), [(first, last)])
                sum_.count -= last - first + 1
                if left:
                    sum_.waiting[author] = left
                else:
                    sum_.waiting.pop(author, None)
            sum_.batches -= batches
            self.batches += batches
            self._published[packet.chunk] = packet.seq

    def remove_idle(self, keep: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Chunks other than `keep` in which nothing waits, with what the codec has lost so far: the caller takes that over."""
        with self._lock:
            idle = [chunk for chunk, sum_ in self._sums.items() if not sum_.count and chunk not in set(keep)]
            return [(chunk, self._sums.pop(chunk).units) for chunk in idle]

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """For a checkpoint."""
        with self._lock:
            chunks = sorted(self._known.keys() | self._sums.keys())
            saved = [self._saved_chunk(chunk, self._sums.get(chunk)) for chunk in chunks]
            return msgspec.msgpack.encode(_Saved(SAVED_VERSION, self.batches, saved))

    def _saved_chunk(self, chunk: int, sum_: _Sum | None) -> _SavedChunk:
        known, published = self._known.get(chunk, {}), self._published.get(chunk, 0)
        if sum_ is None:
            return _SavedChunk(chunk, b"", {}, known, 0, published)
        array = sum_.units.cpu().numpy()
        return _SavedChunk(
            chunk, array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(), sum_.waiting, known, sum_.batches, published
        )

    def restore(self, saved: bytes, later: Iterable[Packet], now: float) -> None:
        """Continue from what `encode` gave. later: own sums from the log, all or only those that the checkpoint may lack.

        Raises Refused("bad-checkpoint").
        """
        try:
            state = msgspec.msgpack.decode(saved, type=_Saved) if saved else _Saved(SAVED_VERSION, 0, [])
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise refuse("bad-checkpoint", f"the checkpoint's sums cannot be read: {error}") from None
        if state.version != SAVED_VERSION:
            raise refuse("bad-checkpoint", f"the checkpoint's sums have format {state.version}, not {SAVED_VERSION}")
        self.batches = state.batches
        for entry in state.chunks:
            self._restore_chunk(entry, now)
        for packet in sorted(later, key=lambda packet: packet.seq):
            self._settle(packet)

    def _restore_chunk(self, entry: _SavedChunk, now: float) -> None:
        self._known[entry.chunk] = entry.taken
        self._published[entry.chunk] = entry.published
        if not entry.units:
            return
        sum_ = self._new_sum(self._terms.layout.chunks[entry.chunk])
        if len(entry.units) != sum_.units.numel() * sum_.units.element_size():
            raise refuse("bad-checkpoint", f"the checkpoint's sum of chunk {entry.chunk} does not fit this run")
        sum_.units.copy_(torch.frombuffer(bytearray(entry.units), dtype=sum_.units.dtype))
        low, high = torch.aminmax(sum_.units)
        sum_.bound = max(-low.item(), high.item())
        sum_.waiting, sum_.batches, sum_.since = entry.waiting, entry.batches, now
        sum_.count = sum(last - first + 1 for pairs in entry.waiting.values() for first, last in pairs)
        self._sums[entry.chunk] = sum_

    def _settle(self, packet: Packet) -> None:
        """An own sum that was published after the checkpoint."""
        if packet.seq <= self._published.get(packet.chunk, 0):
            return
        self._published[packet.chunk] = packet.seq
        self.batches = max(self.batches, packet.header.batches_total)
        self._sums.pop(packet.chunk, None)
        for author, first, last in included.decode(packet.header.included):
            self._note_known(packet.chunk, author, [(first, last)])
