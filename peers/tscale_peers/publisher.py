"""An author's packets: from a payload to a signed packet in the log.

Enters: payloads of chunks. Leaves: drafts, checked against everything that could refuse them later; the same, durable.
Runs beside training, so it only reads what the meeting changes. A number that was given once is never given again, whether basepoint,
checkpoint or log remember it.
"""

from __future__ import annotations

from typing import NamedTuple

from tscale_net.ports import Clock
from tscale_peers.applied import AppliedSet
from tscale_peers.basepoint import Replica
from tscale_peers.delta_batch import prepare
from tscale_peers.delta_log import PacketLog
from tscale_peers.errors import refuse
from tscale_peers.layout import Chunk
from tscale_peers.outer_rule import Signer
from tscale_peers.packet import PACKET_VERSION, Header, Packet, Terms, stream_key


class Draft(NamedTuple):
    """An own packet that nobody has seen yet, and its bytes."""

    packet: Packet
    body: bytes


class Publisher:
    """One author's stream. paid: own packets that the displacement has given up."""

    def __init__(self, replica: Replica, log: PacketLog, terms: Terms, signer: Signer, stream: int, paid: AppliedSet, clock: Clock) -> None:
        self._replica = replica
        self._log = log
        self._terms = terms
        self._signer = signer
        self._stream = stream
        self._stream_key = stream_key(signer.public_key, stream)
        self._paid = paid
        self._clock = clock

    def draft(self, chunk: Chunk, payload: bytes, batches_total: int, coefficient: float) -> Draft:
        """The packet for one chunk; its delta is uploaded on the current stream.

        Raises Refused, as applying it would: "out-of-range", "too-many-streams", "too-many-gaps".
        """
        codec = self._terms.codec_of(chunk)
        delta = codec.open(payload, chunk)
        header = Header(
            version=PACKET_VERSION,
            run=self._terms.run,
            author=self._signer.public_key,
            stream=self._stream,
            seq=self._next_seq(chunk.index),
            chunk=chunk.index,
            batches_total=batches_total,
            coefficient=coefficient,
            codec=codec.name,
            created_unix=self._clock.wall(),
        )
        packet = Packet(header, delta)
        with self._replica.lock:
            self._replica.applied.can_add(*packet.key)
            self._replica.check_range(chunk, delta)
        prepare(delta, self._replica.device)
        return Draft(packet, Packet.seal(header, payload, self._signer.sign))

    def keep(self, drafts: list[Draft]) -> None:
        """They are in the log, synced, when this returns. Raises Refused("log-write"), or "packet-seq": an own packet that this log had
        lost came home meanwhile. Then none of them counts."""
        taken = [draft.packet.seq for draft in drafts if self._log.holds(draft.packet.key)]
        if taken:
            raise refuse("packet-seq", f"packet number {taken[0]} was published before; the next publication takes another")
        self._log.append_all([(draft.body, draft.packet.key) for draft in drafts], fsync=True)

    def _next_seq(self, chunk: int) -> int:
        with self._replica.lock:
            applied = self._replica.applied.highest(self._stream_key, chunk)
        return 1 + max(applied, self._paid.highest(self._stream_key, chunk), self._log.latest(self._stream_key, chunk))
