"""Own work on its way out of a meeting: a publication to everybody, or contributions to owners of chunks, made beside training.

Enters: what is due. Leaves: packets and contributions, durable, of the meeting at which they were ready.
With a helper thread that is a later meeting than the one at which they were begun (drafting.py); without one, the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tscale_net.errors import Refused
from tscale_peers.drafting import Drafting
from tscale_peers.exchange import Exchange, Published
from tscale_peers.packet import Key, Packet
from tscale_peers.publisher import Draft
from tscale_peers.summing import Given, Summing


class Sent(NamedTuple):
    """What is ready to be sent now."""

    published: tuple[tuple[Key, bytes], ...] = ()
    """Packets to spread."""
    given: tuple[tuple[Key, bytes], ...] = ()
    """Contributions, each with its owner's public key."""
    given_bytes: int = 0
    """Size of all of this moment's contributions, those to this peer itself included."""
    momentum_keep: float = 1.0
    withheld: Refused | None = None
    """Why nothing came of it: its content stays in the displacement."""


class Outgoing:
    """One publication or contribution at a time. The thread that meets."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._under_way: Drafting[Draft, Published] | Drafting[Draft, Given] | None = None

    @property
    def under_way(self) -> bool:
        """Was something begun that is not ready yet?"""
        return self._under_way is not None

    def publish(self, batches: int, share: float) -> None:
        """Begin a publication. batches: all own ones; those that contributions have stated are left out."""
        assert self._under_way is None
        self._under_way = self._exchange.begin_publication(max(0, batches - self._exchange.pledges.batches), share)

    def contribute(self, summing: Summing, batches: int, share: float) -> None:
        """Begin to give own work to the owners of chunks."""
        assert self._under_way is None
        self._under_way = summing.begin(batches, share)

    def advance(self) -> Sent:
        """What is ready; empty while nothing is. Does not wait."""
        return self._sent(lambda drafting: drafting.advance())

    def finish(self) -> Sent:
        """What was under way."""
        return self._sent(lambda drafting: drafting.finish())

    def _sent(self, go_on: Callable[[Drafting[Draft, Published] | Drafting[Draft, Given]], Published | Given | None]) -> Sent:
        if self._under_way is None:
            return Sent()
        try:
            ready = go_on(self._under_way)
        except Refused as refusal:
            self._under_way = None
            return Sent(withheld=refusal)
        if ready is None:
            return Sent()
        self._under_way = None
        if isinstance(ready, Given):
            own = self._exchange.signer.public_key
            given = tuple((draft.packet.key, draft.packet.header.owner) for draft in ready.drafts if draft.packet.header.owner != own)
            return Sent((), given, sum(len(draft.body) for draft in ready.drafts), ready.momentum_keep)
        keys = [Packet.peek_key(body) for body in ready.packets]
        published = tuple((key, body) for key, body in zip(keys, ready.packets, strict=True) if key is not None)
        return Sent(published, momentum_keep=ready.momentum_keep)
