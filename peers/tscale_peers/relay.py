"""Contributions on their way over links: own ones, and those of others for whom this peer is a step on the way.

Enters: contributions by owner; which links stand; how much waits at each link. Leaves: frames to send.
Wire: u8 links that it may still pass | contribution. Own contributions are read from their log when their turn comes; those of others are
held in memory, a bounded number of bytes per link, and dropped beyond: their authors take back what no sum lists. Both take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tscale_net.ports import Channel, PeerId
from tscale_peers import limits
from tscale_peers.errors import refuse
from tscale_peers.gossip import Send
from tscale_peers.messages import CONTRIBUTION
from tscale_peers.packet import Key


def framed(contribution: bytes, hops: int) -> bytes:
    """Body of the frame."""
    return bytes([hops]) + contribution


def unframed(body: bytes) -> tuple[int, bytes]:
    """(links that it may still pass, contribution). Raises Refused("too-many-hops", "bad-message")."""
    if len(body) < 2 or body[0] > limits.contribution_hops:
        raise refuse("bad-message", "a contribution without a count of hops")
    return body[0], body[1:]


@dataclass(slots=True)
class _Line:
    """What is to go over one link."""

    own: deque[Key] = field(default_factory=deque)
    others: deque[bytes] = field(default_factory=deque)
    others_bytes: int = 0
    own_next: bool = True


class Relay:
    """See the module's head. `read`: an own contribution from its log."""

    def __init__(self, read: Callable[[Key], bytes | None]) -> None:
        self.passed_on = 0
        """Contributions of others that went on to a neighbour."""
        self._read = read
        self._lines: dict[PeerId, _Line] = {}

    @property
    def waiting(self) -> bool:
        """Is there anything that has not left yet?"""
        return any(line.own or line.others for line in self._lines.values())

    @property
    def own_waiting(self) -> int:
        """Own contributions that have not left yet."""
        return sum(len(line.own) for line in self._lines.values())

    def send_own(self, key: Key, to: PeerId) -> None:
        self._lines.setdefault(to, _Line()).own.append(key)

    def pass_on(self, contribution: bytes, hops: int, to: PeerId) -> None:
        """hops: links that it may still pass. Raises Refused("too-many-hops", "relay-full")."""
        if hops < 1:
            raise refuse("too-many-hops", "a contribution has passed more links than any way is long")
        line = self._lines.setdefault(to, _Line())
        if line.others_bytes + len(contribution) > limits.relay_queue_bytes:
            raise refuse("relay-full", f"more than {limits.relay_queue_bytes} bytes of contributions wait for one link")
        line.others.append(framed(contribution, hops - 1))
        line.others_bytes += len(contribution) + 1

    def link_down(self, peer: PeerId) -> list[Key]:
        """What waited for this link; own contributions are returned, to go another way."""
        line = self._lines.pop(peer, None)
        return list(line.own) if line else []

    def flush(self, pending_bytes: Callable[[PeerId], int]) -> list[Send]:
        """What can go out now."""
        return [
            send for peer, line in self._lines.items() if line.own or line.others for send in self._next(peer, line, pending_bytes(peer))
        ]

    def _next(self, peer: PeerId, line: _Line, pending: int) -> list[Send]:
        sends = []
        while pending < limits.bulk_pending_bytes and (line.own or line.others):
            body = self._take(line)
            if body is not None:
                sends.append(Send(peer, CONTRIBUTION, body, Channel.BULK))
                pending += len(body)
        return sends

    def _take(self, line: _Line) -> bytes | None:
        own = bool(line.own) and (line.own_next or not line.others)
        line.own_next = not own
        if own:
            body = self._read(line.own.popleft())
            return framed(body, limits.contribution_hops - 1) if body is not None else None
        body = line.others.popleft()
        line.others_bytes -= len(body)
        self.passed_on += 1
        return body
