"""Where training and the swarm meet: between two steps, on the thread that owns the weights.

Enters: keys of packets checked by the event loop, the trainer's progress. Leaves: packets applied to basepoint and weights, own packets to
spread, one `Met` record per meeting, posted to the event loop. Order inside a meeting: receive, then publish ("pack after": the
displacement is taken after everything received was applied, which makes the leak stable for 0 < c < 2).
The event loop never touches weights or replica arithmetic; the trainer never touches sockets. One lock keeps meetings apart.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from tscale_net.errors import Refused
from tscale_net.ports import Clock
from tscale_peers import limits
from tscale_peers.average import RunningAverage
from tscale_peers.basepoint import Replica
from tscale_peers.exchange import Exchange, Receipt
from tscale_peers.gossip import Key, PacketStore
from tscale_peers.inbox import Inbox
from tscale_peers.meeting_time import MeetingTime
from tscale_peers.outgoing import Outgoing, Sent
from tscale_peers.packet import Packet
from tscale_peers.state_reading import State
from tscale_peers.summing import Summing

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Progress:
    """What the trainer has done so far in this home directory (one author stream)."""

    steps: int
    batches: int
    tokens: int
    train_loss: float
    trained: bool
    """Steps were made since the last meeting."""


@dataclass(frozen=True, slots=True)
class Met:
    """What one meeting did."""

    progress: Progress
    receipts: tuple[Receipt, ...]
    published: tuple[tuple[Key, bytes], ...]
    momentum_keep: float
    state: tuple[bytes, bytes] | None
    """(applied digest, basepoint hash) after it, unless hashing would have been too dear."""
    lost: int = 0
    """Packets that were offered but are neither in memory nor in the log any more."""
    withheld: Refused | None = None
    """Why a publication that was due did not take place; its content stays in the displacement."""
    given: tuple[tuple[Key, bytes], ...] = ()
    """Own contributions to send, each with its owner's public key."""
    given_bytes: int = 0
    """Size of all of this moment's, those to this peer itself included."""
    sums: tuple[tuple[Key, bytes], ...] = ()
    """Sums of chunks that this peer owns, to spread as packets."""


class MeetingPoint:
    """Owns the exchange. `meet` is called by the training thread; the event loop calls the rest."""

    def __init__(
        self,
        exchange: Exchange,
        replica: Replica,
        store: PacketStore,
        publish_every_steps: int,
        clock: Clock,
        decode: Callable[[bytes], Packet],
        helper: Executor | None = None,
    ) -> None:
        """helper: one thread that hashes beside training; None: hashing is done at once."""
        self.exchange = exchange
        self.replica = replica
        self.share = 1.0
        """Set by the event loop from everybody's rates."""
        self.publish_not_before = -math.inf
        """Set by the event loop: what links allow, on the clock."""
        self.may_publish = False
        """Set by the event loop: joined, not leaving, uplink free."""
        self.post: Callable[[Met], None] = lambda met: None
        self.summing = Summing(exchange, clock)
        """Owners' work."""
        self.average: RunningAverage | None = None
        """Kept up to date by every meeting."""
        self.time = MeetingTime(clock)
        """What meetings have cost so far."""
        self.publish_every_steps = publish_every_steps
        self._clock = clock
        self._helper = helper
        self._inbox = Inbox(store, decode)
        self._outgoing = Outgoing(exchange)
        self._errands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._lock = threading.RLock()
        self._published_at_step = 0
        self._began = (-math.inf, 0.0)
        """When the last publication began, and what exchanges had cost by then."""
        self.last_progress = Progress(0, 0, 0, float("nan"), False)
        self._receive_after = 0.0
        self._hash_after = 0.0
        self._reading: Future[State | None] | None = None

    def offer(self, key: Key, packet: Packet | None = None, nbytes: int = 0) -> None:
        """A packet that is checked and in the log, to be applied at a later meeting; nbytes: what it takes in memory. Any thread."""
        self._inbox.offer(key, packet, nbytes)

    def between_steps(self, work: Callable[[], None]) -> Future[None]:
        """Have `work` done by the next meeting, on its thread: whatever writes weights while a training thread owns them. Any thread. The
        future also carries what `work` raises."""
        done: Future[None] = Future()
        self._errands.append((work, done))
        return done

    @property
    def steps_since_publish(self) -> int:
        return self.last_progress.steps - self._published_at_step

    @property
    def waiting(self) -> int:
        return len(self._inbox)

    def resume_at(self, progress: Progress) -> None:
        """Continue a restored run: no publication before `publish_every_steps` new steps."""
        self.last_progress = progress
        self._published_at_step = progress.steps

    def meet(self, progress: Progress) -> Met:
        """Receive and hash as far as affordable (always while not training), publish if due. Returns what was done, which is also posted to
        the event loop.

        Raises Refused("not-finite") if local training has diverged. Any other refusal of a publication is in `Met.withheld`.
        """
        with self._entered():
            if progress.trained:
                self.exchange.mark_trained()
            self.last_progress = progress
            self._run_errands()
            may = self.may_publish and self._clock.now() >= self.publish_not_before
            due = may and progress.steps - self._published_at_step >= self.publish_every_steps and self._affordable()
            sent = self._advance()
            begins = due and not self._outgoing.under_way
            receipts, lost = self._receive(at_once=begins or not progress.trained)
            if begins:
                self._begin(progress.batches, self.share, by_owners=True)
                begun = self._advance()  # ready at once where no helper makes it
                sent = begun if sent == Sent() else sent
            if sent.withheld is not None and sent.withheld.code == "not-finite":
                raise sent.withheld
            sums = tuple(self.summing.meet())
            if self.average is not None:
                self.average.take_due_cuts(self._clock.wall())
            met = self._met(receipts, sent, self._state(forced=not progress.trained), lost, sums)
        self.post(met)
        return met

    def meet_idle(self) -> Met:
        """A meeting without new steps, for a peer that is not training."""
        last = self.last_progress
        return self.meet(Progress(last.steps, last.batches, last.tokens, last.train_loss, trained=False))

    def publish_now(self, share: float) -> Met:
        """One publication to everybody regardless of cadence, when leaving."""
        self.finish_outgoing()
        with self._entered():
            receipts, lost = self._receive()
            self._begin(self.last_progress.batches, share, by_owners=False)
            met = self._met(receipts, self._outgoing.finish(), self._state(forced=True), lost)
        self.post(met)
        return met

    def finish_sums(self) -> Met:
        """Publish what contributions wait here, and take over what is left of them, when leaving."""
        self.finish_outgoing()
        with self._entered():
            receipts, lost = self._receive()
            sums = tuple(self.summing.finish())
            met = self._met(receipts, Sent(), self._state(forced=True), lost, sums)
        self.post(met)
        return met

    def settle(self) -> tuple[bytes, bytes]:
        """Apply everything waiting, own packets that are being made included, and hash: the state as of now."""
        self.finish_outgoing()
        with self._entered():
            receipts, lost = self._receive()
            state = self._state(forced=True)
            assert state is not None
            met = self._met(receipts, Sent(), state, lost)
        self.post(met)
        return state

    def finish_outgoing(self) -> None:
        """Wait for what is under way, and tell the event loop of it."""
        with self._entered():
            if not self._outgoing.under_way:
                return
            met = self._met((), self._outgoing.finish(), None, 0)
        self.post(met)

    def load_chunks(self, chunks: dict[int, bytes]) -> list[int]:
        """Replace chunks of the basepoint by a donor's; the displacement, and so private work, is kept, except in the chunks returned
        (see Exchange.load_chunks). Writes the weights: while a training thread owns them, only `between_steps`. Raises Refused."""
        with self._lock:
            return self.exchange.load_chunks(chunks)

    def drop_displacement(self) -> None:
        """Give up private work that is too old: W = B."""
        self.finish_outgoing()
        with self._lock:
            self.exchange.drop_displacement()

    def keep_unpublished(self, saved: Tensor | None) -> None:
        """See Exchange.keep_unpublished."""
        self.finish_outgoing()
        with self._lock:
            self.exchange.keep_unpublished(saved)

    def checkpointed(self, paid: bytes, pledges: bytes | None = None) -> None:
        """A checkpoint with these (default: the present pledges) is durable: the logs may let go of what it contains."""
        with self._lock:
            self.exchange.checkpointed(paid)
            self.exchange.pledges.checkpointed(pledges)

    def displacement_norm(self) -> float:
        with self._lock:
            return self.exchange.displacement_norm()

    def exclusively(self) -> threading.RLock:
        """Hold this while reading weights and replica together, as a checkpoint does."""
        return self._lock

    def _run_errands(self) -> None:
        while self._errands:
            work, done = self._errands.popleft()
            if done.set_running_or_notify_cancel():
                try:
                    work()
                except Refused as refusal:
                    done.set_exception(refusal)
                else:
                    done.set_result(None)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Alone with the exchange; on the way out the device has done what it was given."""
        if not self._lock.acquire(blocking=False):
            with self.time.of("wait"):
                self._lock.acquire()
        try:
            yield
            if self.exchange.busy:
                with self.time.of("wait"):
                    self.exchange.wait()
        finally:
            self._lock.release()

    def _met(
        self,
        receipts: tuple[Receipt, ...],
        sent: Sent,
        state: tuple[bytes, bytes] | None,
        lost: int,
        sums: tuple[tuple[Key, bytes], ...] = (),
    ) -> Met:
        unplaced, self.exchange.unplaced = self.exchange.unplaced, []
        return Met(
            self.last_progress, (*receipts, *unplaced), sent.published, sent.momentum_keep, state, lost, sent.withheld, sent.given,
            sent.given_bytes, sums,
        )  # fmt: skip

    def _receive(self, at_once: bool = True) -> tuple[tuple[Receipt, ...], int]:
        """Receipts of everything that waited, and how many packets were lost meanwhile. Part by part, so that memory stays bounded however
        much has piled up in the log. Not at once: only if it is affordable, or the inbox fills up."""
        left = len(self._inbox)
        if left == 0 or not (at_once or self._inbox.half_full or self._clock.now() >= self._receive_after):
            return (), 0
        receipts: list[Receipt] = []
        lost = 0
        before = self.time.spent.receive
        with self.time.of("receive"):
            while left > 0:
                taken, packets = self._inbox.take(left)
                left -= taken
                lost += taken - len(packets)
                receipts += self.exchange.receive(packets)
            self.exchange.wait()
        cost_s = self.time.spent.receive - before
        self._receive_after = self._clock.now() + cost_s / limits.receive_time_fraction
        return tuple(receipts), lost

    @property
    def _exchanged_s(self) -> float:
        """What publishing and receiving have cost so far."""
        return self.time.spent.publish + self.time.spent.receive

    def _affordable(self) -> bool:
        """Whether exchanges since the last publication, itself included, are little enough of the time since."""
        began_at, exchanged_s = self._began
        return self._exchanged_s - exchanged_s <= limits.exchange_time_fraction * (self._clock.now() - began_at)

    def _begin(self, batches: int, share: float, by_owners: bool) -> None:
        """Own work, to everybody or, where there are any, to owners. If it is refused, it is tried again after as many steps as always."""
        self._published_at_step = self.last_progress.steps
        self._began = (self._clock.now(), self._exchanged_s)
        with self.time.of("publish"):
            if by_owners and self.summing.plan.owners:
                self._outgoing.contribute(self.summing, batches, share)
            else:
                self._outgoing.publish(batches, share)

    def _advance(self) -> Sent:
        if not self._outgoing.under_way:
            return Sent()
        with self.time.of("publish"):
            return self._outgoing.advance()

    def _state(self, forced: bool) -> tuple[bytes, bytes] | None:
        """The newest state that is known by now: at once if `forced`; else, with a helper, that of an earlier meeting."""
        if forced:
            return self._read(self.replica.state)
        if self._reading is not None:
            if not self._reading.done():
                return None
            state = self._reading.result()
            self._reading = None
            return state
        if self._clock.now() < self._hash_after:
            return None
        if self._helper is None:
            with self.time.of("hash"):
                return self._read(self.replica.state)
        with self.time.of("hash"):
            reading = self.replica.begin_reading()
        self._reading = self._helper.submit(self._read, lambda: self.replica.read_state(reading))
        return None

    def _read(self, read: Callable[[], S]) -> S:
        """Read the state; the next time may come when this time was little enough of it."""
        begun = self._clock.now()
        state = read()
        self._hash_after = begun + (self._clock.now() - begun) / limits.hash_time_fraction
        return state
