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
from tscale_peers.records import RecordBook

Node = bytes
"""First bytes of a public key."""


class Reach:
    """The view of one peer; worked out anew when links or records have changed."""

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._seen: tuple[int, int] | None = None
        self.peers: frozenset[PeerId] = frozenset()

    def update(self, book: RecordBook, linked: Iterable[PeerId], links_changed: int) -> bool:
        """Take in the present links and records; True if they have changed since the last call, as the counts of changes tell."""
        seen = (book.links_version, links_changed)
        if seen == self._seen:
            return False
        self._seen = seen
        self.peers = _reached(self._me, book, frozenset(linked))
        return True


def _reached(me: PeerId, book: RecordBook, linked: frozenset[PeerId]) -> frozenset[PeerId]:
    at = {heard.record.public_key[: limits.node_bytes]: (peer, heard.record.links) for peer, heard in book.items()}
    also = _left_out(at)
    reached: set[PeerId] = set(linked)
    waiting = [(peer, heard.record.links) for peer in linked if (heard := book.get(peer)) is not None]
    while waiting:
        peer, links = waiting.pop()
        for node in (*links, *also.get(peer, ())):
            far = at.get(node)
            if far is not None and far[0] not in reached and far[0] != me:
                reached.add(far[0])
                waiting.append(far)
    return frozenset(reached)


def _left_out(at: dict[Node, tuple[PeerId, tuple[Node, ...]]]) -> dict[PeerId, list[Node]]:
    """For peers whose records are full of links: those who state a link to them."""
    full = {node: peer for node, (peer, links) in at.items() if len(links) >= limits.record_max_links}
    also: dict[PeerId, list[Node]] = {}
    if full:
        for node, (_, links) in at.items():
            for far in links:
                if far in full:
                    also.setdefault(full[far], []).append(node)
    return also
