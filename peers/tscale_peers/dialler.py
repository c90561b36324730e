"""Keeping enough links: to peers at the addresses in their records, and to the addresses that the user gave.

Enters: membership, the links that stand, the time. Leaves: dials, with back-off per peer; one sentence for the first failure of each.
Addresses remembered from an earlier start are tried once. Given (bootstrap) addresses are tried again for ever at a fixed pace, so a
swarm whose seed was restarted, and two groups that started from one bootstrap list, find each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tscale_net.errors import Refused
from tscale_net.ports import Clock, PeerId, Rng, Transport
from tscale_peers import limits
from tscale_peers.membership import Membership
from tscale_peers.notices import NoticeBoard


@dataclass(slots=True)
class DialBook:
    """When each peer may be tried again: exponential back-off with jitter."""

    next_at: dict[PeerId, float] = field(default_factory=dict)
    failures: dict[PeerId, int] = field(default_factory=dict)

    def may(self, peer: PeerId, now: float) -> bool:
        return now >= self.next_at.get(peer, 0.0)

    def failed(self, peer: PeerId, now: float, rng: Rng) -> int:
        """Returns how many times in a row it failed now."""
        n = self.failures[peer] = self.failures.get(peer, 0) + 1
        wait = min(limits.redial_max_s, limits.redial_first_s * 2 ** min(n - 1, 16))
        self.next_at[peer] = now + wait * (0.5 + rng.random())
        return n

    def forget(self, is_known: Callable[[PeerId], bool]) -> None:
        """Keep only peers that are still known: invented ones come and go."""
        for peer in [peer for peer in self.next_at if not is_known(peer)]:
            self.succeeded(peer)

    def succeeded(self, peer: PeerId) -> None:
        self.failures.pop(peer, None)
        self.next_at.pop(peer, None)


class Dialler:
    """Starts dials as tasks of the group it is given."""

    def __init__(
        self,
        transport: Transport,
        membership: Membership,
        bootstrap: Sequence[str],
        board: NoticeBoard,
        clock: Clock,
        rng: Rng,
        name_of: Callable[[PeerId], str],
        remembered: Sequence[str] = (),
    ) -> None:
        self.book = DialBook()
        self._transport = transport
        self._membership = membership
        self._bootstrap = tuple(bootstrap)
        self._board = board
        self._clock = clock
        self._rng = rng
        self._name_of = name_of
        self._dialling: set[PeerId] = set()
        self._bootstrap_at = 0.0
        self._bootstrap_busy: set[str] = set()
        self._failed: dict[str, str] = {}
        """Given address -> why it failed last, told once."""
        self._remembered = list(remembered)

    def tick(self, linked: set[PeerId], tasks: asyncio.TaskGroup) -> None:
        """Dial whom we lack."""
        now = self._clock.now()
        self.book.forget(self._membership.book.__contains__)
        for record in self._membership.dial_targets(linked | self._dialling, now, self.book.may):
            self._dialling.add(record.peer)
            tasks.create_task(self._dial_peer(record.peer, record.addresses))
        if now >= self._bootstrap_at and len(linked) < limits.links_target:
            self._bootstrap_at = now + (limits.bootstrap_redial_s if linked else limits.bootstrap_alone_redial_s)
            for address in self._bootstrap:
                if address not in self._bootstrap_busy:
                    self._bootstrap_busy.add(address)
                    tasks.create_task(self._dial_given(address, quiet=bool(linked)))
        if len(linked) < limits.links_target:
            for address in self._remembered[: limits.dials_per_tick]:
                tasks.create_task(self._dial_given(address, quiet=True))
            del self._remembered[: limits.dials_per_tick]

    async def _dial_peer(self, peer: PeerId, addresses: Sequence[str]) -> None:
        try:
            refusal = await self._first_success([address for address in addresses if address.endswith(f"/p2p/{peer}")])
            if refusal is None:
                self.book.succeeded(peer)
            elif self.book.failed(peer, self._clock.now(), self._rng) == 1:
                self._board.tell("dial", f"cannot reach {self._name_of(peer)}: {refusal.detail}")
        finally:
            self._dialling.discard(peer)

    async def _first_success(self, addresses: Sequence[str]) -> Refused | None:
        """None if one of them worked, else why the last did not. Only addresses that name the peer are tried: a record must not send its
        readers to somebody else."""
        refusal: Refused | None = Refused("bad-address", "its record has no address that names it")
        for address in addresses:
            try:
                await self._transport.dial(address)
                return None
            except Refused as failed:
                refusal = failed
        return refusal

    async def _dial_given(self, address: str, quiet: bool) -> None:
        try:
            await self._transport.dial(address)
            self._failed.pop(address, None)
        except Refused as refusal:
            if not quiet and self._failed.get(address) != refusal.detail:
                self._failed[address] = refusal.detail
                self._board.tell("dial", f"cannot reach {address}: {refusal.detail}")
        finally:
            self._bootstrap_busy.discard(address)
