"""How this peer's work reaches the others, decided tick by tick: packets to everybody, or contributions to the owners of chunks.

Enters: membership, links, contributions from neighbours. Leaves: the plan for meetings (summing.py), contributions passed on or summed.
Rule "auto": owners from `owners_from_peers` peers up, as this peer sees them; each decides for itself, since every replica applies packets
and sums alike. A contribution goes over links, step by step, to its owner; each step checks it, signature and all, so that what a
neighbour sends is that neighbour's fault.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from typing import Literal

from tscale_net.errors import Refused
from tscale_net.identity import public_key_of
from tscale_net.ports import Clock, PeerId
from tscale_peers import limits, owners
from tscale_peers.allowance import Allowance
from tscale_peers.errors import refuse
from tscale_peers.gossip import Send
from tscale_peers.membership import Membership, State
from tscale_peers.packet import Key, Packet, Terms, Verify
from tscale_peers.relay import Relay, unframed
from tscale_peers.routing import Node, Routes, short
from tscale_peers.summing import Plan, Summing
from tscale_peers.turns import Turns

Spread = Literal["auto", "flood", "owners"]
OffLoop = Callable[[Callable[[], Packet]], Awaitable[Packet]]


class Spreading:
    """See the module's head. Everything runs on the event loop, except what `off_loop` is given."""

    def __init__(
        self, spread: Spread, me: PeerId, public_key: bytes, terms: Terms, verify: Verify, summing: Summing, relay: Relay, clock: Clock
    ) -> None:
        self.summing = summing
        self.relay = relay
        self.passed: Callable[[], None] = lambda: None
        """Called when there is something to pass on."""
        self.by_owners = False
        """Is work given to owners now?"""
        self._spread = spread
        self._me = me
        self._key = public_key
        self._terms = terms
        self._verify = verify
        self._clock = clock
        self._chunks = len(terms.layout.chunks)
        self._table = owners.OwnerTable(self._chunks)
        self._routes = Routes(short(public_key))
        self._peer_at: dict[Node, PeerId] = {}
        self._turns = Turns(limits.contributions_queued, limits.contributions_queued_bytes)
        self._may_send: dict[PeerId, Allowance] = {}
        self._look_at = 0.0
        self._ways_stale = True
        self._looked: tuple[int, int] | None = None

    # -- for people ----------------------------------------------------------------------------------------------------

    @property
    def owned(self) -> int:
        """Chunks that this peer sums."""
        return len(self.summing.plan.owned)

    def payloads(self, others: int) -> float:
        """Publications of one peer that a peer receives per interval, about."""
        return min(float(others), limits.owners_payloads) if self.by_owners else float(others)

    # -- the plan ------------------------------------------------------------------------------------------------------

    def tick(self, membership: Membership, linked: set[PeerId], trains: bool, leaving: bool, changed: bool) -> None:
        """Look at the swarm again if anything may have changed; `changed`: somebody came or went."""
        now = self._clock.now()
        view = (membership.book.links_version, membership.links_changed)
        if now < self._look_at and not changed and not leaving and view == self._looked:
            return
        moved = changed or view != self._looked
        self._looked, self._look_at = view, now + limits.owners_look_s
        known = membership.known()
        peers = owners.candidates(membership.own_record(), known, self._clock.wall())
        self._table.update(peers)
        self._decide(len(peers), leaving)
        self._ways_stale |= moved
        if self._ways_stale and self.by_owners:
            self._ways_stale = False
            self._find_ways(membership, linked)
        present = {record.public_key for record, state in known if state in (State.LIVE, State.SUSPECT)} | {self._key}
        training = sum(record.tokens_per_s > 0 for record, state in known if state is State.LIVE) + trains
        chosen = tuple(owner if self._reaches(owner) else None for owner in self._table.owners) if self.by_owners else ()
        self.summing.plan = Plan(chosen, training, self._table.owned_by(self._key), lambda key: key not in present)

    def _decide(self, peers: int, leaving: bool) -> None:
        """With some distance between on and off: a swarm at the limit shall not change its ways all the time."""
        enough = limits.owners_from_peers - (limits.owners_slack_peers if self.by_owners else 0)
        least = {"flood": self._chunks + peers + 1, "owners": 2, "auto": enough}[self._spread]
        self.by_owners = peers >= least and not leaving

    def _find_ways(self, membership: Membership, linked: set[PeerId]) -> None:
        self._peer_at = {node_of(peer): peer for peer in linked}
        stated = {short(record.public_key): record.links for record, state in membership.known() if state in (State.LIVE, State.SUSPECT)}
        self._routes.update(self._peer_at, stated)

    def _reaches(self, owner: bytes) -> bool:
        return owner == self._key or self._routes.reaches(short(owner))

    # -- own contributions ---------------------------------------------------------------------------------------------

    def send_own(self, given: Iterable[tuple[Key, bytes]]) -> None:
        """(key, owner's public key) of own contributions to others; one without a way is taken back in time."""
        for key, owner in given:
            to = self._next(owner, key)
            if to is not None:
                self.relay.send_own(key, to)

    def link_down(self, peer: PeerId) -> None:
        self._may_send.pop(peer, None)
        self._peer_at = {node: other for node, other in self._peer_at.items() if other != peer}
        owners_of = self.summing.plan.owners
        if owners_of:
            self.send_own((key, owner) for key in self.relay.link_down(peer) if (owner := owners_of[key[2]]) is not None)
        else:
            self.relay.link_down(peer)

    def flush(self, pending_bytes: Callable[[PeerId], int]) -> list[Send]:
        return self.relay.flush(pending_bytes)

    def _next(self, owner: bytes, key: Key, came_from: PeerId | None = None) -> PeerId | None:
        not_to = node_of(came_from) if came_from is not None else None
        node = self._routes.next_hop(short(owner), key[0][:8] + key[2].to_bytes(4, "little"), not_to)
        return self._peer_at.get(node) if node is not None else None

    # -- contributions of others ---------------------------------------------------------------------------------------

    def put(self, source: PeerId, body: bytes) -> None:
        """Raises Refused: "flood" for more than a neighbour can mean, "relay-full" for more than can be checked in time."""
        if not self._may_send.setdefault(source, _allowance()).take(1, self._clock.now()):
            raise Refused("flood", "more contributions than there can be")
        if not self._turns.put(source, body):
            raise refuse("relay-full", "contributions come faster than they can be checked")

    async def run(self, off_loop: OffLoop, refused: Callable[[Refused, PeerId], None]) -> None:
        """Until cancelled: check what came, sum it or pass it on."""
        while True:
            source, body = await self._turns.next()
            try:
                hops, contribution = unframed(body)
                packet = await off_loop(lambda contribution=contribution: self._check(contribution))  # type: ignore[misc]
                if packet.header.owner != self._key:
                    self._pass_on(packet, contribution, hops, source)
            except Refused as refusal:
                refused(refusal, source)

    def _check(self, contribution: bytes) -> Packet:
        """Strictly decoded, its signature checked, and summed if it is for this peer."""
        packet = Packet.open_contribution(contribution, self._terms, self._verify)
        if packet.header.owner == self._key:
            self.summing.sums.take(packet, self._clock.now())
        return packet

    def _pass_on(self, packet: Packet, contribution: bytes, hops: int, source: PeerId) -> None:
        to = self._next(packet.header.owner, packet.key, source)
        if to is None:
            raise refuse("wrong-owner", f"a contribution to chunk {packet.chunk} for a peer to which no way is known")
        self.relay.pass_on(contribution, hops, to)
        self.passed()


@lru_cache(limits.record_book_peers)
def node_of(peer: PeerId) -> Node:
    """Base58 is slow beside everything else here."""
    return short(public_key_of(peer))


def _allowance() -> Allowance:
    return Allowance(limits.contributions_per_s, limits.contributions_burst)
