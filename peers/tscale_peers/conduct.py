"""Who sends nonsense, and for how long that is put up with. Pure: the time is passed in.

Enters: refusals, each with the neighbour whose message it was. Leaves: whether its link shall be cut. An honest program of this version
sends nothing malformed and relays nothing forged, since it checks before it relays; but refusals that follow from limits here, or from
what an author did, are not the relaying neighbour's fault.
"""

from __future__ import annotations

from tscale_net.errors import Refused
from tscale_net.ports import PeerId
from tscale_peers import limits
from tscale_peers.allowance import Allowance

NOT_ITS_FAULT = frozenset(
    {
        *("log-write", "too-many-streams", "too-many-gaps", "equivocation", "out-of-range"),
        *("wrong-owner", "contribution-known", "owner-busy", "too-many-hops", "relay-full"),
    }
)


class Conduct:
    """Patience with each linked neighbour."""

    def __init__(self) -> None:
        self._patience: dict[PeerId, Allowance] = {}

    def link_down(self, peer: PeerId) -> None:
        """Forget it: bans are the transport's business."""
        self._patience.pop(peer, None)

    def strike(self, peer: PeerId, refusal: Refused, now: float) -> bool:
        """True if patience with this linked neighbour is at its end."""
        if refusal.code in NOT_ITS_FAULT:
            return False
        patience = self._patience.setdefault(peer, Allowance(limits.strikes_forgiven_per_s, limits.strikes))
        return not patience.take(1, now)
