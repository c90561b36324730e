"""A TCP relay that makes a fast local connection slow: a rate limit and a delay in each direction.

Enters: the address of a server. Leaves: a port that leads to it. All connections through one relay share its rates, as they would share a
line; bytes leave in order, `delay_s` after they would have left a line of that rate. While more is under way than the line and a small
buffer hold, nothing more is read, so that TCP slows the sender down. The rate may be changed at any time, for what is read from then on.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

READ_BYTES = 1 << 16
BUFFER_CHUNKS = 16
"""Up to a megabyte waits beside what the line holds: less than most routers have."""
LOOPBACK = "127.0.0.1"


@dataclass
class Lane:
    """One direction. `bytes_per_s` 0: as fast as it goes."""

    bytes_per_s: float = 0.0
    delay_s: float = 0.0
    moved_bytes: int = 0
    _free_s: float = field(default=0.0, repr=False)

    def arrival_s(self, size: int, now_s: float) -> float:
        """When a chunk that is handed over now has arrived at the other end; takes its place on the line."""
        self.moved_bytes += size
        self._free_s = max(self._free_s, now_s) + (size / self.bytes_per_s if self.bytes_per_s else 0.0)
        return self._free_s + self.delay_s


class SlowLink:
    """Relays to HOST:PORT. `there`: from whoever connects to the server; `back`: the other way."""

    def __init__(self, host: str, port: int) -> None:
        self.there, self.back = Lane(), Lane()
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def limit(self, bytes_per_s: float, delay_s: float) -> None:
        """From now on, in each direction; `delay_s` is one way."""
        for lane in (self.there, self.back):
            lane.bytes_per_s, lane.delay_s = bytes_per_s, delay_s

    async def open(self, port: int = 0) -> int:
        """Listen on this machine; returns the port."""
        self._server = await asyncio.start_server(self._accept, LOOPBACK, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Cut all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            writers.append(far_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(_carry(reader, far_writer, self.there))
                both.create_task(_carry(far_reader, writer, self.back))
        except* OSError:
            pass  # one side is gone: so is the connection
        finally:
            self._connections.discard(task)
            for each in writers:
                each.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lane: Lane) -> None:
    """Until the reading side ends and all has arrived; then the other side is told. Raises OSError if either breaks."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(BUFFER_CHUNKS)

    async def deliver() -> None:
        while True:
            arrival_s, chunk = await under_way.get()
            if not chunk:
                return
            await asyncio.sleep(max(0.0, arrival_s - time.monotonic()))
            writer.write(chunk)
            await writer.drain()

    async def take() -> None:
        while chunk := await reader.read(READ_BYTES):
            await under_way.put((lane.arrival_s(len(chunk), time.monotonic()), chunk))
        await under_way.put((0.0, b""))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(deliver())
        tasks.create_task(take())
    writer.write_eof()
