"""The queue between the links and the one who reads `next_event`: bounded per peer, and never loses an event to cancellation.

Enters: events of the links. Leaves: the same, in order. Rule: what a peer sends beyond its share while nobody reads is dropped and counted;
beyond the total, `crowded` tells the readers of the sockets to pause, so that TCP slows the senders. LinkUp and LinkDown are never dropped.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.ports import Event, Frame, PeerId, WireRefusal


class EventQueue:
    """One per transport."""

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        """How often each code was refused since the start; counts on when refusal events are no longer queued."""
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._frames: Counter[PeerId] = Counter()
        self._bytes: Counter[PeerId] = Counter()
        self._total_bytes = 0
        self._refusals = 0
        self._failure: BaseException | None = None
        self._closed = False

    @property
    def crowded(self) -> bool:
        """Whether readers should pause."""
        return not self._roomy.is_set()

    async def room(self) -> None:
        """Wait until readers may go on."""
        await self._roomy.wait()

    def put(self, event: Event) -> None:
        """Queue an event; frames beyond the share of their peer become a refusal."""
        if isinstance(event, Frame) and not self._admit(event):
            return
        self._events.append(event)
        self._arrived.set()

    def refuse(self, peer: PeerId | None, code: str, detail: str) -> None:
        """Count a refusal and show it, as long as somebody reads."""
        self.refused[code] += 1
        if self._refusals < limits.REFUSALS_QUEUED:
            self._refusals += 1
            self.put(WireRefusal(peer, code, detail))

    def _admit(self, frame: Frame) -> bool:
        peer, size = frame.peer, len(frame.body)
        if self._frames[peer] >= limits.EVENTS_PER_PEER or self._bytes[peer] + size > limits.EVENT_BYTES_PER_PEER:
            self.refuse(peer, "overflow", f"{peer} sends faster than this program reads; a message of {size} bytes was dropped.")
            return False
        self._frames[peer] += 1
        self._bytes[peer] += size
        self._total_bytes += size
        if self._total_bytes > limits.EVENT_BYTES_TOTAL:
            self._roomy.clear()
        return True

    async def get(self) -> Event:
        """The next event. Raises Refused("closed") after the last one; a failure of a background task is raised here."""
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise Refused("closed")
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if isinstance(event, Frame):
            self._release(event)
        elif isinstance(event, WireRefusal):
            self._refusals -= 1
        return event

    def _release(self, frame: Frame) -> None:
        self._frames[frame.peer] -= 1
        self._bytes[frame.peer] -= len(frame.body)
        self._total_bytes -= len(frame.body)
        if not self._frames[frame.peer]:
            del self._frames[frame.peer], self._bytes[frame.peer]
        if self._total_bytes <= limits.EVENT_BYTES_TOTAL // 2:
            self._roomy.set()

    def fail(self, error: BaseException) -> None:
        """Hand an unexpected error of a background task to whoever reads events."""
        if self._failure is None:
            self._failure = error
        self._arrived.set()
        self._roomy.set()

    def close(self) -> None:
        """No more events will come."""
        self._closed = True
        self._arrived.set()
        self._roomy.set()
