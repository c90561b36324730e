"""What a peer says of itself at this moment: its record, before it is signed.

Enters: a running peer. Leaves: the record that its herald tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tscale_peers import limits
from tscale_peers.records import PeerRecord
from tscale_peers.spreading import node_of

if TYPE_CHECKING:
    from tscale_peers.peer import SwarmPeer


def own_record(peer: SwarmPeer) -> PeerRecord:
    """The next one: numbered after the herald's newest."""
    progress = peer.meeting.last_progress
    return PeerRecord(
        run=peer.run_id,
        public_key=peer.author.public_key,
        incarnation=peer.herald.incarnation,
        seq=peer.herald.seq + 1,
        created_unix=peer.outside.clock.wall(),
        name=peer.settings.name[: limits.record_max_name_chars],
        role=peer.settings.role,
        addresses=peer.settings.addresses[: limits.record_max_addresses],
        step=progress.steps,
        batches=peer.swarm_batches(),
        tokens=progress.tokens,
        tokens_per_s=peer.rate.per_s,
        train_loss=progress.train_loss,
        digest=peer.state[0],
        hash=peer.state[1],
        leaving=peer.leaving,
        down_bytes_per_s=peer.pacer.down.bytes_per_s or 0.0,
        eval_batches=peer.measured.batches,
        eval_loss=peer.measured.loss,
        average_loss=peer.measured.average_loss,
        links=tuple(sorted(map(node_of, peer.linked))[: limits.record_max_links]),
    )
