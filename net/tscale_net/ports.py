"""The three things that peer logic may know of the outside world: a transport, a clock, a source of randomness.

Nothing above this room touches zmq, time or random directly, so the same peer code runs on real sockets and, unchanged, in a
virtual-time simulation whose every failure can be replayed from a seed.

Enters: frames to send, addresses to dial. Leaves: events, in the order in which they happened on each link.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

PeerId = str
"""libp2p peer id of an Ed25519 key: base58btc, 52 characters, starts with 12D3KooW."""

Rng = random.Random
"""Seeded, injected; the module-level functions of `random` are never used."""

APPLICATION_KINDS_START = 32
"""Frame kinds below this number belong to tscale_net (HELLO, BYE, PING, blob transfer); the rooms above use the rest (up to 255)."""


class Channel(IntEnum):
    """Two connections per link: on a full 20 Mbit/s link a ping behind bulk takes 1.2 s on one, 12 ms on two (measured)."""

    CONTROL = 0
    BULK = 1


@dataclass(frozen=True, slots=True)
class LinkUp:
    """An authenticated session stands: the peer proved its key and both HELLOs were accepted."""

    peer: PeerId
    name: str
    run: bytes
    """Run id the peer stated, 32 bytes; empty if it is a newcomer that does not know the run yet."""
    address: str
    """Observed or dialled address, for people."""
    outgoing: bool


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The session ended. `reason` is one sentence for people."""

    peer: PeerId
    reason: str


class Frame(NamedTuple):
    """One application message of an authenticated peer, within the size limits."""

    peer: PeerId
    kind: int
    body: bytes
    channel: Channel


@dataclass(frozen=True, slots=True)
class WireRefusal:
    """Something was turned away below the application: counted and shown, never silent."""

    peer: PeerId | None
    code: str
    detail: str


Event = LinkUp | LinkDown | Frame | WireRefusal


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """One live link as it is now."""

    peer: PeerId
    name: str
    address: str
    outgoing: bool
    rtt_s: float | None
    up_bytes: int
    down_bytes: int


@dataclass(slots=True)
class Moved:
    """Bytes of all links of one transport since its start, links that are gone included."""

    sent_bytes: int = 0
    received_bytes: int = 0


class Clock(Protocol):
    """Seconds. `now` is monotonic and only good for differences, `wall` is Unix time."""

    def now(self) -> float: ...

    def wall(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The real clock."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Transport(Protocol):
    """Authenticated, encrypted message links to peers. One conformance suite (testing.py) is passed by every implementation."""

    @property
    def peer_id(self) -> PeerId: ...

    run: bytes
    """Run id stated in HELLO; empty until a newcomer has learned it. A peer that states another run is refused."""

    async def start(self) -> Sequence[str]:
        """Begin to listen (if so configured) and return the multiaddrs that others can dial.

        Raises tscale_net.errors.Refused if the port is taken.
        """
        ...

    async def dial(self, address: str) -> PeerId:
        """Connect and shake hands; returns when the link stands (LinkUp is also queued). If it already stands, returns at once.

        Raises tscale_net.errors.Refused with the reason and what to check. Cancellation leaves nothing behind.
        """
        ...

    def send(self, peer: PeerId, kind: int, body: bytes, channel: Channel = Channel.CONTROL) -> bool:
        """Queue one message; never waits. False if there is no such link or its queue is full (the caller tries again later)."""
        ...

    def pending_bytes(self, peer: PeerId) -> int:
        """Bulk bytes queued here that the network has not taken yet."""
        ...

    def drop(self, peer: PeerId, reason: str, ban_s: float = 0.0) -> None:
        """End the link after a BYE with `reason`; refuse the peer for `ban_s` seconds."""
        ...

    async def next_event(self) -> Event:
        """The next event. Safe to cancel: no event is lost."""
        ...

    def links(self) -> Sequence[LinkInfo]: ...

    @property
    def moved(self) -> Moved:
        """Bytes so far; read it, do not change it."""
        ...

    async def close(self, linger_s: float = 0.0) -> None:
        """Say BYE on all links, give queued messages up to `linger_s` seconds, then stop. May be called twice."""
        ...
