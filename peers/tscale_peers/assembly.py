"""Putting one peer together: the only place that knows how the parts of this room fit.

Enters: a manifest, who the peer is, the outside world, its weights, its log. Leaves: a `SwarmPeer` ready to run, in the simulation exactly
as on real sockets.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tscale_peers import limits
from tscale_peers.basepoint import Replica
from tscale_peers.catch_up import CatchUp, Costs
from tscale_peers.delta_log import PacketLog
from tscale_peers.exchange import Exchange, OuterRule, Signer
from tscale_peers.gossip import Gossip
from tscale_peers.intake import Intake
from tscale_peers.manifest import RunManifest
from tscale_peers.meeting import MeetingPoint
from tscale_peers.notices import NoticeBoard
from tscale_peers.packet import Packet, Terms, stream_key
from tscale_peers.packet_log import MemoryLog
from tscale_peers.peer import Author, Outside, PeerSettings, SwarmPeer
from tscale_peers.pledges import Pledges
from tscale_peers.relay import Relay
from tscale_peers.spreading import Spreading
from tscale_peers.summing import Summing


@dataclass(frozen=True, slots=True)
class RunTerms:
    """What follows from a manifest once and for all."""

    manifest: RunManifest
    run: bytes
    terms: Terms

    @staticmethod
    def of(manifest: RunManifest) -> RunTerms:
        """Raises Refused if a codec of the manifest is not known here."""
        terms = manifest.terms()
        return RunTerms(manifest, terms.run, terms)

    def new_replica(self, device: torch.device | str = "cpu") -> Replica:
        """Zero and empty: fill it from start weights, a checkpoint or donors."""
        return Replica(self.terms.layout, self.terms.codec, self.manifest.limits.max_streams, device)

    def rule(self) -> OuterRule:
        r = self.manifest.rule
        return OuterRule(share_scale=r.share_scale, own_leak=r.own_leak, momentum_keep=r.momentum_keep)


class Saved(NamedTuple):
    """What a checkpoint keeps of the exchange, beside weights and replica: the displacement, the own packets it has paid, the contributions
    it has given to owners, and what this peer summed as an owner."""

    displacement: Tensor
    paid: bytes
    pledges: bytes | None = None
    sums: bytes = b""


def assemble(
    run: RunTerms,
    author: Author,
    outside: Outside,
    *,
    replica: Replica,
    weights: Tensor,
    log: PacketLog,
    stream: int,
    settings: PeerSettings,
    board: NoticeBoard,
    joined: bool,
    saved: Saved | None = None,
    pledge_log: PacketLog | None = None,
    helper: Executor | None = None,
) -> SwarmPeer:
    """A peer around these parts. `joined`: the replica is filled already (start weights or checkpoint); otherwise it holds back until a
    snapshot is here (joining.fetch_snapshot). `weights`: the live flat fp32 weights, any device, changed in place; set to the basepoint
    unless `saved` comes from the same checkpoint. `helper`: a thread of its own for what need not stop training; None: nothing runs beside.
    On a GPU the displacement is not stored (displacement.py)."""
    terms = run.terms
    signer = Signer(author.public_key, author.sign)
    displacement, paid, given, sums = saved if saved is not None else (None, None, None, b"")
    pledges = Pledges(stream_key(author.public_key, stream), pledge_log or MemoryLog(), terms, given, outside.clock.now())
    exchange = Exchange(
        replica, weights, run.rule(), signer, stream, log, terms, outside.clock,
        displacement=displacement, paid=paid, pledges=pledges, keep_displacement=replica.device.type == "cpu", helper=helper,
    )  # fmt: skip
    every = run.manifest.publish_every_steps
    meeting = MeetingPoint(exchange, replica, log, every, outside.clock, lambda body: Packet.decode(body, terms), helper)
    gossip = Gossip(replica.applied_copy(), len(terms.layout.chunks), log, outside.rng, CatchUp(Costs.of(terms)))
    intake = Intake(lambda body: exchange.prepared(Packet.open(body, terms, outside.verify)), gossip, log, meeting)
    meeting.summing = Summing(exchange, outside.clock, sums, every * limits.batches_per_publication)
    spreading = Spreading(
        run.manifest.spread, author.peer_id, author.public_key, terms, outside.verify, meeting.summing, Relay(pledges.body), outside.clock
    )
    peer = SwarmPeer(
        run=run.run, author=author, outside=outside, meeting=meeting, gossip=gossip, intake=intake, spreading=spreading,
        settings=settings, board=board,
    )  # fmt: skip
    if joined:
        peer.recount_known()
    else:
        gossip.hold = True
    return peer
