"""Who sums up which chunk: every peer works it out for itself from the peers that it knows.

Enters: the public keys of the peers that take part, the number of chunks. Leaves: one owner per chunk.
Rule: rendezvous hashing (Thaler and Ravishankar 1998) with bounded loads: each peer has a score for each chunk, which follows from the two
alone; a chunk goes to the peer with the highest score that owns fewer than a fair part and a quarter of the chunks. Equal views give equal
owners without a word being said, and when a peer comes or goes, hardly more chunks move than it takes or leaves.
Unequal views do no harm: every peer sums whatever contributions are addressed to it, so for a while a chunk has two owners.

Hysteresis: an owner stays one while it is only suspect; it loses its chunks when it is dead or has left. A newcomer takes its part once it
has been running for `owner_settled_s`, by the start that its record states, so that peers which only look in move nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tscale_peers import limits
from tscale_peers.membership import State
from tscale_peers.records import PeerRecord

Key = bytes
"""Public key of a peer, 32 bytes."""


def settled(record: PeerRecord, wall: float) -> bool:
    """Has this peer been running for long enough, with a replica of its own, to be an owner? wall: Unix time."""
    return bool(record.digest) and not record.leaving and wall - record.incarnation / 1000 >= limits.owner_settled_s


def candidates(own: PeerRecord | None, known: Iterable[tuple[PeerRecord, State]], wall: float) -> tuple[Key, ...]:
    """Keys of all that may own chunks, in ascending order: this peer itself (`own`, its newest record) and others."""
    others = [record for record, state in known if state in (State.LIVE, State.SUSPECT)]
    mine = [own] if own is not None else []
    return tuple(sorted(record.public_key for record in mine + others if settled(record, wall)))


def choose(peers: Sequence[Key], chunks: int) -> tuple[Key, ...]:
    """The owner of each chunk. `peers`: ascending, not empty."""
    most = max(1, -(-int(chunks * limits.owner_load) // len(peers)))
    order = np.argsort(_scores(peers, chunks), axis=1)[:, ::-1]
    loads = [0] * len(peers)
    owners = []
    for ranked in order:
        first = next(int(peer) for peer in ranked if loads[peer] < most)
        loads[first] += 1
        owners.append(peers[first])
    return tuple(owners)


class OwnerTable:
    """The owners as of the last `update`, worked out anew only when the peers that take part have changed."""

    def __init__(self, chunks: int) -> None:
        self.peers: tuple[Key, ...] = ()
        self.owners: tuple[Key, ...] = ()
        """One per chunk; empty while nobody takes part."""
        self._chunks = chunks

    def update(self, peers: tuple[Key, ...]) -> bool:
        """Take in who takes part; True if that has changed."""
        if peers == self.peers:
            return False
        self.peers = peers
        self.owners = choose(peers, self._chunks) if peers else ()
        return True

    def owned_by(self, key: Key) -> tuple[int, ...]:
        """The chunks of one peer, ascending."""
        return tuple(chunk for chunk, owner in enumerate(self.owners) if owner == key)


def _scores(peers: Sequence[Key], chunks: int) -> np.ndarray:
    """uint64 [chunks, peers]: a hash of the two (splitmix64, Steele et al. 2014)."""
    keys = np.array([int.from_bytes(key[:8], "little") for key in peers], dtype=np.uint64)
    numbers = _mixed(np.arange(1, chunks + 1, dtype=np.uint64))
    return _mixed(numbers[:, None] ^ keys[None, :])


def _mixed(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
