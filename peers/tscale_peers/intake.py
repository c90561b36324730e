"""Packets coming in: queue, check, log, announce, apply; each exactly once.

Enters: bytes of neighbours. Leaves: checked packets in the log and on the meeting's list.
What waits for its signature check is bounded per neighbour, and neighbours take turns: a flood from one delays the others by one check.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from tscale_net.errors import Refused
from tscale_net.ports import PeerId
from tscale_peers import limits
from tscale_peers.basepoint import Replica
from tscale_peers.delta_log import PacketLog
from tscale_peers.gossip import Gossip, Key
from tscale_peers.meeting import MeetingPoint
from tscale_peers.packet import Packet
from tscale_peers.turns import Turns


class Intake:
    """`check` decodes strictly and verifies the signature (it may run on another thread); the rest runs on the event loop."""

    def __init__(self, check: Callable[[bytes], Packet], gossip: Gossip, log: PacketLog, meeting: MeetingPoint) -> None:
        self.check = check
        self._gossip = gossip
        self._log = log
        self._meeting = meeting
        self._turns = Turns(limits.verify_queue_packets, limits.verify_queue_bytes)

    def put(self, source: PeerId, body: bytes) -> None:
        """Raises Refused("flood") if more of this neighbour's waits than it was asked for."""
        if not self._turns.put(source, body):
            raise Refused("flood", "more packets than were asked for")

    async def next(self) -> tuple[PeerId, bytes]:
        """The next packet to check: one of each neighbour in turn."""
        return await self._turns.next()

    def is_known(self, body: bytes, source: PeerId) -> bool:
        """Is this the very packet that the log has? Then its signature was checked before, and its sender holds it."""
        key = Packet.peek_key(body)
        if key is None or not self._gossip.known.contains(*key) or self._log.get(key) != body:
            return False
        self._gossip.heard_again(key, source)
        return True

    def accept(self, packet: Packet, body: bytes, source: PeerId) -> bool:
        """Take up a checked packet; False if it is known.

        Raises Refused, before anything has changed: "equivocation" for a second content under one number, "too-many-streams",
        "too-many-gaps", and "log-write", which is nobody's fault but ours: the packet is asked for again later.
        """
        key = packet.key
        if not self._gossip.known.can_add(*key):
            if self._log.holds(key) and self._log.get(key) != body:
                raise Refused("equivocation", "an author signed two different packets with one number; the first one counts")
            self._gossip.heard_again(key, source)
            return False
        self._log.append(body, key)
        self._gossip.known.add(*key)
        self._gossip.accepted([key], source)
        self._meeting.offer(key, packet, len(body))
        return True

    def reject(self, body: bytes, source: PeerId, blame: bool = True) -> None:
        """A bad packet may have been the answer to a request: ask somebody else; and if the sender is to blame, ask less of it."""
        key = Packet.peek_key(body)
        if key is not None:
            self._gossip.no_good(key, source, blame)

    def recount(self, replica: Replica) -> list[Key]:
        """Set `known` to the replica's applied set plus the log; returns the logged keys that the replica lacks."""
        known = replica.applied_copy()
        lacking = []
        for key in self._log.all_keys():
            with suppress(Refused):  # more streams or gaps than the run allows: as good as not known
                if known.add(*key):
                    lacking.append(key)
        self._gossip.now_known(known)
        return lacking
