"""What a peer stands on before it knows its run: home, identity, links, console.

Enters: the command line. Leaves: a `Ground` with everything of the outside world in it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from tscale_fed.console import Console
from tscale_fed.home import Home
from tscale_fed.home_run import known_manifest
from tscale_net import identity
from tscale_net.address_book import AddressBook
from tscale_net.errors import Refused
from tscale_net.identity import Identity
from tscale_net.ports import Clock, PeerId, SystemClock
from tscale_net.token_bucket import TokenBucket
from tscale_net.transfer import Transfers
from tscale_net.transport import ZmqTransport
from tscale_peers.notices import Notice, NoticeBoard
from tscale_peers.peer import Outside

DEFAULT_LISTEN = "0.0.0.0:7700"
ANY_PORT = "0.0.0.0:0"
SHOWN_KINDS = frozenset({"peers", "agree", "diverged", "dial", "link", "catch-up"})
"""Notices that the console prints; refusals are counted in status, and printed once per reason."""


@dataclass(slots=True)
class Ground:
    """Everything outside the run."""

    arguments: argparse.Namespace
    home: Home
    console: Console
    clock: Clock
    identity: Identity
    outside: Outside
    board: NoticeBoard
    name: str
    addresses: tuple[str, ...]

    def linked(self) -> list[PeerId]:
        return [link.peer for link in self.outside.transport.links()]


async def open_ground(arguments: argparse.Namespace, home: Home, console: Console, executor: Executor) -> Ground:
    """Identity, and a transport that listens. Raises Refused for a home, identity file, address or port that cannot be used."""
    known = known_manifest(home)
    is_new = not home.identity.exists()
    me = identity.load_or_create(home.identity)
    name = arguments.name or identity.friendly_name(me.public_key)
    remark = "  new identity, keep this file" if is_new else ""
    console.say(f"you are {name} ({me.peer_id[:8]}…{me.peer_id[-6:]}), key in {home.identity}{remark}")
    clock, rng = SystemClock(), random.Random()
    book = AddressBook(home.known_peers)

    def transport(listen: str | None) -> ZmqTransport:
        return ZmqTransport(
            me, clock, rng, listen, known.run_id if known else b"", name, arguments.max_upload, arguments.advertise, book,
            on_first_contact=lambda contact: console.warn(str(contact)),
        )  # fmt: skip

    links, addresses = await _listening(arguments, transport)
    download = TokenBucket(arguments.max_download, clock) if arguments.max_download else None
    outside = Outside(links, Transfers(links, clock, rng, download), clock, rng, identity.verify, executor, download)
    return Ground(arguments, home, console, clock, me, outside, NoticeBoard(clock, _shower(console)), name, addresses)


async def _listening(arguments: argparse.Namespace, make: Callable[[str | None], ZmqTransport]) -> tuple[ZmqTransport, tuple[str, ...]]:
    """A seed fails if its port is taken; another peer that did not choose a port takes the next free pair."""
    if arguments.solo:
        transport = make(None)
        return transport, tuple(await transport.start())
    transport = make(arguments.listen or DEFAULT_LISTEN)
    try:
        return transport, tuple(await transport.start())
    except Refused as refusal:
        await transport.close()
        if refusal.code != "port-taken" or arguments.role == "seed" or arguments.listen is not None:
            raise
    transport = make(ANY_PORT)
    return transport, tuple(await transport.start())


def _shower(console: Console) -> Callable[[Notice], None]:
    told: set[str] = set()

    def show(notice: Notice) -> None:
        if notice.kind in SHOWN_KINDS:
            console.say(notice.text)
        elif notice.kind == "refused" and notice.text not in told:
            if len(told) < 1000:
                told.add(notice.text)
                console.warn(notice.text)

    return show


def reach_sentence(addresses: Sequence[str], solo: bool) -> str:
    """How others can reach this peer, for people."""
    if solo:
        return "solo: no connections"
    if not addresses:
        return "outbound only: this peer dials others and everything flows on those links"
    return f"listening at {addresses[0]}" + (f" and {len(addresses) - 1} more" if len(addresses) > 1 else "")
