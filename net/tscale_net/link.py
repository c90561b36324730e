"""One authenticated session with a peer: bounded queues out, checked frames in, keep-alive, farewell.

Enters: messages to send, parts that arrived, ticks of the keep-alive clock. Leaves: calls of its owner (`LinkOwner`).

States: up -> (leaving: the peer said BYE, what it sent before is still read) -> ended. A link never comes back; a new one is made.
Rules: `send` never waits; the control channel is never held up by the upload limit; a session is down when nothing was heard for SILENCE_S,
not counting time in which this process itself stood still; BYE goes last on both channels, so nothing sent before it is lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.messages import TRANSFER_KINDS, Bye, HelloBody, Kind, Ping, bye_of, decode, encode
from tscale_net.ports import APPLICATION_KINDS_START, Channel, Clock, LinkInfo, Moved, PeerId
from tscale_net.tasks import TaskOwner
from tscale_net.token_bucket import TokenBucket
from tscale_net.wire import Wire, WireGone

_PINGS_REMEMBERED = 8


class LinkOwner(Protocol):
    """What a link tells the transport."""

    def frame_came(self, link: Link, kind: int, body: bytes, channel: Channel) -> None: ...

    def frame_refused(self, link: Link, refusal: Refused) -> None: ...

    def link_ended(self, link: Link, reason: str) -> None: ...


class _OutQueue:
    """Messages waiting for one channel's writer."""

    def __init__(self) -> None:
        self.messages: deque[tuple[int, bytes]] = deque()
        self.bytes = 0
        """Bodies queued or in the writer's hands."""
        self.filled = asyncio.Event()

    def put(self, kind: int, body: bytes) -> None:
        self.messages.append((kind, body))
        self.bytes += len(body)
        self.filled.set()

    def discard(self) -> None:
        self.bytes -= sum(len(body) for _, body in self.messages)
        self.messages.clear()

    async def get(self) -> tuple[int, bytes]:
        while not self.messages:
            self.filled.clear()
            await self.filled.wait()
        return self.messages.popleft()


class Link:
    """One session; made when both HELLOs were accepted and both connections stand."""

    def __init__(
        self,
        peer: PeerId,
        hello: HelloBody,
        wires: dict[Channel, Wire],
        *,
        address: str,
        outgoing: bool,
        owner: LinkOwner,
        clock: Clock,
        upload: TokenBucket | None,
        moved: Moved | None = None,
    ) -> None:
        """`moved`: the transport's own count, which this link adds to."""
        self.peer = peer
        self.hello = hello
        """The peer's HELLO."""
        self.address = address
        self.outgoing = outgoing
        self.rtt_s: float | None = None
        self.ended = False
        self._wires = wires
        self._owner = owner
        self._clock = clock
        self._upload = upload
        self._queues = {channel: _OutQueue() for channel in Channel}
        self._writers: list[asyncio.Task[None]] = []
        self._rate = TokenBucket(limits.CONTROL_FRAMES_PER_S, clock, limits.CONTROL_FRAMES_BURST)
        self._moved = moved or Moved()
        self._up_bytes = 0
        self._down_bytes = 0
        self._strikes = 0
        self._silent_s = 0.0
        self._ticked_s = clock.now()
        self._pinged_s = -limits.PING_INTERVAL_S
        self._pings: dict[int, float] = {}
        self._ping_number = 0
        self._farewell: str | None = None
        self._farewells: set[Channel] = set()
        self._farewell_s = 0.0
        self._said_bye = False
        self.finished = asyncio.Event()
        """Set when the connections are closed or the far end closed them, which it does when it has read our BYE."""

    def start(self, tasks: TaskOwner) -> None:
        """Begin to write."""
        for wire in self._wires.values():
            wire.session = self.hello.session[:8]
        self._writers = [tasks.spawn(self._write(channel), f"write {channel.name} to {self.peer[-6:]}") for channel in Channel]

    # --- out ------------------------------------------------------------------------------------------------------------------
    def send(self, kind: int, body: bytes, channel: Channel) -> bool:
        """Queue a message; False if the queue is full or the session is ending."""
        queue = self._queues[channel]
        if self.ended or self._said_bye or self._farewell is not None:
            return False
        if channel is Channel.BULK:
            full = queue.bytes + len(body) > limits.BULK_QUEUE_BYTES
        else:
            full = len(queue.messages) >= limits.CONTROL_QUEUE_MESSAGES or queue.bytes + len(body) > limits.CONTROL_QUEUE_BYTES
        if full:
            return False
        queue.put(kind, body)
        return True

    def pending_bytes(self, channel: Channel = Channel.BULK) -> int:
        """Bytes of bodies that the socket has not taken yet."""
        return self._queues[channel].bytes

    async def _write(self, channel: Channel) -> None:
        queue, wire = self._queues[channel], self._wires[channel]
        while True:
            kind, body = await queue.get()
            if self._upload is not None:
                # Control bytes count against the limit but do not wait for it.
                wait_s = self._upload.reserve(limits.HEADER_BYTES + len(body))
                if channel is Channel.BULK and wait_s > 0:
                    await self._clock.sleep(wait_s)
            try:
                await wire.send(kind, body)
            except WireGone:
                self.connection_lost("The connection was lost.")
                return
            self._up_bytes += limits.HEADER_BYTES + len(body)
            self._moved.sent_bytes += limits.HEADER_BYTES + len(body)
            queue.bytes -= len(body)
            if kind == Kind.BYE:
                return

    # --- in -------------------------------------------------------------------------------------------------------------------
    def receive(self, parts: Sequence[bytes | memoryview], channel: Channel) -> None:
        """Act on one arrived message; never raises for what the peer did."""
        if self.ended:
            return
        self._silent_s = 0.0
        try:
            header, body = self._wires[channel].open(parts)
            self._down_bytes += limits.HEADER_BYTES + len(body)
            self._moved.received_bytes += limits.HEADER_BYTES + len(body)
            self._dispatch(header.kind, body, channel)
        except Refused as refusal:
            self._strikes += refusal.code != "too-fast"
            self._owner.frame_refused(self, refusal)

    @property
    def worn_out(self) -> bool:
        """Whether the peer sent too many malformed messages."""
        return self._strikes >= limits.STRIKES

    def _dispatch(self, kind: int, body: bytes, channel: Channel) -> None:
        if channel is Channel.CONTROL and not self._rate.try_take(1.0):
            raise Refused("too-fast", f"{self.peer} sends more than {limits.CONTROL_FRAMES_PER_S:.0f} control messages per second.")
        if kind in TRANSFER_KINDS or kind >= APPLICATION_KINDS_START:
            self._owner.frame_came(self, kind, body, channel)
        elif kind == Kind.BYE:
            self._hear_bye(decode(Bye, body), channel)
        elif kind == Kind.PING and channel is Channel.CONTROL:
            decode(Ping, body)
            self.send(Kind.PONG, body, Channel.CONTROL)
        elif kind == Kind.PONG and channel is Channel.CONTROL:
            self._hear_pong(decode(Ping, body))
        else:
            raise Refused("unknown-kind", f"{self.peer} sent a message of kind {kind}, which is not known here; it may be newer.")

    def _hear_pong(self, pong: Ping) -> None:
        sent_s = self._pings.pop(pong.number, None)
        if sent_s is None:
            return
        sample_s = self._clock.now() - sent_s
        self.rtt_s = sample_s if self.rtt_s is None else self.rtt_s + limits.RTT_WEIGHT * (sample_s - self.rtt_s)

    def _hear_bye(self, bye: Bye, channel: Channel) -> None:
        if self._farewell is None:
            self._farewell_s = self._clock.now()
            text = "".join(character if character.isprintable() else "?" for character in bye.detail)
            self._farewell = f"The peer left: {text}"
        self._farewells.add(channel)
        if len(self._farewells) == len(Channel):
            self.end(self._farewell)

    # --- time -----------------------------------------------------------------------------------------------------------------
    def tick(self, reading: bool) -> None:
        """Called about once a second: ping, and look for silence. `reading` is False while this side does not read its sockets."""
        now_s = self._clock.now()
        if reading:
            self._silent_s += min(now_s - self._ticked_s, limits.TICK_CREDIT_S)
        self._ticked_s = now_s
        if self._farewell is not None:
            if now_s - self._farewell_s > limits.FAREWELL_S:
                self.end(self._farewell)
        elif self._silent_s > limits.SILENCE_S:
            self.end(f"Nothing was heard for {limits.SILENCE_S:.0f} s; the peer or the way to it is down.")
        elif now_s - self._pinged_s >= limits.PING_INTERVAL_S:
            self._ping(now_s)

    def _ping(self, now_s: float) -> None:
        self._pinged_s = now_s
        self._ping_number += 1
        if self.send(Kind.PING, encode(Ping(self._ping_number)), Channel.CONTROL):
            self._pings[self._ping_number] = now_s
        while len(self._pings) > _PINGS_REMEMBERED:
            del self._pings[next(iter(self._pings))]

    # --- the end --------------------------------------------------------------------------------------------------------------
    def say_bye(self, code: str, detail: str, discard: bool = False) -> None:
        """Queue BYE as the last message of both channels, or instead of all that is queued."""
        if not self._said_bye:
            self._said_bye = True
            body = encode(bye_of(code, detail))
            for queue in self._queues.values():
                if discard:
                    queue.discard()
                queue.put(Kind.BYE, body)

    def goodbye(self, code: str, detail: str) -> None:
        """Say BYE and end; the owner is told at once and stops the link when it is `finished` or waited long enough.

        The linger of libzmq is no substitute: it may lose the tail of what was sent (measured: 1 of 5 closes).
        """
        self.say_bye(code, detail)
        if not self.ended:
            self.ended = True
            self._owner.link_ended(self, detail)

    def connection_lost(self, reason: str) -> None:
        """One of the connections ended; a farewell that was heard is the better reason."""
        self.end(self._farewell or reason)

    def end(self, reason: str) -> None:
        """The session is over and nothing more can be sent."""
        if not self.ended:
            self.ended = True
            self._owner.link_ended(self, reason)
        self.stop()

    def stop(self) -> None:
        """Stop the writers and close the connections at once."""
        self.finished.set()
        current = asyncio.current_task()
        for writer in self._writers:
            if writer is not current:
                writer.cancel()
        for wire in self._wires.values():
            wire.close()

    def info(self) -> LinkInfo:
        """The link as it is now."""
        return LinkInfo(self.peer, self.hello.name, self.address, self.outgoing, self.rtt_s, self._up_bytes, self._down_bytes)
