"""What waits to be checked, one neighbour after the other: a flood from one delays the others by one check.

Enters: bytes by neighbour. Leaves: one at a time, neighbours taking turns.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from tscale_net.ports import PeerId


class Turns:
    """Queues by neighbour, each of at most `most` messages and, together, `most_bytes` per neighbour."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._queues: OrderedDict[PeerId, deque[bytes]] = OrderedDict()
        self._bytes: dict[PeerId, int] = {}
        self._some = asyncio.Event()

    def put(self, source: PeerId, body: bytes) -> bool:
        """False if there is no room for more of this neighbour's."""
        queue, size = self._queues.setdefault(source, deque()), self._bytes.get(source, 0) + len(body)
        if len(queue) >= self._most or size > self._most_bytes:
            return False
        queue.append(body)
        self._bytes[source] = size
        self._some.set()
        return True

    async def next(self) -> tuple[PeerId, bytes]:
        """The oldest of the neighbour whose turn it is."""
        await self._some.wait()
        source, queue = self._queues.popitem(last=False)
        body = queue.popleft()
        self._bytes[source] -= len(body)
        if queue:
            self._queues[source] = queue
        else:
            del self._bytes[source]
        if not self._queues:
            self._some.clear()
        return source, body
