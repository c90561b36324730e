"""One peer of a swarm: the thin shell around pure state. It owns tasks and feeds events; gossip, membership and the replica decide.

Enters: transport events, meetings of the training thread, the clock. Leaves: frames, and notices for people.
Everything here runs on the event loop; the training thread meets it only in `MeetingPoint`. Simulations run the same class.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from tscale_net.errors import Refused
from tscale_net.ports import Event, Frame, LinkDown, LinkUp, PeerId
from tscale_peers import limits
from tscale_peers.agreement import Agreement
from tscale_peers.cadence import Pacer
from tscale_peers.conduct import NOT_ITS_FAULT, Conduct
from tscale_peers.dialler import Dialler
from tscale_peers.gossip import Action, Gossip, NeedChunks, Send
from tscale_peers.herald import Herald
from tscale_peers.intake import Intake
from tscale_peers.leaving import hand_over
from tscale_peers.measured import NOT_MEASURED
from tscale_peers.meeting import MeetingPoint, Met
from tscale_peers.membership import Membership
from tscale_peers.messages import CONTRIBUTION, GOSSIP_KINDS, PACKET, RECORDS, decode_records
from tscale_peers.notices import NoticeBoard
from tscale_peers.own_record import own_record
from tscale_peers.packet import Key
from tscale_peers.pulse import Pulse
from tscale_peers.records import PeerRecord, RecordBook, author_of
from tscale_peers.share import CountedRate, RateAverage, share
from tscale_peers.spreading import Spreading
from tscale_peers.surroundings import Author, Outside, PeerSettings
from tscale_peers.traffic import Traffic

T = TypeVar("T")


class SwarmPeer:
    """Runs the protocol for one run. Construct, then `await run()` in a task; `leave()` first if it shall end in order."""

    def __init__(
        self,
        *,
        run: bytes,
        author: Author,
        outside: Outside,
        meeting: MeetingPoint,
        gossip: Gossip,
        intake: Intake,
        spreading: Spreading,
        settings: PeerSettings,
        board: NoticeBoard,
    ) -> None:
        self.run_id = run
        self.author = author
        self.outside = outside
        self.meeting = meeting
        self.gossip = gossip
        self.spreading = spreading
        self.settings = settings
        self.board = board
        clock, rng = outside.clock, outside.rng
        self.membership = Membership(author.peer_id, RecordBook(run, outside.verify), rng)
        self.herald = Herald(self.membership, outside.transport, author.sign, clock, rng)
        self.dialler = Dialler(outside.transport, self.membership, settings.bootstrap, board, clock, rng, self.name_of, settings.remembered)
        self.agreement = Agreement(board)
        self.conduct = Conduct()
        self.rate = RateAverage()
        self.traffic = Traffic()
        self.received_bytes: Counter[int] = Counter()
        """By kind of message, since the start."""
        max_down = outside.download.rate_per_s if outside.download is not None else None
        self.pacer = Pacer(max_down, settings.max_upload_bytes_s, clock.now())
        gossip.may_ask = self._may_ask
        self.linked: set[PeerId] = set()
        self.last_delta_at: dict[PeerId, float] = {}
        self.published = 0
        self.published_bytes = 0
        """Size of the newest own publication."""
        self.applied = 0
        self.training_active = False
        """Set by the trainer's owner; while False the event loop holds meetings itself."""
        self.leaving = False
        self.reload_chunks: Callable[[NeedChunks], None] = lambda need: gossip.give_up(need.chunks)
        """Called when packets can only come inside snapshot chunks (joining.py)."""
        self.measured = NOT_MEASURED
        """Held-out losses, set by whoever evaluates here."""
        self._intake = intake
        self._state: tuple[bytes, bytes] = (b"", b"")
        self._tokens = CountedRate(self.rate, clock.now())
        self.met_at = clock.now()
        self._retry_refused_at: float | None = None
        self._flush_wanted = False
        self._flush_later = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.spreading.passed = self._want_flush
        self.pulse = Pulse(self)

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. A fault in any part ends all of it with that fault (nothing runs on half alive)."""
        self._loop = asyncio.get_running_loop()
        self.meeting.post = self._post
        for link in self.outside.transport.links():
            self._link_up(link.peer)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._events())
            tasks.create_task(self._check_packets())
            tasks.create_task(self.spreading.run(self.off_loop, self._refuse))
            self.pulse.run(tasks)

    async def leave(self, progress: Callable[[str], None] = lambda text: None) -> bool:
        """Publish what the swarm does not have yet, and wait until a neighbour holds it. True if it was handed over.

        The caller then cancels `run` and closes the transport.
        """
        self.leaving = True
        self.meeting.may_publish = False
        return await hand_over(self, progress)

    # -- for people --------------------------------------------------------------------------------------------------

    def name_of(self, peer: PeerId) -> str:
        heard = self.membership.book.get(peer)
        if heard is not None:
            return heard.record.name
        return next((link.name for link in self.outside.transport.links() if link.peer == peer and link.name), f"…{peer[-8:]}")

    def swarm_batches(self) -> int:
        """Batches whose deltas are in the basepoint, as far as the authors' packets bear them out."""
        return self._count_batches(b"")

    def others_batches(self) -> int:
        """The same without this peer's own, in its stream and in sums."""
        exchange = self.meeting.exchange
        return max(0, self._count_batches(exchange.stream_key) - exchange.pledges.listed_batches)

    def _count_batches(self, without: bytes) -> int:
        most = limits.batches_per_publication * self.meeting.publish_every_steps
        return min(self.meeting.replica.applied.total_batches(most, without), limits.count_max)

    def unheld(self) -> int:
        """How many own packets no neighbour is known to hold yet."""
        return len(self.gossip.unheld)

    def recount_known(self) -> None:
        """After snapshot chunks were loaded: known is what the replica contains and what the log holds, which is applied where it lacks."""
        for key in self._intake.recount(self.meeting.replica):
            self.meeting.offer(key)

    def share(self, live: Sequence[PeerRecord] | None = None) -> float:
        """phi: this peer's part of the live peers' tokens per second. Neighbours not heard of yet count as being as fast as this one: a
        newcomer that hears nobody's rate yet must not take itself for alone."""
        live = self.membership.live() if live is None else live
        unheard = len(self.linked - {r.peer for r in live})
        return share(self.rate.per_s, [r.tokens_per_s for r in live] + [self.rate.per_s] * unheard)

    @property
    def state(self) -> tuple[bytes, bytes]:
        """Newest (applied digest, basepoint hash)."""
        return self._state

    # -- transport events --------------------------------------------------------------------------------------------

    async def _events(self) -> None:
        while True:
            event = await self.outside.transport.next_event()
            try:
                self._on_event(event)
            except Refused as refusal:
                self._turn_away(refusal, event)

    def _turn_away(self, refusal: Refused, event: Event) -> None:
        self.board.refuse(refusal, self.name_of(event.peer) if event.peer else "somebody")
        if isinstance(event, Frame):
            self._blame(refusal, event.peer)

    def _blame(self, refusal: Refused, peer: PeerId) -> None:
        """A link that carries nothing but nonsense costs more than it brings."""
        if peer in self.linked and self.conduct.strike(peer, refusal, self.outside.clock.now()):
            why = f"messages were refused, the last because of {refusal.code}"
            self.board.tell("link", f"link to {self.name_of(peer)} is cut: too many of its {why}")
            self.outside.transport.drop(peer, f"too many of your {why}", limits.strike_ban_s)
            self.linked.discard(peer)  # what it has sent already is not read any more

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Frame):
            self._on_frame(event)
        elif isinstance(event, LinkUp):
            self._link_up(event.peer)
        elif isinstance(event, LinkDown):
            self._link_down(event)
        else:
            raise Refused(event.code, event.detail)

    def _link_up(self, peer: PeerId) -> None:
        if peer in self.linked:
            return
        self.linked.add(peer)
        self.membership.link_up(peer)
        self.gossip.link_up(peer)
        if not self.herald.seq:
            self.renew_record()
        self.herald.tell(self.linked)
        self._want_flush()

    def _link_down(self, event: LinkDown) -> None:
        self.linked.discard(event.peer)
        self.membership.link_down(event.peer)
        self.gossip.link_down(event.peer)
        self.conduct.link_down(event.peer)
        self.spreading.link_down(event.peer)
        self.outside.transfers.peer_gone(event.peer)
        self.board.tell("link", f"link to {self.name_of(event.peer)} is down: {event.reason}")

    def _on_frame(self, frame: Frame) -> None:
        if frame.peer not in self.linked:
            return
        if self.outside.transfers.handle(frame):
            return
        self.received_bytes[frame.kind] += len(frame.body)
        if frame.kind == PACKET:
            self._intake.put(frame.peer, frame.body)
        elif frame.kind == CONTRIBUTION:
            self.spreading.put(frame.peer, frame.body)
        elif frame.kind == RECORDS:
            self._learn(decode_records(frame.body), frame.peer)
        elif frame.kind in GOSSIP_KINDS:
            self._do(self.gossip.on_frame(frame.peer, frame.kind, frame.body, self.outside.clock.now()))
            self.pulse.heard(self.outside.clock.now())
            self._want_flush()
        else:
            raise Refused("unknown-kind", f"a message of kind {frame.kind}, which this program does not know")

    def _learn(self, sealed_records: Sequence[bytes], source: PeerId) -> None:
        now, wall = self.outside.clock.now(), self.outside.clock.wall()
        self.membership.speaks(source)
        for sealed in sealed_records:
            record = self.membership.learn(sealed, now, source, wall)
            if record is None:
                continue
            if record.peer != self.author.peer_id:
                self.agreement.compare(record, self.meeting.replica.recent, now)
            elif self.herald.outdone_by(record):
                why = "this clock was set back, or this identity runs elsewhere too"
                self.board.tell("identity", f"a record of mine with a later start was heard: {why}")
        if self.membership.urgent or self.membership.heartbeat_s() <= limits.heartbeat_parts * limits.house_s:
            self.pulse.news()

    # -- packets and meetings ----------------------------------------------------------------------------------------

    async def _check_packets(self) -> None:
        while True:
            source, body = await self._intake.next()
            try:
                if not self._intake.is_known(body, source):
                    packet = await self.off_loop(lambda b=body: self._intake.check(b))  # type: ignore[misc]
                    if self._intake.accept(packet, body, source):
                        self.last_delta_at[author_of(packet.stream_key)] = self.outside.clock.now()
                self._want_flush()
            except Refused as refusal:
                self._refuse_packet(refusal, body, source)

    def _refuse_packet(self, refusal: Refused, body: bytes, source: PeerId) -> None:
        if refusal.code == "log-write":
            # Our own trouble: what was asked for is asked for again when its deadline passes, and nothing else meanwhile.
            self.gossip.pull_after = self.outside.clock.now() + limits.log_retry_s
            self.board.refuse(refusal, "the log")
            return
        self._intake.reject(body, source, blame=refusal.code not in NOT_ITS_FAULT)
        self._refuse(refusal, source)

    def _refuse(self, refusal: Refused, source: PeerId) -> None:
        self.board.refuse(refusal, self.name_of(source))
        self._blame(refusal, source)

    def _post(self, met: Met) -> None:
        """Called on the meeting's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._after_meeting, met)

    def _after_meeting(self, met: Met) -> None:
        self.met_at = self.outside.clock.now()
        for receipt in met.receipts:
            if receipt.refusal is not None:
                self.board.refuse(receipt.refusal, "the log")
                self._retry_refused_at = self._retry_refused_at or self.met_at + limits.refused_retry_s
            self.applied += receipt.outcome == "applied"
        if met.withheld is not None:
            self.board.refuse(met.withheld, "my own publication")
        if met.lost:
            self.recount_known()
        if met.published:
            self._note_published(sum(len(body) for _, body in met.published), f"delta {met.published[0][0][1]}")
            self._announce(met.published)
        if met.given_bytes:
            self._note_published(met.given_bytes, "delta to owners")
            self.spreading.send_own(met.given)
            self._want_flush()
        if met.sums:
            self._announce(met.sums)
        if met.state is not None:
            if not self._state[0]:
                self.herald.renew_soon()  # the first word of a newcomer cannot name a state, and who names none owns no chunks
            self._state = met.state
        self._tokens.note(met.progress.tokens, self.met_at)

    def _note_published(self, size: int, what: str) -> None:
        self.published += 1
        self.published_bytes = size
        self.last_delta_at[self.author.peer_id] = self.outside.clock.now()
        self.pulse.consider_publishing(self.met_at)
        self.board.tell("published", f"{what}: {size} bytes", keep=False)

    def _announce(self, packets: Sequence[tuple[Key, bytes]]) -> None:
        """Own packets, of own work or sums, are spread."""
        with suppress(Refused):  # too many streams for what is known here, though not yet for the replica: comparing tells of it
            for key, _ in packets:
                self.gossip.known.add(*key)
        self._do(self.gossip.published(list(packets)))
        self._want_flush()

    # -- time --------------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Tell neighbours what is news to them, and send what can go out."""
        self.herald.tell_if_due(self.linked)
        if self.herald.has_more:
            self.pulse.news()
        self._do(self.gossip.tick(self.outside.clock.now()))
        self.flush()

    def retry_refused(self, now: float) -> None:
        """Offer packets again that the replica refused: whether it does depends on what else has come."""
        if self._retry_refused_at is not None and now >= self._retry_refused_at:
            self._retry_refused_at = None
            self.recount_known()

    def _may_ask(self) -> bool:
        """Does the limit of downloads allow another packet?"""
        bucket = self.outside.download
        chunks = len(self.meeting.replica.layout.chunks)
        typical = self.published_bytes / chunks or float(self.meeting.exchange.terms.max_packet_bytes)
        return bucket is None or bucket.try_borrow(typical)

    def renew_record(self) -> None:
        """State anew what this peer is and does."""
        self.herald.renew(own_record(self), self.linked)

    # -- actions -----------------------------------------------------------------------------------------------------

    def _want_flush(self) -> None:
        """One flush for a burst of events."""
        if not self._flush_wanted and self._loop is not None:
            self._flush_wanted = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send everything that can go out now."""
        self._flush_wanted = False
        if self.gossip.has_news:
            self.pulse.news()
        self._do(self.gossip.flush(self.outside.clock.now(), self.outside.transport.pending_bytes))
        self._do(self.spreading.flush(self.outside.transport.pending_bytes))
        if self.spreading.relay.waiting and not self._flush_later and self._loop is not None:
            self._flush_later = True
            self._loop.call_later(limits.relay_flush_s, self._flush_again)

    def _flush_again(self) -> None:
        self._flush_later = False
        self.flush()

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if not isinstance(action, Send):
                self.reload_chunks(action)
                continue
            try:
                self.outside.transport.send(action.peer, action.kind, action.body, action.channel)
            except Refused as refusal:  # too large for its channel: a fault of this program, and no reason to end the peer
                self.board.refuse(refusal, "this program")

    async def beside_training(self, work: Callable[[], None]) -> None:
        """Do what writes weights: between two steps if a training thread owns them, else off the loop."""
        if self.training_active:
            await asyncio.wrap_future(self.meeting.between_steps(work))
        else:
            await self.off_loop(work)

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Run in the executor where there is one, else here."""
        if self.outside.executor is None:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.outside.executor, work)
