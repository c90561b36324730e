"""What the tests of this room share: identities by number, arenas on both transports."""

from __future__ import annotations

import random

from tscale_net.address_book import AddressBook
from tscale_net.identity import Identity
from tscale_net.memory_network import MemoryNetwork
from tscale_net.ports import Clock, Rng, SystemClock, Transport
from tscale_net.transport import ZmqTransport


def identity(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32, "little"))


class MemoryArena:
    def __init__(self, clock: Clock, rng: Rng) -> None:
        self.clock = clock
        self.network = MemoryNetwork(rng, clock)

    async def peer(self, number: int, *, name: str = "", run: bytes = b"") -> tuple[Transport, str]:
        transport = self.network.transport(identity(number), name, run)
        return transport, (await transport.start())[0]

    def unreachable(self) -> str:
        return f"{identity(99).peer_id}@10.9.9.9:7700"


class ZmqArena:
    """Real sockets on loopback."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.transports: list[ZmqTransport] = []

    def make(self, number: int, *, name: str = "", run: bytes = b"", listen: str | None = "127.0.0.1:0", **more: object) -> ZmqTransport:
        book = more.pop("address_book", None)
        assert book is None or isinstance(book, AddressBook)
        transport = ZmqTransport(
            identity(number), self.clock, random.Random(number), listen, run, name, address_book=book, **more  # type: ignore[arg-type]
        )
        self.transports.append(transport)
        return transport

    async def peer(self, number: int, *, name: str = "", run: bytes = b"") -> tuple[Transport, str]:
        transport = self.make(number, name=name, run=run)
        return transport, (await transport.start())[0]

    def unreachable(self) -> str:
        return f"{identity(99).peer_id}@127.0.0.1:1"

    async def close(self) -> None:
        for transport in self.transports:
            await transport.close()
