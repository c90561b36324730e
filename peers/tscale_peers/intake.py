"""Packets coming in: queue, check, log, announce, apply; each exactly once.

Enters: bytes of neighbours. Leaves: checked packets in the log and on the meeting's list. A queue bounds what waits for its signature check.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tscale_net.errors import Refused
from tscale_net.ports import PeerId
from tscale_peers import limits
from tscale_peers.basepoint import Replica
from tscale_peers.delta_log import PacketLog
from tscale_peers.gossip import Gossip, Key
from tscale_peers.meeting import MeetingPoint
from tscale_peers.packet import Packet


class Intake:
    """`check` decodes strictly and verifies the signature (it may run on another thread); the rest runs on the event loop."""

    def __init__(self, check: Callable[[bytes], Packet], gossip: Gossip, log: PacketLog, meeting: MeetingPoint) -> None:
        self.check = check
        self._gossip = gossip
        self._log = log
        self._meeting = meeting
        self._queue: asyncio.Queue[tuple[PeerId, bytes]] = asyncio.Queue(limits.verify_queue_packets)

    def put(self, source: PeerId, body: bytes) -> None:
        """Raises Refused("flood") if more waits than anybody was asked for."""
        try:
            self._queue.put_nowait((source, body))
        except asyncio.QueueFull:
            raise Refused("flood", "more packets than were asked for") from None

    async def next(self) -> tuple[PeerId, bytes]:
        return await self._queue.get()

    def accept(self, packet: Packet, body: bytes, source: PeerId) -> bool:
        """Take up a checked packet; False if it is known. Raises Refused("equivocation") for a second content under one number."""
        key = packet.key
        if self._gossip.known.contains(*key):
            stored = self._log.get(key)
            if stored is not None and stored != body:
                raise Refused("equivocation", "an author signed two different packets with one number; the first one counts")
            self._gossip.heard_again(key, source)
            return False
        self._log.append(body, key)
        self._gossip.known.add(*key)
        self._gossip.accepted([key], source)
        self._meeting.offer(key, body)
        return True

    def reject(self, body: bytes, source: PeerId) -> None:
        """A bad packet may have been the answer to a request: ask somebody else."""
        key = Packet.peek_key(body)
        if key is not None:
            self._gossip.refused(key, source)

    def recount(self, replica: Replica) -> list[Key]:
        """Set `known` to the replica's applied set plus the log; returns the logged keys that the replica lacks."""
        known = replica.applied_copy()
        lacking = [key for key in self._log.all_keys() if known.add(*key)]
        self._gossip.known = known
        return lacking
