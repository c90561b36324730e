"""Where weights meet the replica: the swarm's rule, between two steps, on the thread that owns the weights.

Enters: checked packets; weights that have been trained meanwhile. Leaves: own packets; weights that contain the others' work.
State is (B, d): the replica's basepoint in integers and the displacement in floating point. W = B + d is what the trainer trains.
    capture:  d = W - B                                              (only after local steps: `mark_trained`)
    receive:  B += c*q                       d bit-unchanged         (each packet once; so W moves by c*q)
    publish:  q = codec(d);  B += c*q;  d -= leak*q;  momentum *= keep     (after everything received: "pack after")
Sum rule: leak = c, so d gives up exactly the integers that B gains and W stays; keep = share. Averaging rule: leak = 1, keep = 1, and W
moves by (c - 1)*q. What the codec lost stays in d (error feedback). Both are the author's own business: the packets look the same.
What is given to owners of chunks instead (pledges.py) stays in d, and so in W, and is not encoded again; d pays it when a sum lists it.
(TScale's federated rule with its center deleted; sum rule and "pack after" make B + sum of all d change by local training alone.)

Durability: own packets are in the log, synced, before anybody sees them. `paid` is the set of own packets that d has given up; it belongs
to d as the applied set belongs to B, and both go into a checkpoint together. After a crash, own packets that the log has and B lacks are
added to B, and those that d has not paid are taken from d: nothing is lost or counted twice.

On the grid (`grid_displacement`): a captured d is rounded to multiples of each unit, at most 2**24 of them, so B + sum of d is conserved to
the last bit. The remainder stays in W: it is carried along when W is written, and is part of the next capture.
Weights may live on any device; they are copied through the host chunk by chunk, in and out, never as a whole. One thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch

from tscale_net.errors import Refused
from tscale_net.ports import Clock
from tscale_peers import limits, ranges
from tscale_peers.applied import AppliedSet
from tscale_peers.basepoint import Replica
from tscale_peers.codec import CodecMemory, Delta
from tscale_peers.delta_log import PacketLog
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk
from tscale_peers.packet import PACKET_VERSION, Header, Key, Packet, Sign, Terms, stream_key
from tscale_peers.packet_log import MemoryLog
from tscale_peers.pledges import Pledges

Part = Literal["share", "one"]


@dataclass(frozen=True, slots=True)
class OuterRule:
    """What an author does at a publication. Sum rule: both "share" (the default). Averaging rule: both "one".

    Raises ValueError at construction for a scale that is not positive.
    """

    share_scale: float = 1.0
    """s in c = s * share. Measured safe up to 1; at 8 with 8 peers (c = 1) training diverges."""
    own_leak: Part = "share"
    momentum_keep: Part = "share"
    grid_displacement: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.share_scale) and self.share_scale > 0):
            raise ValueError(f"rule.share_scale must be positive, not {self.share_scale}")
        if {self.own_leak, self.momentum_keep} - {"share", "one"}:
            raise ValueError('rule.own_leak and rule.momentum_keep must be "share" or "one"')
        if self.grid_displacement and self.own_leak != "share":
            raise ValueError('rule.grid_displacement needs rule.own_leak = "share": (c*q)/c does not lie on the grid')


class Signer(NamedTuple):
    """An author: Ed25519 public key (32 bytes) and `sign(domain, message)`."""

    public_key: bytes
    sign: Sign


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one received packet. "settled": an own packet that B had and d had not paid yet."""

    key: Key
    outcome: Literal["applied", "duplicate", "settled", "refused"]
    refusal: Refused | None = None


class Published(NamedTuple):
    """Packets to spread, one per chunk, already durable and applied here; the factor for the trainer's momentum."""

    packets: list[bytes]
    momentum_keep: float


@dataclass(frozen=True, slots=True)
class _Draft:
    chunk: Chunk
    delta: Delta
    packet: Packet
    body: bytes


class Exchange:
    """See the module's head.

    weights: flat [layout.size], fp32 or fp64, any device; trained in place by its owner between calls.
    displacement None: a newcomer, d = 0 and the weights are set to B. Otherwise d as saved (taken over, not copied), weights as saved.
    paid: bytes saved with d; None means that d has paid all own packets that the replica contains.
    At construction the log's own packets are recovered; `recovered` says how many had been lost from the checkpoint.
    Raises Refused("bad-checkpoint") if sizes do not fit.
    """

    def __init__(
        self,
        replica: Replica,
        weights: torch.Tensor,
        rule: OuterRule,
        signer: Signer | tuple[bytes, Sign],
        stream: int,
        log: PacketLog,
        terms: Terms,
        clock: Clock,
        *,
        displacement: torch.Tensor | None = None,
        paid: bytes | None = None,
        pledges: Pledges | None = None,
    ) -> None:
        layout = replica.layout
        if weights.shape != (layout.size,) or (displacement is not None and displacement.shape != (layout.size,)):
            raise refuse("bad-checkpoint", f"weights and displacement must be flat with {layout.size} values; they are of another model")
        self.replica = replica
        self.weights = weights
        self.rule = rule
        self.signer = Signer(*signer)
        self.stream = stream
        self.stream_key = stream_key(self.signer.public_key, stream)
        self.log = log
        self.terms = terms
        self._clock = clock
        self._chunks = layout.chunks
        self._stale = [False] * len(layout.chunks)
        self._memories = [CodecMemory() for _ in layout.chunks]
        most = max(chunk.size for chunk in layout.chunks)
        self._scratch = torch.empty(most, dtype=weights.dtype, pin_memory=weights.device.type == "cuda")
        self._d = torch.zeros(layout.size, dtype=weights.dtype) if displacement is None else displacement
        self.pledges = pledges or Pledges(self.stream_key, MemoryLog(), terms)
        own = replica.applied_copy().only(self.stream_key)
        self.paid: AppliedSet = own if paid is None else AppliedSet.decode(paid, len(layout.chunks), max_streams=1)
        if displacement is None:
            self._write_all()
        self.checkpointed()
        self.recovered = self._recover()

    # -- the trainer's side --------------------------------------------------------------------------------------------

    def mark_trained(self) -> None:
        """The weights have moved by local steps: the displacement is captured again before anything else happens to them."""
        self._stale = [True] * len(self._chunks)

    def displacement(self) -> torch.Tensor:
        """d as of now: flat, the weights' dtype, on the CPU. The live buffer, valid until the next call that changes it."""
        for chunk in self._chunks:
            self._captured(chunk)
        return self._d

    def encoded(self, chunk: Chunk, coefficient: float) -> bytes:
        """Payload of what d holds of one chunk beyond what is pledged. Changes nothing. Raises Refused("not-finite")."""
        left = self._captured(chunk)
        pledged = self.pledges.open_to(chunk.index)
        if pledged:
            left = left.clone()
        for contribution in pledged:
            contribution.delta.take_from(left, self._divisor(contribution))
        return self.terms.codec_of(chunk).encode(left, chunk, coefficient, self._memories[chunk.index])

    def take_over(self, index: int, units: torch.Tensor) -> None:
        """d of one chunk, and W with it, gain what others gave and no sum contains: this peer spreads it as its own work from now on."""
        chunk = self._chunks[index]

        def add() -> bool:
            d = chunk.of(self._d)
            for s in chunk.segments:
                d[s.start : s.stop].add_(units[s.start : s.stop].to(device=d.device, dtype=torch.float64).mul_(s.unit).to(d.dtype))
            return True

        self._change(chunk, add)

    def displacement_norm(self) -> float:
        """Euclidean norm of d: private work that the swarm does not have yet."""
        flat = self.displacement()
        return math.sqrt(sum(float(torch.linalg.vector_norm(c.of(flat), dtype=torch.float64)) ** 2 for c in self._chunks))

    def drop_displacement(self) -> None:
        """d = 0, W = B: private work that is too old to be of use is given up."""
        self._d.zero_()
        for chunk in self._chunks:
            self.pledges.close(chunk.index)
        self._stale = [False] * len(self._chunks)
        self._write_all()

    def keep_unpublished(self, saved: torch.Tensor | None) -> None:
        """After a crash that cost local training: d keeps of the checkpoint's displacement `saved` (None: there was none) what was not
        published since, value by value between 0 and `saved`; W = B + d.

        Packets that were published after the checkpoint also carry training that the restored weights lack. Paying these from d in full
        would make d owe that training, and the next publications would take it back from the swarm.
        """
        for chunk in self._chunks:
            d = chunk.of(self._d)
            self._pay_pledges(chunk, self.pledges.close(chunk.index))
            if saved is None:
                d.zero_()
            else:
                before = chunk.of(saved)
                d.clamp_(before.clamp(max=0), before.clamp(min=0))
        self._stale = [False] * len(self._chunks)
        self._write_all()

    def checkpointed(self, paid: bytes | None = None) -> None:
        """A checkpoint that holds `paid` (default: the present one) is durable: the log must keep own packets that it lacks."""
        kept = self.paid if paid is None else AppliedSet.decode(paid, len(self._chunks), max_streams=1)
        stream = kept.streams.get(self.stream_key)
        self.log.hold(self.stream_key, 1 + (int(stream.contiguous.min()) if stream else 0))

    # -- receive -------------------------------------------------------------------------------------------------------

    def receive(self, packets: Iterable[Packet]) -> list[Receipt]:
        """Add checked packets to B and W; d stays as it is, bit for bit. Receipts in the order of the packets.

        Own packets that come home pay their part of d unless it was paid. A refusal is in its receipt, and changes nothing.
        """
        listed = list(packets)
        by_chunk: dict[int, list[int]] = {}
        for at, packet in enumerate(listed):
            by_chunk.setdefault(packet.chunk, []).append(at)
        receipts: dict[int, Receipt] = {}
        for index, places in by_chunk.items():
            done = self._absorb(self._chunks[index], [listed[at] for at in places])
            receipts.update(zip(places, done, strict=True))
        return [receipts[at] for at in range(len(listed))]

    def _absorb(self, chunk: Chunk, packets: list[Packet]) -> list[Receipt]:
        if all(self._is_known(packet) for packet in packets):
            return [Receipt(packet.key, "duplicate") for packet in packets]
        receipts: list[Receipt] = []

        def add_all() -> bool:
            moved = False
            for packet in packets:
                receipt, moves = self._add(packet)
                receipts.append(receipt)
                moved |= moves
            return moved

        self._change(chunk, add_all)
        return receipts

    def _is_known(self, packet: Packet) -> bool:
        with self.replica.lock:
            in_basepoint = self.replica.applied.contains(*packet.key)
        return in_basepoint and (packet.stream_key != self.stream_key or self.paid.contains(*packet.key))

    def _add(self, packet: Packet) -> tuple[Receipt, bool]:
        """One packet into B, and out of d if it is an own one. The bool: does W = B + d move?"""
        try:
            fresh = self.replica.apply(packet)
        except Refused as refusal:
            return Receipt(packet.key, "refused", refusal), False
        paid = packet.stream_key == self.stream_key and self._pay(packet)
        if fresh and packet.header.included:
            self._pay_pledges(self._chunks[packet.chunk], self.pledges.listed(packet))
        outcome: Literal["applied", "settled", "duplicate"] = "applied" if fresh else "settled" if paid else "duplicate"
        return Receipt(packet.key, outcome), fresh != paid or (paid and self.rule.own_leak == "one")

    def _pay(self, packet: Packet) -> bool:
        """d -= leak*q, once per own packet."""
        if not self.paid.add(*packet.key):
            return False
        packet.delta.take_from(self._chunks[packet.chunk].of(self._d), self._divisor(packet))
        return True

    def _pay_pledges(self, chunk: Chunk, contributions: Iterable[Packet]) -> None:
        for contribution in contributions:
            contribution.delta.take_from(chunk.of(self._d), self._divisor(contribution))

    def _divisor(self, packet: Packet) -> float:
        """d -= c*q / divisor."""
        return packet.header.coefficient if self.rule.own_leak == "one" else 1.0

    # -- publish -------------------------------------------------------------------------------------------------------

    def publish(self, batches_total: int, share: float) -> Published:
        """One packet per chunk of the present displacement, with c = share_scale * share, at most the run's limit.

        batches_total: own batches so far in this stream. share: (0, 1].
        Raises Refused, before anything has changed: "not-finite", "out-of-range", "too-many-streams", "log-write".
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], not {share}")
        coefficient = min(self.rule.share_scale * share, self.terms.max_coefficient)
        drafts = [self._draft(chunk, batches_total, coefficient) for chunk in self._chunks]
        self.log.append_all([(draft.body, draft.packet.key) for draft in drafts], fsync=True)
        for draft in drafts:
            self._change(draft.chunk, partial(self._add_own, draft.packet))
        return Published([draft.body for draft in drafts], share if self.rule.momentum_keep == "share" else 1.0)

    def _draft(self, chunk: Chunk, batches_total: int, coefficient: float) -> _Draft:
        """The packet for one chunk, checked against everything that could refuse it later. Captures d, changes nothing else."""
        codec = self.terms.codec_of(chunk)
        payload = self.encoded(chunk, coefficient)
        delta = codec.open(payload, chunk)
        header = Header(
            version=PACKET_VERSION,
            run=self.terms.run,
            author=self.signer.public_key,
            stream=self.stream,
            seq=self._next_seq(chunk.index),
            chunk=chunk.index,
            batches_total=batches_total,
            coefficient=coefficient,
            codec=codec.name,
            created_unix=self._clock.wall(),
        )
        packet = Packet(header, delta)
        with self.replica.lock:
            self.replica.applied.can_add(*packet.key)
            self.replica.check_range(chunk, delta)
        return _Draft(chunk, delta, packet, Packet.seal(header, payload, self.signer.sign))

    def _add_own(self, packet: Packet) -> bool:
        receipt, moves = self._add(packet)
        if receipt.refusal is not None:  # checked when drafted, and nobody else adds packets
            raise receipt.refusal
        return moves

    def _next_seq(self, chunk: int) -> int:
        with self.replica.lock:
            applied = self.replica.applied.highest(self.stream_key, chunk)
        return 1 + max(applied, self.paid.highest(self.stream_key, chunk), self.log.latest(self.stream_key, chunk))

    # -- crash and snapshot --------------------------------------------------------------------------------------------

    def _recover(self) -> int:
        """Own packets that the log has and the checkpoint lacks go into B and out of d, as if they had just been published."""
        lost: dict[int, list[Packet]] = {}
        for key in self.log.keys(self.stream_key):
            with self.replica.lock:
                known = self.replica.applied.contains(*key)
            if not (known and self.paid.contains(*key)):
                body = self.log.get(key)
                if body is not None:
                    lost.setdefault(key[2], []).append(Packet.decode(body, self.terms))
        for index, packets in lost.items():
            self._absorb(self._chunks[index], sorted(packets, key=lambda packet: packet.seq))
        given = self.pledges.recover()
        for packet in given:
            self._change(self._chunks[packet.chunk], partial(self._pay_lost, packet))
        return sum(len(packets) for packets in lost.values()) + len(given)

    def _pay_lost(self, contribution: Packet) -> bool:
        self._pay_pledges(self._chunks[contribution.chunk], [contribution])
        return True

    def load_chunks(self, chunks: Mapping[int, bytes]) -> list[int]:
        """Replace chunks of B by a donor's snapshot chunks; d, and so private work, is kept: W = new B + d.

        Own packets are settled from the log: what the donor lacks is added, what d has not paid is paid. Where d cannot be paid because the
        log no longer has the packet, d of that chunk is dropped (else that work would count twice); returns these chunks.
        Raises Refused as Replica.load_chunk; the chunk in question is unchanged then, those before it are loaded.
        """
        dropped = []
        for index, data in chunks.items():
            chunk = self._chunks[index]

            def load(chunk: Chunk = chunk, data: bytes = data) -> bool:
                self.replica.load_chunk(chunk.index, data)
                self._pay_pledges(chunk, self.pledges.close(chunk.index))  # whether it contains them, nobody can tell
                if not self._settle(chunk):
                    dropped.append(chunk.index)
                return True

            self._change(chunk, load)
        return dropped

    def _settle(self, chunk: Chunk) -> bool:
        """Bring own packets in B, d and log into agreement for one chunk. False if d had to be dropped."""
        with self.replica.lock:
            applied = self.replica.applied.seqs(self.stream_key, chunk.index)
        paid = self.paid.seqs(self.stream_key, chunk.index)
        for seq in _each(ranges.subtract(paid, applied)):
            body = self.log.get((self.stream_key, seq, chunk.index))
            if body is not None:
                self._add(Packet.decode(body, self.terms))
        complete = True
        for seq in _each(ranges.subtract(applied, paid)):
            body = self.log.get((self.stream_key, seq, chunk.index))
            if body is not None:
                self._pay(Packet.decode(body, self.terms))
            else:
                self.paid.add(self.stream_key, seq, chunk.index)
                complete = False
        if not complete:
            chunk.of(self._d).zero_()
        return complete

    # -- W = B + d, chunk by chunk -------------------------------------------------------------------------------------

    def _change(self, chunk: Chunk, change: Callable[[], bool]) -> None:
        """Capture d, let `change` act on B and d, and write W = B + d (plus what d does not hold, on the grid) if it says that W moves."""
        d = self._captured(chunk)
        rest = self._remainder(chunk) if self.rule.grid_displacement else None
        if not change():
            return
        w = self.replica.chunk_weights(chunk.index, self._scratch[: chunk.size])
        w.add_(d)
        if rest is not None:
            w.add_(rest)
        chunk.of(self.weights).copy_(w)

    def _captured(self, chunk: Chunk) -> torch.Tensor:
        """d of one chunk, after taking in local steps."""
        d = chunk.of(self._d)
        if self._stale[chunk.index]:
            d.copy_(chunk.of(self.weights).detach())
            d.sub_(self.replica.chunk_weights(chunk.index, self._scratch[: chunk.size]))
            if self.rule.grid_displacement:
                _round_to_grid(d, chunk)
            self._stale[chunk.index] = False
        return d

    def _remainder(self, chunk: Chunk) -> torch.Tensor:
        """What W holds beyond B + d."""
        rest = chunk.of(self.weights).detach().cpu().clone()
        rest.sub_(self.replica.chunk_weights(chunk.index, self._scratch[: chunk.size]).add_(chunk.of(self._d)))
        return rest

    def _write_all(self) -> None:
        for chunk in self._chunks:
            w = self.replica.chunk_weights(chunk.index, self._scratch[: chunk.size]).add_(chunk.of(self._d))
            chunk.of(self.weights).copy_(w)


def _round_to_grid(d: torch.Tensor, chunk: Chunk) -> None:
    most = limits.grid_displacement_units
    for s in chunk.segments:
        d[s.start : s.stop].div_(s.unit).round_().clamp_(-most, most).mul_(s.unit)


def _each(pairs: Iterable[ranges.Range]) -> Iterable[int]:
    return (seq for first, last in pairs for seq in range(first, last + 1))
