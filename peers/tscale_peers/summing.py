"""Owners' work between two steps, on the thread that meets: giving own work to owners, and publishing sums of the chunks that one owns.

Enters: the plan of the event loop (who owns what, who is gone, how many peers train); due publications of the meeting. Leaves:
contributions to send, sums to spread, both durable before anybody sees them.
    give      per chunk: q = codec(d without what is pledged), addressed to the owner; own chunks go the same way, without a link
    publish   for each chunk that is due: codec(A), an ordinary packet that lists what it contains; applied here as everywhere
    hand on   what is left of chunks that are another's by now goes into d, and from there to the new owner
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from tscale_net.errors import Refused
from tscale_net.ports import Clock
from tscale_peers import limits
from tscale_peers.accumulator import Accumulators
from tscale_peers.drafting import Drafting
from tscale_peers.exchange import Exchange
from tscale_peers.layout import Chunk
from tscale_peers.packet import PACKET_VERSION, SUM_STREAM, Header, Key, Packet, stream_key
from tscale_peers.publisher import Draft


@dataclass(frozen=True, slots=True)
class Plan:
    """What the event loop knows, set anew each tick. A whole is replaced by a whole, so any thread may read it."""

    owners: tuple[bytes | None, ...] = ()
    """Public key of each chunk's owner; None: no way to it is known. Empty: everything is published to everybody."""
    training_peers: int = 1
    """Peers that contribute, this one included if it trains."""
    owned: tuple[int, ...] = ()
    """Chunks of this peer."""
    is_gone: Callable[[bytes], bool] = lambda key: False
    """Is the peer with this public key dead, or has it left?"""


class Given(NamedTuple):
    """Contributions of one moment, durable and noted as given, and the factor for the trainer's momentum."""

    drafts: list[Draft]
    momentum_keep: float


class _Sum(NamedTuple):
    packet: Packet
    body: bytes
    batches: int


class Summing:
    """See the module's head. `saved`: the checkpoint's sums (empty: none)."""

    def __init__(self, exchange: Exchange, clock: Clock, saved: bytes = b"", most_batches: int = limits.count_max) -> None:
        self.plan = Plan()
        """Set by the event loop."""
        self.refused: deque[Refused] = deque(maxlen=limits.refusals_kept)
        """Sums and own contributions that had to wait, for people."""
        self.sums = Accumulators(exchange.signer.public_key, exchange.terms, most_batches)
        self._exchange = exchange
        self._clock = clock
        self._stream = exchange.stream | SUM_STREAM
        self.stream_key = stream_key(exchange.signer.public_key, self._stream)
        self._newest = self._highest()
        self._making: Future[list[_Sum]] | None = None
        own = [exchange.log.get(key) for key in exchange.log.keys(self.stream_key)]
        self.sums.restore(saved, [Packet.decode(body, exchange.terms) for body in own if body is not None], clock.now())

    # -- giving --------------------------------------------------------------------------------------------------------

    def contribute(self, batches: int, share: float) -> tuple[list[tuple[bytes, Packet]], float]:
        """Contributions of this moment, and the factor for the trainer's momentum. batches: own ones in this stream, all of them.

        Those to other owners are for the caller to send.

        Raises Refused: "not-finite", "log-write"; then nothing has changed.
        """
        given = self.begin(batches, share).finish()
        return [(draft.body, draft.packet) for draft in given.drafts], given.momentum_keep

    def begin(self, batches: int, share: float) -> Drafting[Draft, Given]:
        """The same beside training (drafting.py): the caller advances it at this meeting and the following ones."""
        exchange, owners = self._exchange, self.plan.owners
        coefficient = min(exchange.rule.share_scale * share, exchange.terms.max_coefficient)
        fresh = max(0, batches - exchange.pledges.batches - self._published_batches())
        number = exchange.pledges.next_number
        chunks = [c for c in exchange.replica.layout.chunks if owners[c.index] is not None and exchange.pledges.may_give(c.index)]

        def make(chunk: Chunk, payload: bytes) -> Draft:
            owner = owners[chunk.index]
            assert owner is not None
            return self._contribution(chunk, owner, payload, number, fresh, coefficient)

        def keep(drafts: list[Draft]) -> None:
            exchange.pledges.keep([(draft.body, draft.packet) for draft in drafts])

        def settle(drafts: list[Draft]) -> Given:
            exchange.pledges.note([(draft.body, draft.packet) for draft in drafts], self._clock.now())
            for draft in drafts:
                if draft.packet.header.owner == exchange.signer.public_key:
                    self._take_own(draft.packet)
            return Given(drafts, share if exchange.rule.momentum_keep == "share" else 1.0)

        return exchange.drafting(chunks, coefficient, make, keep, settle)

    def _take_own(self, packet: Packet) -> None:
        try:
            self.sums.take(packet, self._clock.now())
        except Refused as refusal:  # it is taken back in time
            self.refused.append(refusal)

    def _published_batches(self) -> int:
        """Own batches that own packets to everybody have stated."""
        with self._exchange.replica.lock:
            return self._exchange.replica.applied.batches.get(self._exchange.stream_key, 0)

    def _contribution(self, chunk: Chunk, owner: bytes, payload: bytes, number: int, batches: int, coefficient: float) -> Draft:
        exchange = self._exchange
        header = Header(
            version=PACKET_VERSION,
            run=exchange.terms.run,
            author=exchange.signer.public_key,
            stream=exchange.stream,
            seq=number,
            chunk=chunk.index,
            batches_total=batches,
            coefficient=coefficient,
            codec=exchange.terms.codec_of(chunk).name,
            created_unix=self._clock.wall(),
            owner=owner,
        )
        delta = exchange.terms.codec_of(chunk).open(payload, chunk)
        return Draft(Packet(header, delta), Packet.seal(header, payload, exchange.signer.sign))

    # -- summing -------------------------------------------------------------------------------------------------------

    def meet(self) -> list[tuple[Key, bytes]]:
        """Between two steps: publish what is due, take back what was not listed, hand on what is another's. Returns sums to spread."""
        now, plan = self._clock.now(), self.plan
        self._exchange.pledges.take_back(now, plan.is_gone)
        published = self._taken_up()
        if self._making is None and (due := self.sums.due(now, plan.training_peers)):
            self._begin(due)
            published += self._taken_up()
        if self._making is None:
            for index, units in self.sums.remove_idle(plan.owned):
                self._exchange.take_over(index, units)
        return published

    def finish(self) -> list[tuple[Key, bytes]]:
        """Before leaving: publish everything that waits, and take over what is left, to be published as own work."""
        self.sums.closed = True
        published = self._publish(self.sums.waiting())
        for index, units in self.sums.remove_idle(()):
            self._exchange.take_over(index, units)
        return published

    def _publish(self, chunks: Sequence[int]) -> list[tuple[Key, bytes]]:
        """Sums of these chunks, and those that are being made; waits for them."""
        published = self._taken_up(wait=True)
        self._begin([chunk for chunk in chunks if chunk in set(self.sums.waiting())])
        return published + self._taken_up(wait=True)

    def _begin(self, chunks: Sequence[int]) -> None:
        """Make the sums of these chunks, beside training where there is a helper; contributions taken meanwhile go into the next ones."""
        if self._exchange.helper is not None:
            self._making = self._exchange.helper.submit(self._made, chunks)
            return
        self._making = Future()
        self._making.set_result(self._made(chunks))

    def _made(self, chunks: Sequence[int]) -> list[_Sum]:
        """Sums, in the log. One that cannot be made now waits, and why is in `refused`."""
        drafts = [draft for index in chunks if (draft := self._draft(self._exchange.replica.layout.chunks[index])) is not None]
        try:
            self._exchange.log.append_all([(draft.body, draft.packet.key) for draft in drafts], fsync=True)
        except Refused as refusal:
            self.refused.append(refusal)
            return []
        return drafts

    def _taken_up(self, wait: bool = False) -> list[tuple[Key, bytes]]:
        """Sums that are ready, applied here."""
        if self._making is None or not (wait or self._making.done()):
            return []
        drafts, self._making = self._making.result(), None
        for draft in drafts:
            self._newest = max(self._newest, draft.packet.seq)
            self.sums.published(draft.packet, draft.batches)
        self._exchange.receive(draft.packet for draft in drafts)
        return [(draft.packet.key, draft.body) for draft in drafts]

    def _draft(self, chunk: Chunk) -> _Sum | None:
        """The sum of one chunk, checked against everything that could refuse it later. Changes nothing."""
        exchange = self._exchange
        payload, listed, batches = self.sums.encode_sum(chunk)
        codec = exchange.terms.codec_of(chunk, is_sum=True)
        header = Header(
            version=PACKET_VERSION,
            run=exchange.terms.run,
            author=exchange.signer.public_key,
            stream=self._stream,
            seq=self._next_seq(chunk.index),
            chunk=chunk.index,
            batches_total=self.sums.batches + batches,
            coefficient=self.sums.coefficient,
            codec=codec.name,
            created_unix=self._clock.wall(),
            included=listed,
        )
        packet = Packet(header, codec.open(payload, chunk))
        try:
            with exchange.replica.lock:
                exchange.replica.applied.can_add(*packet.key)
                exchange.replica.check_range(chunk, packet.delta)
        except Refused as refusal:
            self.refused.append(refusal)
            return None
        return _Sum(packet, Packet.seal(header, payload, exchange.signer.sign), batches)

    def _next_seq(self, chunk: int) -> int:
        """Without gaps, except that a chunk far behind the others catches up: logs drop a stream's lowest numbers first."""
        with self._exchange.replica.lock:
            applied = self._exchange.replica.applied.highest(self.stream_key, chunk)
        after = 1 + max(applied, self._exchange.log.latest(self.stream_key, chunk))
        return after if self._newest - after < limits.sum_lag else self._newest

    def _highest(self) -> int:
        with self._exchange.replica.lock:
            applied = self._exchange.replica.applied
            seqs = [applied.highest(self.stream_key, chunk) for chunk in range(applied.chunks)]
        return max([key[1] for key in self._exchange.log.keys(self.stream_key)] + seqs)
