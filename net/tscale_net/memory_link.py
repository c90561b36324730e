"""One link of the network in memory: two ends, two ordered channels in each direction, as slow as the lines of its ends.

Enters: messages. Leaves: the same at the far end, later. What makes them late:
- the sender's uplink and the receiver's downlink: bulk passes one message after the other, control overtakes it;
- the distance: one-way delay of the link, jitter of each message;
- loss, as TCP shows it to its user: nothing is lost, but a link with round trip R and loss p carries at most 1460 B / R * sqrt(1.5 / p)
  in bulk (Mathis et al. 1997), and a small message that is hit comes a retransmission timeout later.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tscale_net import limits
from tscale_net.ports import Channel, Frame, LinkInfo, PeerId

if TYPE_CHECKING:
    from tscale_net.memory_network import MemoryNetwork
    from tscale_net.memory_transport import MemoryTransport

AFTER_S = 1e-6
"""Timers of the same moment have no order, hence a little later than the last message."""
SEGMENT_BYTES = 1460
"""What TCP sends at a time over ethernet."""
RETRANSMIT_S = 0.2
"""Least time after which TCP sends a lone segment again (Linux)."""


@dataclass(frozen=True, slots=True)
class Line:
    """One peer's way to the internet: bytes per second (None: no limit), a delay added one way, the part of segments that is lost."""

    up_bytes_s: float | None = None
    down_bytes_s: float | None = None
    delay_s: float = 0.0
    loss: float = 0.0


class MemoryLink:
    """See the module's head."""

    def __init__(self, network: MemoryNetwork, dialler: MemoryTransport, listener: MemoryTransport) -> None:
        self.network = network
        self.ends = (dialler, listener)
        self.latency_s = network.one_way_s() + dialler.line.delay_s + listener.line.delay_s
        self.loss = 1.0 - (1.0 - dialler.line.loss) * (1.0 - listener.line.loss)
        self.alive = True
        self.blocked = False
        self._silence: asyncio.TimerHandle | None = None
        self._pipes = {(end.peer_id, channel): Pipe(self, self.other(end), channel) for end in self.ends for channel in Channel}

    def joins(self, one: MemoryTransport, other: MemoryTransport) -> bool:
        """Whether this link stands between exactly these two, alive."""
        return self.alive and not self.blocked and {id(end) for end in self.ends} == {id(one), id(other)} and not (one.dead or other.dead)

    def other(self, end: MemoryTransport) -> MemoryTransport:
        """The far end."""
        return self.ends[1] if end is self.ends[0] else self.ends[0]

    def up(self) -> None:
        """Announce the link at both ends."""
        for end in self.ends:
            end.link_up(self, outgoing=end is self.ends[0])

    def pipe(self, sender: PeerId, channel: Channel) -> Pipe:
        """Where one end puts its messages of one channel."""
        return self._pipes[sender, channel]

    def goodbye(self, sender: MemoryTransport, reason: str) -> None:
        """`sender` leaves: the far end learns it after everything that was sent before."""
        last_s = max(self._pipes[sender.peer_id, channel].last_s for channel in Channel)
        arrival_s = max(self.network.clock.now() + self.latency_s, last_s) + AFTER_S
        far = self.other(sender)
        sender.forget_link(self)
        if self.blocked:
            return
        self._later(arrival_s - self.network.clock.now(), lambda: self._end_at(far, f"The peer left: {reason}"))

    def lose(self, gone: PeerId, after_s: float) -> None:
        """One end vanished; the other notices later."""
        far = self.ends[1] if self.ends[0].peer_id == gone else self.ends[0]
        self._later(after_s, lambda: self._end_at(far, "The connection was lost."))

    def block(self, blocked: bool) -> None:
        """Begin or end a silence."""
        if blocked == self.blocked or not self.alive:
            return
        self.blocked = blocked
        if blocked:
            self._silence = self._later(self.network.silence_s, lambda: self.end(f"Nothing was heard for {self.network.silence_s:.0f} s."))
            return
        if self._silence is not None:
            self._silence.cancel()
        for pipe in self._pipes.values():
            pipe.flush()

    def end(self, reason: str) -> None:
        """End the link at both ends now."""
        for end in self.ends:
            self._end_at(end, reason)

    def _end_at(self, end: MemoryTransport, reason: str) -> None:
        self.alive = False
        self.network.remove(self)
        end.link_down(self, reason)

    def _later(self, seconds: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, action)

    def info(self, end: MemoryTransport) -> LinkInfo:
        """The link as one of its ends sees it."""
        far = self.other(end)
        pipes, mine, theirs = self._pipes, end.peer_id, far.peer_id
        up_bytes = pipes[mine, Channel.CONTROL].bytes + pipes[mine, Channel.BULK].bytes
        down_bytes = pipes[theirs, Channel.CONTROL].delivered_bytes + pipes[theirs, Channel.BULK].delivered_bytes
        return LinkInfo(theirs, far.name, far.host_port, end is self.ends[0], 2 * self.latency_s, up_bytes, down_bytes)


class Pipe:
    """One channel in one direction; first in, first out."""

    def __init__(self, link: MemoryLink, receiver: MemoryTransport, channel: Channel) -> None:
        self.last_s = 0.0
        """When the newest message arrives."""
        self.bytes = 0
        self.delivered_bytes = 0
        self._link = link
        self._receiver = receiver
        self._sender = link.other(receiver)
        self._channel = channel
        self._queue: deque[tuple[int, bytes]] = deque()
        self._due = 0
        self._free_s = 0.0
        round_trip_s = 2 * link.latency_s
        self._ceiling_bytes_s = SEGMENT_BYTES / max(round_trip_s, AFTER_S) * math.sqrt(1.5 / link.loss) if link.loss else math.inf

    def put(self, kind: int, body: bytes) -> None:
        """Send a message on its way."""
        link, network, size = self._link, self._link.network, limits.HEADER_BYTES + len(body)
        now_s = network.clock.now()
        self.bytes += size
        self._sender.moved.sent_bytes += size
        left_s = self._leaves(len(body), size, now_s)
        arrival_s = left_s + link.latency_s + network.jitter_s * network.rng.random()
        down = self._receiver.line.down_bytes_s
        if down and self._channel is Channel.CONTROL:
            arrival_s += size / down
        if link.loss and self._channel is Channel.CONTROL and network.rng.random() < link.loss:
            arrival_s += RETRANSMIT_S + 2 * link.latency_s
        if arrival_s > self.last_s:
            self.last_s = arrival_s
        self._queue.append((kind, body))
        if down and self._channel is Channel.BULK:
            network.loop.call_later(self.last_s - now_s, self._at_the_downlink, size / down)
        else:
            network.loop.call_later(self.last_s - now_s, self._arrived)

    def _leaves(self, body_bytes: int, size: int, now_s: float) -> float:
        """When a message handed over now has left its sender, in clock seconds."""
        sender = self._sender
        bandwidth = sender.line.up_bytes_s
        took_s = size / bandwidth if bandwidth else 0.0
        if self._channel is Channel.CONTROL:
            return now_s + took_s
        left_s = sender.through_uplink(body_bytes, took_s, now_s)
        self._free_s = max(self._free_s, now_s) + size / self._ceiling_bytes_s
        left_s = max(left_s, self._free_s)
        sender.note_pending(self._receiver.peer_id, left_s, body_bytes)
        return left_s

    def _at_the_downlink(self, took_s: float) -> None:
        """Bulk at the far end's provider waits for its turn."""
        wait_s = self._receiver.through_downlink(took_s, self._link.network.clock.now())
        self._link.network.loop.call_later(wait_s, self._arrived)

    def _arrived(self) -> None:
        self._due += 1
        if not self._link.blocked:
            self.flush()

    def flush(self) -> None:
        """Hand over what has arrived."""
        link, receiver = self._link, self._receiver
        while self._due and receiver.holds(link):
            self._due -= 1
            kind, body = self._queue.popleft()
            size = limits.HEADER_BYTES + len(body)
            self.delivered_bytes += size
            receiver.moved.received_bytes += size
            link.network.messages += 1
            receiver.deliver(Frame(self._sender.peer_id, kind, body, self._channel))
