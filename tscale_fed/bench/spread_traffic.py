"""What each way of spreading costs in bytes, counted on an overlay like that of real swarms.

Enters: the number of peers, a seed. Leaves: payloads received and sent per peer and interval. Unit: one payload, which is one delta of the
whole model in the run's codec.

Overlay: peers join one after the other; each links to the first one and to random earlier ones until it has `links_target` links. Owners
and ways are chosen by the classes that peers run; every contribution is counted on each link that it passes.
Epidemic spreading delivers one copy to each peer; a peer forwards as many as it receives on average.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tscale_fed.bench.spread_ways import CELL
from tscale_peers import limits
from tscale_peers.owners import choose
from tscale_peers.routing import Node, Routes, short

CHUNKS = 1500
"""As many as 1.5 billion weights make."""
TRIED_CHUNKS = 3
"""Chunks per owner whose ways are followed; their names, and so their ways, are random."""
PAIR_PAYLOADS = 4.0
"""4 bits per weight against one."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Payloads per peer and interval."""

    received: float
    received_most: float
    """By the peer that receives most."""
    sent: float
    hops: float
    """Links that a contribution passes, mean."""


def traffic_of(way: str, peers: int, seed: int) -> Traffic:
    """Of one way. "sync" is not for home links: every step costs what an interval costs elsewhere."""
    others = peers - 1.0
    if way == "flood":
        return Traffic(others, others, others, 1.0)
    if way == "cells":
        cells = -(-peers // CELL)
        inside = (CELL - 1) / CELL
        return Traffic(inside + cells - 1 / CELL, inside + cells, inside + cells - 1 / CELL, 1.0)
    if way == "pairs":
        return Traffic(PAIR_PAYLOADS, PAIR_PAYLOADS, PAIR_PAYLOADS, 1.0)
    return _owners(peers, seed)


def _owners(peers: int, seed: int) -> Traffic:
    rng = random.Random(seed)
    keys = sorted(hashlib.sha256(b"%d/%d" % (seed, number)).digest() for number in range(peers))
    links = overlay(keys, rng)
    routes = {key: _routes(key, links) for key in keys}
    owned: dict[bytes, list[int]] = {key: [] for key in keys}
    for chunk, owner in enumerate(choose(keys, CHUNKS)):
        owned[owner].append(chunk)
    received, sent = dict.fromkeys(keys, 0.0), dict.fromkeys(keys, 0.0)
    passed = 0.0
    by_node = {short(key): key for key in keys}
    for author in keys:
        for owner, chunks in owned.items():
            if owner == author:
                continue
            tried = chunks[:TRIED_CHUNKS]
            for chunk in tried:
                weight = len(chunks) / len(tried) / CHUNKS
                way = _way(author, owner, chunk, routes, by_node)
                for one, other in zip(way, way[1:], strict=False):
                    sent[one] += weight
                    received[other] += weight
                passed += weight * (len(way) - 1)
    for key in keys:
        received[key] += 1 - len(owned[key]) / CHUNKS
    publications = 1 - 1 / peers
    most = max(received.values())
    return Traffic(sum(received.values()) / peers, most, sum(sent.values()) / peers + publications, passed / max(1, peers - 1))


def overlay(keys: Sequence[bytes], rng: random.Random) -> dict[bytes, set[bytes]]:
    """Links of each peer, both ways."""
    links: dict[bytes, set[bytes]] = {key: set() for key in keys}
    for number, key in enumerate(keys):
        earlier = list(keys[1:number])
        rng.shuffle(earlier)
        for other in ([keys[0]] if number else []) + earlier:
            if len(links[key]) >= limits.links_target:
                break
            links[key].add(other)
            links[other].add(key)
    return links


def _routes(me: bytes, links: dict[bytes, set[bytes]]) -> Routes:
    routes = Routes(short(me))
    routes.update(map(short, links[me]), {short(key): [short(far) for far in links[key]] for key in links})
    return routes


def _way(author: bytes, owner: bytes, chunk: int, routes: dict[bytes, Routes], by_node: dict[Node, bytes]) -> list[bytes]:
    name = short(author) + chunk.to_bytes(4, "little")
    way, before = [author], None
    while way[-1] != owner:
        node = routes[way[-1]].next_hop(short(owner), name, before)
        assert node is not None, "views are equal here, so ways never end"
        before = short(way[-1])
        way.append(by_node[node])
    return way
