"""The queue between the links and the one who reads `next_event`: bounded, and never loses an event to cancellation.

Enters: events of the links. Leaves: the same, in order. Rule: nothing is dropped. When too much is unread, `crowded` tells the readers of
the sockets to pause, so that TCP slows the senders down. Refusals, which strangers cause, are only counted when many are unread.
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
        self._reader: asyncio.Future[None] | None = None
        """Whoever waits in `get`."""
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._frames = 0
        self._bytes = 0
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
        """Queue an event."""
        if isinstance(event, Frame):
            self._frames += 1
            self._bytes += len(event.body)
            if self._frames > limits.UNREAD_FRAMES or self._bytes > limits.UNREAD_BYTES:
                self._roomy.clear()
        self._events.append(event)
        self._wake()

    def refuse(self, peer: PeerId | None, code: str, detail: str) -> None:
        """Count a refusal and show it, as long as somebody reads."""
        self.refused[code] += 1
        if self._refusals < limits.REFUSALS_QUEUED:
            self._refusals += 1
            self.put(WireRefusal(peer, code, detail))

    async def get(self) -> Event:
        """The next event. Raises Refused("closed") after the last one; a failure of a background task is raised here."""
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise Refused("closed")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        event = self._events.popleft()
        if isinstance(event, Frame):
            self._frames -= 1
            self._bytes -= len(event.body)
            if self._frames <= limits.UNREAD_FRAMES // 2 and self._bytes <= limits.UNREAD_BYTES // 2:
                self._roomy.set()
        elif isinstance(event, WireRefusal):
            self._refusals -= 1
        return event

    def fail(self, error: BaseException) -> None:
        """Hand an unexpected error of a background task to whoever reads events."""
        if self._failure is None:
            self._failure = error
        self._wake()
        self._roomy.set()

    def close(self) -> None:
        """No more events will come."""
        self._closed = True
        self._wake()
        self._roomy.set()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
