"""Which neighbour to hand something to that is meant for a peer without a link of its own.

Enters: the links that stand here, and those that peers state in their records. Leaves: the neighbour that is next on a shortest way.
Rule: cheapest ways over stated links (Dijkstra; a link counts if either end states it). A peer on the way costs 1, and 1 more each time
its number of links doubles beyond `links_target`; of several neighbours on cheapest ways one is taken by weighted rendezvous hashing over
what is sent, with the inverse square of its number of links as weight. Both because of a seed that everybody links to: it lies on a way of
two links between any two peers, and would otherwise carry everything.
Stated links may be old or false, so what is sent carries a count of hops, goes to no neighbour that it came from, and may be lost.
Pure state.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping

from blake3 import blake3

from tscale_peers import limits

Node = bytes
"""First bytes of a public key (`short`)."""


def short(public_key: bytes) -> Node:
    """How a peer is named among links: a mix-up costs a detour, no more."""
    return public_key[: limits.node_bytes]


class Routes:
    """Ways from one peer to all others."""

    def __init__(self, me: Node) -> None:
        self._me = me
        self._links: dict[Node, int] = {}
        self._first: dict[Node, tuple[Node, ...]] = {}
        """Destination -> neighbours on a cheapest way to it, in ascending order."""
        self._seen: tuple[frozenset[Node], Mapping[Node, frozenset[Node]]] | None = None

    def update(self, linked: Iterable[Node], stated: Mapping[Node, Iterable[Node]]) -> None:
        """Take in the own links and those that others state."""
        view = (frozenset(linked), {node: frozenset(links) for node, links in stated.items() if node != self._me})
        if view != self._seen:
            self._seen = view
            self._search(_graph(self._me, *view))

    def reaches(self, to: Node) -> bool:
        """Is any way known?"""
        return to == self._me or to in self._first

    def next_hop(self, to: Node, what: bytes, not_to: Node | None = None) -> Node | None:
        """The neighbour to hand `what` (its name, for spreading the load) to; None if there is none but `not_to`."""
        choice = [node for node in self._first.get(to, ()) if node != not_to]
        if len(choice) < 2:
            return choice[0] if choice else None
        return min(choice, key=lambda node: _waits(node + what) * self._links[node] ** 2)

    def _search(self, graph: Mapping[Node, set[Node]]) -> None:
        self._links = {node: len(links) for node, links in graph.items()}
        first: dict[Node, set[Node]] = {self._me: set()}
        costs, done, queue = {self._me: 0}, set[Node](), [(0, self._me)]
        while queue:
            cost, node = heapq.heappop(queue)
            if node in done:
                continue
            done.add(node)
            beyond = cost + (1 if node == self._me else _relay_cost(self._links[node]))
            for far in graph[node]:
                if beyond < costs.get(far, beyond + 1):
                    costs[far], first[far] = beyond, set()
                    heapq.heappush(queue, (beyond, far))
                if beyond == costs[far] and far not in done:
                    first[far] |= {far} if node == self._me else first[node]
        self._first = {node: tuple(sorted(hops)) for node, hops in first.items() if node != self._me}


def _relay_cost(links: int) -> int:
    return 1 + max(0, (links // limits.links_target).bit_length() - 1)


def _graph(me: Node, linked: frozenset[Node], stated: Mapping[Node, frozenset[Node]]) -> dict[Node, set[Node]]:
    """Both directions of every link. A link to this peer is one only if it stands here."""
    graph: dict[Node, set[Node]] = {me: set()}
    for node in linked:
        _join(graph, me, node)
    for node, links in stated.items():
        for far in links:
            if far not in (me, node):
                _join(graph, node, far)
    return graph


def _join(graph: dict[Node, set[Node]], one: Node, other: Node) -> None:
    graph.setdefault(one, set()).add(other)
    graph.setdefault(other, set()).add(one)


def _waits(name: bytes) -> float:
    """An exponentially distributed number that follows from a name: the least of several, times weights, falls on each by its weight."""
    fraction = (int.from_bytes(blake3(name).digest(7), "little") + 1) / (1 << 56)
    return -math.log(fraction) if fraction < 1 else 0.0
