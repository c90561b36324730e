"""Who is there, by the links that peers state: everybody to whom a chain of links leads from here.

Enters: own links, records with their stated links. Leaves: the peers that are reached. Pure.
Rule: a link from one peer to another counts if the first, reached itself, states it. Who dies is no longer stated as soon as its neighbours
have noticed, and they notice at once (a reset connection) or after the silence that ends a link. So a death is known everywhere within
seconds, however large the swarm and however rarely records are renewed, and a part that was cut off is lost from sight as a whole.
A peer with more links than a record holds states some; for those that it leaves out the word of the other end counts.
"""

from __future__ import annotations

from collections.abc import Iterable

from tscale_net.ports import PeerId
from tscale_peers import limits
from tscale_peers.records import Heard, RecordBook

Node = bytes
"""First bytes of a public key."""


class Reach:
    """The view of one peer; worked out anew when links or records have changed."""

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._seen: tuple[int, frozenset[PeerId]] | None = None
        self.peers: frozenset[PeerId] = frozenset()

    def update(self, book: RecordBook, linked: Iterable[PeerId]) -> bool:
        """Take in the present links and records; True if they have changed since the last call."""
        seen = (book.links_version, frozenset(linked))
        if seen == self._seen:
            return False
        self._seen = seen
        self.peers = _reached(self._me, book, seen[1])
        return True


def _reached(me: PeerId, book: RecordBook, linked: frozenset[PeerId]) -> frozenset[PeerId]:
    at = {heard.record.public_key[: limits.node_bytes]: heard for heard in book.all()}
    also = _left_out(at)
    reached: set[PeerId] = set(linked)
    waiting = [heard for peer in linked if (heard := book.get(peer)) is not None]
    while waiting:
        heard = waiting.pop()
        for node in (*heard.record.links, *also.get(heard.record.peer, ())):
            far = at.get(node)
            if far is not None and far.record.peer not in reached and far.record.peer != me:
                reached.add(far.record.peer)
                waiting.append(far)
    return frozenset(reached)


def _left_out(at: dict[Node, Heard]) -> dict[PeerId, list[Node]]:
    """For peers whose records are full of links: those who state a link to them."""
    full = {node: heard.record.peer for node, heard in at.items() if len(heard.record.links) >= limits.record_max_links}
    also: dict[PeerId, list[Node]] = {}
    if full:
        for node, heard in at.items():
            for far in heard.record.links:
                if far in full:
                    also.setdefault(full[far], []).append(node)
    return also
