"""Coming back from a home: what the log has and the checkpoint lacks, and whether private work of last time is still of use.

Enters: a peer put together again from its checkpoint and its log. Leaves: the same with a displacement that owes nothing, and a verdict.
Private work that is too old would lead the model back to where it was. How old it is shows only when somebody else's deltas are here, so a
peer that comes back alone trains on, and judges when the first neighbour was compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tscale_peers.meeting import MeetingPoint
from tscale_peers.packet import Packet
from tscale_peers.peer import SwarmPeer


def settle_after_crash(meeting: MeetingPoint, trained_batches: int, displacement: Tensor | None) -> int:
    """Own packets that were published after the checkpoint are in the log, and now in the basepoint. The training behind them is not in the
    restored weights, so the displacement must not owe it.

    trained_batches: own batches in the restored weights. displacement: the checkpoint's, None if there was no checkpoint.
    Returns how many own packets had been lost from the checkpoint.
    """
    exchange = meeting.exchange
    if not exchange.recovered:
        return 0
    newest = max(exchange.log.keys(exchange.stream_key), key=lambda key: key[1], default=None)
    body = exchange.log.get(newest) if newest is not None else None
    stated = Packet.decode(body, exchange.terms).header.batches_total + exchange.pledges.batches if body is not None else None
    if stated is None or stated > trained_batches:
        meeting.keep_unpublished(displacement)
    return exchange.recovered


def is_caught_up(peer: SwarmPeer) -> bool:
    """Some neighbour's set was compared with ours, and nothing that it has is missing here."""
    return bool(peer.linked) and peer.gossip.compared and not peer.gossip.backlog()


def own_batches(peer: SwarmPeer) -> int:
    """Own batches that are in the basepoint."""
    return peer.meeting.replica.applied.batches.get(peer.meeting.exchange.stream_key, 0)


@dataclass(slots=True)
class PrivateWork:
    """The displacement of a checkpoint. Make it right after `assemble`; swarm_batches: of the whole swarm, as the checkpoint states it."""

    swarm_batches: int
    own_batches: int
    max_age_batches: int

    def judge(self, peer: SwarmPeer) -> tuple[int, bool]:
        """(batches that others have done since, kept?). Drops it if that is more than the run allows. Between two steps, or before any."""
        own_since = own_batches(peer) - self.own_batches
        age = peer.swarm_batches() - own_since - self.swarm_batches
        kept = age <= self.max_age_batches
        if not kept:
            peer.meeting.drop_displacement()
        return age, kept
