"""Addresses of the peers that a home was in a swarm with, so that it finds them again after a restart without being told.

Enters: the peers known now. Leaves: a file of multiaddrs, one a line; after a restart these are dialled beside --bootstrap. It is a hint,
not a state: ids in it are proved by every dial, and lines that cannot be read are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable

from tscale_fed.home import Home
from tscale_fed.home_run import write_whole
from tscale_net.address import parse
from tscale_net.errors import Refused
from tscale_peers.membership import State
from tscale_peers.records import PeerRecord

NEIGHBOURS_KEPT = 32
"""Enough to find a swarm of which most have gone; the rest of its members come by gossip."""
NEIGHBOURS_BYTES = 64 << 10
"""More than 32 of the longest addresses."""


def addresses_to_keep(known: Iterable[tuple[PeerRecord, State]]) -> tuple[str, ...]:
    """One address of each peer that has not left, the live ones first."""
    staying = [(state is not State.LIVE, record.addresses[0]) for record, state in known if record.addresses and state is not State.LEFT]
    return tuple(address for _, address in sorted(staying)[:NEIGHBOURS_KEPT])


def remember_neighbours(home: Home, addresses: Iterable[str]) -> None:
    """Raises Refused("home") if the disk is full or the home may not be written."""
    write_whole(home.neighbours, "".join(f"{address}\n" for address in addresses).encode())


def known_neighbours(home: Home) -> tuple[str, ...]:
    """What was remembered; only addresses with a peer id."""
    try:
        text = home.neighbours.read_bytes()[:NEIGHBOURS_BYTES].decode("utf-8", "replace")
    except OSError:
        return ()
    return tuple(line for line in text.splitlines()[:NEIGHBOURS_KEPT] if _names_a_peer(line))


def _names_a_peer(line: str) -> bool:
    try:
        return parse(line).peer_id is not None
    except Refused:
        return False
