"""Where training and the swarm meet: between two steps, on the thread that owns the weights.

Enters: keys of packets checked by the event loop, the trainer's progress. Leaves: packets applied to basepoint and weights, own packets to
spread, one `Met` record per meeting, posted to the event loop. Order inside a meeting: receive, then publish ("pack after": the
displacement is taken after everything received was applied, which makes the leak stable for 0 < c < 2).
The event loop never touches weights or replica arithmetic; the trainer never touches sockets. One lock keeps meetings apart.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from tscale_net.errors import Refused
from tscale_net.ports import Clock
from tscale_peers import limits
from tscale_peers.basepoint import Replica
from tscale_peers.exchange import Exchange, Receipt
from tscale_peers.gossip import Key, PacketStore
from tscale_peers.packet import Packet


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
    ) -> None:
        self.exchange = exchange
        self.replica = replica
        self.share = 1.0
        """Set by the event loop from everybody's rates."""
        self.may_publish = False
        """Set by the event loop: joined, not leaving, uplink free."""
        self.post: Callable[[Met], None] = lambda met: None
        self._store = store
        self.publish_every_steps = publish_every_steps
        self._clock = clock
        self._decode = decode
        self._inbox: deque[tuple[Key, Packet | None, int]] = deque()
        """Key; the packet, and its bytes in memory, or None and 0 if it is read back from the log."""
        self._inbox_bytes = 0
        self._inbox_lock = threading.Lock()
        self._errands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._lock = threading.RLock()
        self._published_at_step = 0
        self.last_progress = Progress(0, 0, 0, float("nan"), False)
        self._hash_cost_s = 0.0
        self._hash_after = 0.0

    def offer(self, key: Key, packet: Packet | None = None, nbytes: int = 0) -> None:
        """A packet that is checked and in the log, to be applied at the next meeting; nbytes: what it takes in memory. Any thread. Beyond
        `inbox_bytes` only its key is kept, and it is read back from the log."""
        with self._inbox_lock:
            if packet is None or self._inbox_bytes + nbytes > limits.inbox_bytes:
                packet, nbytes = None, 0
            self._inbox.append((key, packet, nbytes))
            self._inbox_bytes += nbytes

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
        """Receive, publish if due, hash if affordable (always while not training: only what changed is hashed). Returns what was done,
        which is also posted to the event loop.

        Raises Refused("not-finite") if local training has diverged. Any other refusal of a publication is in `Met.withheld`.
        """
        with self._lock:
            if progress.trained:
                self.exchange.mark_trained()
            self.last_progress = progress
            self._run_errands()
            receipts, lost = self._receive()
            due = self.may_publish and progress.steps - self._published_at_step >= self.publish_every_steps
            published, keep, withheld = self._publish(progress, self.share) if due else ((), 1.0, None)
            if withheld is not None and withheld.code == "not-finite":
                raise withheld
            met = Met(progress, receipts, published, keep, self._state(forced=not progress.trained), lost, withheld)
        self.post(met)
        return met

    def meet_idle(self) -> Met:
        """A meeting without new steps, for a peer that is not training."""
        last = self.last_progress
        return self.meet(Progress(last.steps, last.batches, last.tokens, last.train_loss, trained=False))

    def publish_now(self, share: float) -> Met:
        """One publication regardless of cadence, when leaving."""
        with self._lock:
            receipts, lost = self._receive()
            published, keep, withheld = self._publish(self.last_progress, share)
            met = Met(self.last_progress, receipts, published, keep, self._state(forced=True), lost, withheld)
        self.post(met)
        return met

    def settle(self) -> tuple[bytes, bytes]:
        """Apply everything waiting and hash: the state as of now."""
        with self._lock:
            receipts, lost = self._receive()
            state = self._state(forced=True)
            assert state is not None
            met = Met(self.last_progress, receipts, (), 1.0, state, lost)
        self.post(met)
        return state

    def load_chunks(self, chunks: dict[int, bytes]) -> list[int]:
        """Replace chunks of the basepoint by a donor's; the displacement, and so private work, is kept, except in the chunks returned
        (see Exchange.load_chunks). Writes the weights: while a training thread owns them, only `between_steps`. Raises Refused."""
        with self._lock:
            return self.exchange.load_chunks(chunks)

    def drop_displacement(self) -> None:
        """Give up private work that is too old: W = B."""
        with self._lock:
            self.exchange.drop_displacement()

    def keep_unpublished(self, saved: Tensor | None) -> None:
        """See Exchange.keep_unpublished."""
        with self._lock:
            self.exchange.keep_unpublished(saved)

    def checkpointed(self, paid: bytes) -> None:
        """A checkpoint with this `paid` is durable: the log may let go of what it contains."""
        with self._lock:
            self.exchange.checkpointed(paid)

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

    def _receive(self) -> tuple[tuple[Receipt, ...], int]:
        """Receipts of everything that waited, and how many packets were lost meanwhile. Part by part, so that memory stays bounded however
        much has piled up in the log."""
        with self._inbox_lock:
            left = len(self._inbox)
        receipts: list[Receipt] = []
        lost = 0
        while left > 0:
            taken, packets = self._next_part(left)
            left -= taken
            lost += taken - len(packets)
            receipts += self.exchange.receive(packets)
        return tuple(receipts), lost

    def _next_part(self, most: int) -> tuple[int, list[Packet]]:
        """(how many were taken from the inbox, those that could be read), up to `inbox_bytes`."""
        packets: list[Packet] = []
        taken = size = 0
        while taken < most and size < limits.inbox_bytes:
            with self._inbox_lock:
                key, packet, nbytes = self._inbox.popleft()
                self._inbox_bytes -= nbytes
            taken += 1
            if packet is None:
                body = self._store.get(key)
                if body is None:
                    continue
                packet, nbytes = self._decode(body), len(body)
            size += nbytes
            packets.append(packet)
        return taken, packets

    def _publish(self, progress: Progress, share: float) -> tuple[tuple[tuple[Key, bytes], ...], float, Refused | None]:
        """A publication that is refused is tried again after as many steps as always."""
        self._published_at_step = progress.steps
        try:
            bodies, keep = self.exchange.publish(progress.batches, share)
        except Refused as refusal:
            return (), 1.0, refusal
        keys = [Packet.peek_key(body) for body in bodies]
        return tuple((key, body) for key, body in zip(keys, bodies, strict=True) if key is not None), keep, None

    def _state(self, forced: bool) -> tuple[bytes, bytes] | None:
        now = self._clock.now()
        if not forced and now < self._hash_after:
            return None
        state = self.replica.state()
        self._hash_cost_s = self._clock.now() - now
        self._hash_after = now + self._hash_cost_s / limits.hash_time_fraction
        return state

