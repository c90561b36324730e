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
A publication may be made beside training (`begin_publication`, drafting.py): q is what d held at one meeting, and B gains it, and d pays
it, at a later one, when it is durable. d is linear in what it pays, so the training in between stays in it.

On the grid (`grid_displacement`): a captured d is rounded to multiples of each unit, at most 2**24 of them, so B + sum of d is conserved to
the last bit. The remainder stays in W: it is carried along when W is written, and is part of the next capture.
B and d are on the replica's device; displacement.py says how d is held and what that costs in exactness. One thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

import torch

from tscale_net.errors import Refused
from tscale_net.ports import Clock
from tscale_peers import limits, ranges
from tscale_peers.applied import AppliedSet
from tscale_peers.basepoint import Replica
from tscale_peers.codec import CodecMemory
from tscale_peers.delta_batch import prepare
from tscale_peers.delta_log import PacketLog
from tscale_peers.displacement import Displacement, Span
from tscale_peers.drafting import Desk, Drafting
from tscale_peers.errors import refuse
from tscale_peers.lane import Lane, on_device, wait_for
from tscale_peers.layout import Chunk
from tscale_peers.outer_rule import OuterRule, Published, Receipt, Signer
from tscale_peers.packet import Packet, Sign, Terms, stream_key
from tscale_peers.packet_log import MemoryLog
from tscale_peers.pledges import Pledges
from tscale_peers.publisher import Draft, Publisher

__all__ = ["Exchange", "OuterRule", "Published", "Receipt", "Signer"]

T = TypeVar("T")
R = TypeVar("R")


class Exchange:
    """See the module's head.

    weights: flat [layout.size], fp32 or fp64, any device; trained in place by its owner between calls.
    displacement None: a newcomer, d = 0 and W = B. Otherwise d as saved (taken over, not copied), weights as saved.
    paid: bytes saved with d; None means that d has paid all own packets that the replica contains.
    keep_displacement: d in memory of its own (exact) or implied by W - B (4 bytes per weight less): displacement.py. Kept on the grid.
    helper: one thread that makes publications beside training; None: they are made at once.
    At construction own packets of the log are recovered: `recovered`, so many. Raises Refused("bad-checkpoint") if sizes do not fit.
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
        keep_displacement: bool = True,
        helper: Executor | None = None,
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
        self.helper = helper
        self._clock = clock
        self._chunks = layout.chunks
        self._memories = [CodecMemory() for _ in layout.chunks]
        grid = rule.grid_displacement
        self._place = Displacement(replica, weights, displacement, kept=keep_displacement or grid, grid=grid)
        self._desk = Desk(self._place, self._chunks, weights, replica.device, helper)
        self._uploads = Lane(replica.device)
        self.unplaced: list[Receipt] = []
        """Own packets that did not fit into B's range any more when they were durable: to be offered again, as those of others are."""
        self._in_use: list[Packet] = []
        """Uploaded by another stream: kept until the device has added them."""
        self.pledges = pledges or Pledges(self.stream_key, MemoryLog(), terms)
        own = replica.applied_copy().only(self.stream_key)
        self.paid: AppliedSet = own if paid is None else AppliedSet.decode(paid, len(layout.chunks), max_streams=1)
        self._publisher = Publisher(replica, log, terms, self.signer, stream, self.paid, clock)
        if displacement is None:
            self._place.write_all()
        self.checkpointed()
        self.recovered = self._recover()

    # -- the trainer's side --------------------------------------------------------------------------------------------

    def mark_trained(self) -> None:
        """The weights have moved by local steps: the displacement is captured again before anything else happens to them."""
        self._place.mark_trained()

    def displacement(self) -> torch.Tensor:
        """d as of now: flat, the weights' dtype, on the CPU; where it is kept there, the live buffer."""
        return self._place.flat()

    def copy_displacement(self, span: Span, out: torch.Tensor) -> None:
        """d of some chunks to their place in `out`, flat, any device."""
        for part in self._place.spans(span.chunks):
            part.of(out).copy_(self._place.capture(part))

    def encoded(self, chunk: Chunk, coefficient: float) -> bytes:
        """Payload of what d holds of one chunk beyond what is pledged. Changes nothing. Raises Refused("not-finite")."""
        (span,) = self._place.spans([chunk])
        d = self._place.capture(span).clone()
        self._pay_pledges(d, self.pledges.open_to(chunk.index))
        return self.terms.codec_of(chunk).encode(d, chunk, coefficient, self._memories[chunk.index])

    def take_over(self, index: int, units: torch.Tensor) -> None:
        """d of one chunk, and W with it, gain what others gave and no sum contains: this peer spreads it as its own work from now on."""

        def add(chunk: Chunk, d: torch.Tensor) -> bool:
            for s in chunk.segments:
                d[s.start : s.stop].add_(units[s.start : s.stop].to(device=d.device, dtype=torch.float64).mul_(s.unit).to(d.dtype))
            return True

        self._change([self._chunks[index]], add)

    def displacement_norm(self) -> float:
        """Euclidean norm of d: private work that the swarm does not have yet."""
        return self._place.norm()

    def drop_displacement(self) -> None:
        """d = 0, W = B: private work that is too old to be of use is given up. No publication may be under way."""
        for chunk in self._chunks:
            self.pledges.close(chunk.index)
        for span in self._place.spans():
            self._place.replace(span, torch.zeros(span.size, dtype=self.weights.dtype))

    def keep_unpublished(self, saved: torch.Tensor | None) -> None:
        """After a crash that cost local training: d keeps of the checkpoint's displacement `saved` (None: there was none) what was not
        published since, value by value between 0 and `saved`; W = B + d. No publication may be under way.

        Packets published since also carry training that the restored weights lack: paid in full, d would owe that training, and the next
        publications would take it back from the swarm.
        """
        for span in self._place.spans():
            d = self._place.capture(span)
            for chunk in span.chunks:
                self._pay_pledges(span.part(chunk, d), self.pledges.close(chunk.index))
            if saved is None:
                d.zero_()
            else:
                before = span.of(saved).to(d.device)
                d.clamp_(before.clamp(max=0), before.clamp(min=0))
            self._place.replace(span, d)

    def checkpointed(self, paid: bytes | None = None) -> None:
        """A checkpoint that holds `paid` (default: the present one) is durable: the log must keep own packets that it lacks."""
        kept = self.paid if paid is None else AppliedSet.decode(paid, len(self._chunks), max_streams=1)
        stream = kept.streams.get(self.stream_key)
        self.log.hold(self.stream_key, 1 + (int(stream.contiguous.min()) if stream else 0))

    # -- receive -------------------------------------------------------------------------------------------------------

    def prepared(self, packet: Packet) -> Packet:
        """A checked packet, uploaded ahead, on any thread but the meeting's; complete when this returns."""
        with self._uploads:
            prepare(packet.delta, self.replica.device)
        return packet

    @property
    def busy(self) -> bool:
        """May a device still be at work for the exchange?"""
        return self.replica.device.type != "cpu" or self.weights.device.type != "cpu"

    def wait(self) -> None:
        """Wait until the device has done what was launched here. Packets that were uploaded ahead must outlive it: this lets them go."""
        wait_for(self.replica.device)
        wait_for(self.weights.device)
        self._in_use.clear()

    def receive(self, packets: Iterable[Packet]) -> list[Receipt]:
        """Add checked packets to B and W; d stays as it is. Receipts in the order of the packets.

        Own packets that come home pay their part of d unless it was paid. A refusal is in its receipt, and changes nothing.
        """
        if len(self._in_use) > limits.packets_in_use:
            self.wait()
        listed = list(packets)
        by_chunk: dict[int, list[int]] = {}
        receipts: dict[int, Receipt] = {}
        for at, packet in enumerate(listed):
            if self._is_known(packet):
                receipts[at] = Receipt(packet.key, "duplicate")
            else:
                by_chunk.setdefault(packet.chunk, []).append(at)

        def add(chunk: Chunk, d: torch.Tensor) -> bool:
            places = by_chunk[chunk.index]
            done, moved = self._add([listed[at] for at in places], d)
            receipts.update(zip(places, done, strict=True))
            return moved

        self._change([self._chunks[index] for index in sorted(by_chunk)], add)
        return [receipts[at] for at in range(len(listed))]

    def _is_known(self, packet: Packet) -> bool:
        with self.replica.lock:
            in_basepoint = self.replica.applied.contains(*packet.key)
        return in_basepoint and (packet.stream_key != self.stream_key or self.paid.contains(*packet.key))

    def _add(self, packets: Sequence[Packet], d: torch.Tensor) -> tuple[list[Receipt], bool]:
        """Packets of one chunk into B, and out of its d what they contain of own work. The bool: does W = B + d move?"""
        receipts: list[Receipt] = []
        moved = False
        if self.replica.device.type != "cpu":
            self._in_use += packets
        for packet, outcome in zip(packets, self.replica.apply_all(packets), strict=True):
            if isinstance(outcome, Refused):
                receipts.append(Receipt(packet.key, "refused", outcome))
                continue
            paid = packet.stream_key == self.stream_key and self._pay(packet, d)
            if outcome and packet.header.included:
                self._pay_pledges(d, self.pledges.listed(packet))
            receipts.append(Receipt(packet.key, "applied" if outcome else "settled" if paid else "duplicate"))
            moved |= outcome != paid or (paid and self.rule.own_leak == "one")
        return receipts, moved

    def _pay(self, packet: Packet, d: torch.Tensor) -> bool:
        """d -= leak*q, once per own packet."""
        if not self.paid.add(*packet.key):
            return False
        packet.delta.take_from(d, self._divisor(packet))
        return True

    def _pay_pledges(self, d: torch.Tensor, contributions: Iterable[Packet]) -> None:
        for contribution in contributions:
            contribution.delta.take_from(d, self._divisor(contribution))

    def _divisor(self, packet: Packet) -> float:
        """d -= c*q / divisor."""
        return packet.header.coefficient if self.rule.own_leak == "one" else 1.0

    # -- publish -------------------------------------------------------------------------------------------------------

    def publish(self, batches_total: int, share: float) -> Published:
        """One packet per chunk of the present displacement, with c = share_scale * share, at most the run's limit.

        batches_total: own batches so far in this stream. share: (0, 1]. Nothing else may be under way.
        Raises Refused, before anything has changed: "not-finite", "out-of-range", "too-many-streams", "log-write".
        """
        return self.begin_publication(batches_total, share).finish()

    def begin_publication(self, batches_total: int, share: float) -> Drafting[Draft, Published]:
        """The same beside training: the caller advances it at this meeting and the following ones."""
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], not {share}")
        coefficient = min(self.rule.share_scale * share, self.terms.max_coefficient)

        def draft(chunk: Chunk, payload: bytes) -> Draft:
            return self._publisher.draft(chunk, payload, batches_total, coefficient)

        def settle(drafts: list[Draft]) -> Published:
            receipts = self.receive(draft.packet for draft in drafts)
            refused = {receipt.key: receipt for receipt in receipts if receipt.refusal is not None}
            self.unplaced += refused.values()
            keep = share if self.rule.momentum_keep == "share" else 1.0
            return Published([draft.body for draft in drafts if draft.packet.key not in refused], keep)

        return self.drafting(self._chunks, coefficient, draft, self._publisher.keep, settle)

    def drafting(
        self,
        chunks: Sequence[Chunk],
        coefficient: float,
        make: Callable[[Chunk, bytes], T],
        keep: Callable[[list[T]], None],
        settle: Callable[[list[T]], R],
    ) -> Drafting[T, R]:
        """Something made of the payloads of what d holds of `chunks` (ascending) beyond what is pledged, beside training (drafting.py)."""
        pledged: dict[int, list[int]] = {}

        def note(chunk: Chunk) -> None:
            pledged[chunk.index] = self.pledges.open_numbers(chunk.index)

        def encode(chunk: Chunk, d: torch.Tensor) -> T:
            self._pay_pledges(d, self.pledges.read(chunk.index, pledged.pop(chunk.index)))
            return make(chunk, self.terms.codec_of(chunk).encode(d, chunk, coefficient, self._memories[chunk.index]))

        return Drafting(self._desk, chunks, before=note, make=encode, keep=keep, settle=settle)

    # -- crash and snapshot --------------------------------------------------------------------------------------------

    def _recover(self) -> int:
        """Own packets that the log has and the checkpoint lacks go into B and out of d, as if they had just been published."""
        lost: list[Packet] = []
        for key in self.log.keys(self.stream_key):
            with self.replica.lock:
                known = self.replica.applied.contains(*key)
            if not (known and self.paid.contains(*key)):
                body = self.log.get(key)
                if body is not None:
                    lost.append(Packet.decode(body, self.terms))
        self.receive(lost)
        given = self.pledges.recover()

        def pay(contribution: Packet, chunk: Chunk, d: torch.Tensor) -> bool:
            self._pay_pledges(d, [contribution])
            return True

        for packet in given:
            self._change([self._chunks[packet.chunk]], partial(pay, packet))
        return len(lost) + len(given)

    def load_chunks(self, chunks: Mapping[int, bytes]) -> list[int]:
        """Replace chunks of B by a donor's snapshot chunks; d, and so private work, is kept: W = new B + d.

        Own packets are settled from the log: what the donor lacks is added, what d has not paid is paid. Where the log no longer has what d
        must pay, d of that chunk is dropped (else that work would count twice); returns these chunks.
        Raises Refused as Replica.load_chunk: that chunk is unchanged then, those before it are loaded.
        """
        dropped = []

        def load(data: bytes, chunk: Chunk, d: torch.Tensor) -> bool:
            self.replica.load_chunk(chunk.index, data)
            self._pay_pledges(d, self.pledges.close(chunk.index))  # whether it contains them, nobody can tell
            if not self._settle(chunk, d):
                dropped.append(chunk.index)
            return True

        for index, data in chunks.items():
            self._change([self._chunks[index]], partial(load, data))
        return dropped

    def _settle(self, chunk: Chunk, d: torch.Tensor) -> bool:
        """Bring own packets in B, d and log into agreement for one chunk. False if d had to be dropped."""
        with self.replica.lock:
            applied = self.replica.applied.seqs(self.stream_key, chunk.index)
        paid = self.paid.seqs(self.stream_key, chunk.index)
        for seq in _each(ranges.subtract(paid, applied)):
            body = self.log.get((self.stream_key, seq, chunk.index))
            if body is not None:
                self._add([Packet.decode(body, self.terms)], d)
        complete = True
        for seq in _each(ranges.subtract(applied, paid)):
            body = self.log.get((self.stream_key, seq, chunk.index))
            if body is not None:
                self._pay(Packet.decode(body, self.terms), d)
            else:
                self.paid.add(self.stream_key, seq, chunk.index)
                complete = False
        if not complete:
            d.zero_()
        return complete

    # -- W = B + d -----------------------------------------------------------------------------------------------------

    def _change(self, chunks: Iterable[Chunk], change: Callable[[Chunk, torch.Tensor], bool]) -> None:
        """Capture d, let `change` act on B and d of each chunk, and write W = B + d (plus what d does not hold, on the grid) where it says
        that W moves. chunks: ascending."""
        with on_device(self.replica.device):
            for span in self._place.spans(chunks):
                d = self._place.capture(span)
                rest = self._place.remainder(span, d)
                moved = [chunk for chunk in span.chunks if change(chunk, span.part(chunk, d))]
                self._place.write(span, d, rest, moved)


def _each(pairs: Iterable[ranges.Range]) -> Iterable[int]:
    return (seq for first, last in pairs for seq in range(first, last + 1))
