"""What this author has given to owners of chunks, and whether a sum contains it yet.

Enters: own contributions, sums that others and this peer publish, the time, the word that an owner is gone. Leaves: what the displacement
has to pay, and what must not be given twice.

A contribution is in one of four states, and only the third changes d:
    open        given to an owner, in no sum that was applied here: part of d still, and of W = B + d, but not encoded again
    taken back  no sum has listed it in time, or its owner is gone: it may be given again, as part of what d holds
    paid        a sum that was applied here lists it: d -= leak*q, as for an own packet; from open, or from taken back (it came late)
    closed      d was set anew while it was open (a snapshot chunk, private work dropped): nobody can tell any more, nothing is owed
So B + d is right whatever becomes of an owner: work that no sum contains stays in d, work that one contains leaves it exactly once.

Contributions are kept, synced, in a log of their own before anybody sees them, as packets are; what is saved with d says which of them d
has paid. After a crash those that were given since are paid at once, and closed: their training is lost with the weights.
One thread at a time (the one that meets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from tscale_peers import included, limits
from tscale_peers.errors import refuse
from tscale_peers.packet import Key, Packet, Terms
from tscale_peers.packet_log import PacketLog

SAVED_VERSION = 2


@dataclass(slots=True)
class _Given:
    """Contributions to one chunk. `open`: number -> (owner's key, when it was given); `back`: those taken back."""

    open: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    back: dict[int, None] = field(default_factory=dict)


class SavedChunk(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a checkpoint keeps of one chunk, as of the moment when its displacement was copied."""

    chunk: int
    open: list[tuple[int, bytes]]
    back: list[int]
    highest: int
    """Newest number given to any chunk at that moment: later ones are not in these lists."""


class _Saved(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    highest: int
    batches: int
    listed_batches: int
    chunks: list[SavedChunk]


class Pledges:
    """See the module's head. `saved`: what `encode` gave, from the checkpoint of the displacement; None: nothing was given before."""

    def __init__(self, stream_key: bytes, log: PacketLog, terms: Terms, saved: bytes | None = None, now: float = 0.0) -> None:
        self.me = included.short_id(stream_key)
        self.batches = 0
        """Own batches that contributions to chunk 0 have stated so far: no packet states them again."""
        self.listed_batches = 0
        """Those of them that are in sums applied here."""
        self.confirmed = 0
        self.taken_back = 0
        self.paid_late = 0
        """Confirmed after having been taken back."""
        self._stream_key = stream_key
        self._log = log
        self._terms = terms
        self._highest = 0
        """Newest number given to any chunk: all contributions of one moment have one number, so that the log drops the oldest first."""
        self._given: dict[int, _Given] = {}
        self._complete: dict[int, int] = {}
        """Up to which number what was restored of a chunk is complete."""
        self._spacing_s = 0.0
        self._given_at: float | None = None
        if saved is not None:
            self._restore(saved, now)
        self.checkpointed()

    @property
    def waiting(self) -> int:
        """Contributions that no sum lists yet."""
        return sum(len(given.open) for given in list(self._given.values()))

    # -- giving --------------------------------------------------------------------------------------------------------

    @property
    def next_number(self) -> int:
        """Of the contributions that are given next."""
        return self._highest + 1

    def may_give(self, chunk: int) -> bool:
        """Is not so much under way already that more would only pile up?"""
        given = self._given.get(chunk)
        return given is None or len(given.open) < limits.pledges_open

    def give(self, contributions: Sequence[tuple[bytes, Packet]], now: float) -> None:
        """Own contributions, (bytes, packet), are about to be sent. Raises Refused("log-write"); then none of them counts."""
        self.keep(contributions)
        self.note(contributions, now)

    def keep(self, contributions: Sequence[tuple[bytes, Packet]]) -> None:
        """The first half of `give`, on any thread: they are in the log, synced, when this returns. Raises Refused("log-write")."""
        self._log.append_all([(body, packet.key) for body, packet in contributions], fsync=True)

    def note(self, contributions: Sequence[tuple[bytes, Packet]], now: float) -> None:
        """The second half: they count as given."""
        for _, packet in contributions:
            self._highest = max(self._highest, packet.seq)
            self._given.setdefault(packet.chunk, _Given()).open[packet.seq] = (packet.header.owner, now)
            self.batches += packet.header.batches_total if packet.chunk == 0 else 0
        if self._given_at is not None:
            self._spacing_s = now - self._given_at
        self._given_at = now

    def body(self, key: Key) -> bytes | None:
        """One own contribution, to be sent. Any thread."""
        return self._log.get(key)

    def open_to(self, chunk: int) -> list[Packet]:
        """Contributions to a chunk that d still holds and that must not be encoded again."""
        return self.read(chunk, self.open_numbers(chunk))

    def open_numbers(self, chunk: int) -> list[int]:
        """Their numbers."""
        given = self._given.get(chunk)
        return list(given.open) if given else []

    def read(self, chunk: int, numbers: Sequence[int]) -> list[Packet]:
        """Own contributions by number, on any thread; those that the log still has."""
        return self._read(chunk, numbers)

    # -- what becomes of it --------------------------------------------------------------------------------------------

    def listed(self, packet: Packet) -> list[Packet]:
        """A sum was applied here: own contributions in it, each given once, that d has to pay now."""
        given = self._given.get(packet.chunk)
        if given is None:
            return []
        entries = [entry for entry in included.decode(packet.header.included) if entry.author == self.me]
        held = [*given.open, *given.back]
        numbers = [number for number in held if any(entry.first <= number <= entry.last for entry in entries)]
        for number in numbers:
            self.paid_late += number in given.back
            given.open.pop(number, None)
            given.back.pop(number, None)
        paid = self._read(packet.chunk, numbers)
        self.confirmed += len(numbers)
        self.listed_batches += sum(contribution.header.batches_total for contribution in paid if packet.chunk == 0)
        return paid

    def take_back(self, now: float, is_gone: Callable[[bytes], bool]) -> int:
        """What was not listed in time, or was given to an owner that is gone, may be given again. Returns how many there are."""
        patience = max(limits.pledge_patience_s, limits.pledge_intervals * self._spacing_s)
        gone: dict[bytes, bool] = {}
        count = 0
        for given in self._given.values():
            for number, (owner, since) in list(given.open.items()):
                if owner not in gone:
                    gone[owner] = is_gone(owner)
                if gone[owner] or now - since >= patience:
                    del given.open[number]
                    given.back[number] = None
                    count += 1
            while len(given.back) > limits.pledges_remembered:
                given.back.pop(next(iter(given.back)))
        self.taken_back += count
        return count

    def close(self, chunk: int) -> list[Packet]:
        """Forget what is open to a chunk, and return it: d pays it now or was set anew."""
        given = self._given.get(chunk)
        if given is None:
            return []
        packets = self._read(chunk, given.open)
        given.open.clear()
        given.back.clear()
        return packets

    def recover(self) -> list[Packet]:
        """After a crash: contributions that the log has and the saved state does not know. They count as paid."""
        saved = self._highest
        keys = [key for key in self._log.keys(self._stream_key) if key[1] > self._complete.get(key[2], saved)]
        lost = [packet for key in keys for packet in self._read(key[2], [key[1]])]
        for packet in lost:
            self._highest = max(self._highest, packet.seq)
            if packet.chunk == 0:
                self.batches += packet.header.batches_total
                self.listed_batches += packet.header.batches_total
        return lost

    def _read(self, chunk: int, numbers: Sequence[int] | dict[int, tuple[bytes, float]]) -> list[Packet]:
        bodies = [self._log.get((self._stream_key, number, chunk)) for number in numbers]
        return [Packet.decode_contribution(body, self._terms) for body in bodies if body is not None]

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> tuple[int, int]:
        """(batches, listed_batches): they belong to chunk 0."""
        return self.batches, self.listed_batches

    def saved_chunk(self, chunk: int) -> SavedChunk:
        """What a checkpoint keeps of one chunk, together with its d."""
        given = self._given.get(chunk, _Given())
        return SavedChunk(chunk, [(number, owner) for number, (owner, _) in given.open.items()], list(given.back), self._highest)

    def encode(self, chunks: Sequence[SavedChunk] | None = None, counts: tuple[int, int] | None = None) -> bytes:
        """For a checkpoint, together with d. chunks, counts: of the moments when d was copied; None: of now."""
        return msgspec.msgpack.encode(self._state(chunks, counts))

    def checkpointed(self, saved: bytes | None = None) -> None:
        """A checkpoint with `saved` (default: the present state) is durable: the log must keep what is open in it, and what came after."""
        state = _decode(saved) if saved is not None else self._state()
        needed = [number for entry in state.chunks for number in (entry.highest + 1, *(number for number, _ in entry.open))]
        self._log.hold(self._stream_key, min(needed, default=state.highest + 1))

    def _state(self, chunks: Sequence[SavedChunk] | None = None, counts: tuple[int, int] | None = None) -> _Saved:
        kept = [self.saved_chunk(chunk) for chunk in sorted(self._given)] if chunks is None else list(chunks)
        return _Saved(SAVED_VERSION, self._highest, *(counts or self.counts), kept)

    def _restore(self, saved: bytes, now: float) -> None:
        state = _decode(saved)
        self._highest, self.batches, self.listed_batches = state.highest, state.batches, state.listed_batches
        for entry in state.chunks:
            open_ = {number: (owner, now) for number, owner in entry.open}
            self._given[entry.chunk] = _Given(open_, dict.fromkeys(entry.back))
            self._complete[entry.chunk] = entry.highest


def _decode(saved: bytes) -> _Saved:
    try:
        state = msgspec.msgpack.decode(saved, type=_Saved)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise refuse("bad-checkpoint", f"the checkpoint's list of contributions cannot be read: {error}") from None
    if state.version != SAVED_VERSION:
        raise refuse("bad-checkpoint", f"the checkpoint's list of contributions has format {state.version}, not {SAVED_VERSION}")
    return state
