"""How often to publish: the swarm's packets must fit the links of those who do its work.

Enters: the size of a publication, how many publications a peer receives per interval, what each live peer's link carries and how much it
trains. Leaves: the shortest interval between own publications, in seconds, and one sentence that says why.

Rule: a peer receives `received` publications per interval: all others' where packets are flooded, about two where chunks have owners. So

    interval = received * bytes of a publication / (link_part * bytes per second of the slowest useful link)

and at least the time in which the own uplink takes its part. Links are sorted by speed; the slowest ones whose peers do together at most
`thin_share` of the work are passed over: they fall behind and catch up by snapshot chunks instead of slowing everybody down.
Everybody computes this from the same records, so nobody has to agree on anything; the run's own interval in steps stays the lower bound.
What is not published yet stays in the displacement and costs no bytes: a longer interval makes packets fewer, not larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tscale_peers import limits
from tscale_peers.capacity import Capacity


class LinkOf(NamedTuple):
    """What a live peer says of itself. bytes_per_s 0: it knows no bound."""

    name: str
    down_bytes_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Pace:
    """interval_s 0: the links ask for nothing."""

    interval_s: float
    reason: str


NO_BOUND = Pace(0.0, "as often as the run says: no link is too slow for it")


def slowest_useful(links: Sequence[LinkOf]) -> LinkOf | None:
    """The slowest link that counts; None if no link has a known bound."""
    bounded = sorted((link for link in links if link.down_bytes_per_s > 0), key=lambda link: (link.down_bytes_per_s, link.name))
    spare = limits.thin_share * sum(link.tokens_per_s for link in links)
    for link in bounded:
        spare -= link.tokens_per_s
        if spare < 0:
            return link
    return None


def pace(publication_bytes: float, received: float, links: Sequence[LinkOf], own_up_bytes_per_s: float | None) -> Pace:
    """publication_bytes: of one peer, all its packets. received: publications that reach a peer per interval. links: of all live peers."""
    found = NO_BOUND
    slowest = slowest_useful(links)
    if slowest is not None:
        seconds = received * publication_bytes / (limits.link_part * slowest.down_bytes_per_s)
        found = Pace(seconds, f"{slowest.name} receives {_rate(slowest.down_bytes_per_s)}, the slowest of those who do the work")
    if own_up_bytes_per_s:
        seconds = limits.own_sends * publication_bytes / (limits.link_part * own_up_bytes_per_s)
        if seconds > found.interval_s:
            found = Pace(seconds, f"this peer sends {_rate(own_up_bytes_per_s)}")
    return Pace(min(found.interval_s, limits.pace_interval_max_s), found.reason)


@dataclass(frozen=True, slots=True)
class Standing:
    """How this peer stands at one moment. Counts of bytes since its start; packets that neighbours offer and that are not here; own packets
    that no neighbour holds; chunks of the run; live peers, this one included."""

    down_bytes: int
    up_bytes: int
    backlog: int
    unheld: int
    chunks: int
    live: int


class Pacer:
    """Measures the own connection and keeps the pace. max_down, max_up: what the owner allows, bytes per second, None: no limit."""

    def __init__(self, max_down: float | None, max_up: float | None, now: float) -> None:
        self.down = Capacity(max_down, now)
        self.up = Capacity(max_up, now)
        self.pace = NO_BOUND

    def measure(self, standing: Standing, now: float) -> None:
        """Take in how this peer stands, a few times a second."""
        round_packets = standing.chunks * standing.live
        self.down.note(standing.down_bytes, standing.backlog > limits.behind_publications * round_packets, now)
        self.up.note(standing.up_bytes, standing.unheld > limits.unheld_publications * standing.chunks, now)

    def choose(self, publication_bytes: float, received: float, own: LinkOf, others: Sequence[LinkOf]) -> None:
        """Set the pace anew; see `pace`."""
        self.pace = pace(publication_bytes, received, (own, *others), self.up.bytes_per_s)

    def next_at(self, published_at: float | None) -> float:
        """From when on this peer may publish, as far as links go. published_at: when it did so last."""
        return -math.inf if published_at is None else published_at + self.pace.interval_s


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e6:.3g} Mbit/s"
