"""The snapshot of a running peer, gathered from its parts.

Enters: a session. Leaves: one `Status`. Reads only; called on the event loop about once a second, so nothing here may be slow.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tscale_fed import __version__
from tscale_fed.ground import reach_sentence
from tscale_fed.status import EventLine, ExchangeTime, PeerRow, PeerState, Spread, Status, Transfer, Wire, finite, recent_states
from tscale_fed.units import plain
from tscale_net.ports import LinkInfo, PeerId
from tscale_peers.measured import newest
from tscale_peers.membership import State
from tscale_peers.records import PeerRecord

if TYPE_CHECKING:
    from tscale_fed.peer_session import PeerSession

_STATES: dict[State, PeerState] = {State.LIVE: "live", State.SUSPECT: "suspect", State.DEAD: "dead", State.LEFT: "left"}
_EVENT_CHARACTERS = 240


def status_of(session: PeerSession) -> Status:
    """Everything that may be shown."""
    peer, built, found, ground = session.built.peer, session.built, session.found, session.ground
    report = session.training.report
    live = peer.membership.live()
    agreement = peer.agreement
    present = {record.peer for record in live}
    compared = present & (agreement.agreeing.keys() | agreement.differing.keys())
    state = peer.state
    received = session.snapshot_progress
    measured = newest(peer.measured, live)
    return Status(
        version=__version__,
        run=found.manifest.run_id.hex(),
        run_name=found.manifest.name,
        peer=ground.identity.peer_id,
        name=ground.name,
        role=ground.arguments.role,
        phase="paused" if session.phase == "training" and report.paused else session.phase,
        uptime_s=ground.console.elapsed_s,
        device=built.device.reason,
        reach=reach_sentence(ground.addresses, ground.arguments.solo),
        addresses=list(ground.addresses),
        step=built.trainer.steps,
        tokens=built.trainer.tokens,
        swarm_tokens=built.trainer.tokens + sum(r.tokens for r, _ in peer.membership.known()),
        swarm_batches=peer.swarm_batches(),
        budget_batches=found.manifest.budget_batches,
        train_loss=finite(report.loss_average),
        swarm_loss=finite(measured.loss),
        swarm_loss_batches=measured.batches if measured.known else None,
        swarm_loss_by=measured.by,
        average_loss=finite(measured.average_loss),
        best_loss=finite(session.best.loss),
        basepoint_hash=state[1].hex(),
        applied_digest=state[0].hex(),
        recent=recent_states(list(built.replica.recent)),
        agreeing_peers=len(present & agreement.agreeing.keys()) if compared else None,
        compared_peers=len(compared) or None,
        busy_fraction=finite(report.busy_fraction) if report.running else None,
        exchange_fraction=finite(report.exchange_fraction) if report.running else None,
        exchange=ExchangeTime(*report.exchange_causes) if report.running else None,
        tokens_per_s=finite(report.tokens_per_s),
        swarm_tokens_per_s=report.tokens_per_s + sum(r.tokens_per_s for r in live),
        rate=report.rate,
        share=peer.share(),
        displacement=finite(session.displacement),
        steps_since_publish=peer.meeting.steps_since_publish,
        publish_every_steps=found.manifest.publish_every_steps,
        publish_interval_s=peer.pacer.pace.interval_s,
        publish_reason=plain(peer.pacer.pace.reason, _EVENT_CHARACTERS),
        down_capacity_bytes_per_s=peer.pacer.down.bytes_per_s,
        up_capacity_bytes_per_s=peer.pacer.up.bytes_per_s,
        peers=_rows(session),
        wire=_wire(session),
        spread=_spread(session),
        refused=dict(peer.board.refused + Counter(ground.outside.transfers.refused)),
        transfer=Transfer("snapshot", *received, sources=len(peer.linked)) if received else None,
        losses=session.losses.points(),
        events=[EventLine(notice.at, plain(notice.text, _EVENT_CHARACTERS)) for notice in list(peer.board.notices)[-100:]],
    )


def _rows(session: PeerSession) -> list[PeerRow]:
    peer = session.built.peer
    links = {link.peer: link for link in session.ground.outside.transport.links()}
    live_rates = {r.peer: r.tokens_per_s for r in peer.membership.live()}
    total = peer.rate.per_s + sum(live_rates.values())
    mine = peer.swarm_batches()
    rows = []
    for record, state in peer.membership.known():
        share = live_rates.get(record.peer, 0.0) / total if total > 0 else None
        rows.append(_row(record, state, links.get(record.peer), share, mine, _since(session, record.peer)))
    return rows


def _row(record: PeerRecord, state: State, link: LinkInfo | None, share: float | None, batches: int, last_delta_s: float | None) -> PeerRow:
    return PeerRow(
        id=record.peer,
        name=record.name,
        path="direct" if link is not None else "gossip",
        state=_STATES[state],
        rtt_ms=link.rtt_s * 1000 if link is not None and link.rtt_s is not None else None,
        share=share,
        lag=max(0, batches - record.batches),
        last_delta_s=last_delta_s,
        tokens_per_s=record.tokens_per_s,
        address=link.address if link is not None else next(iter(record.addresses), ""),
    )


def _since(session: PeerSession, peer: PeerId) -> float | None:
    at = session.built.peer.last_delta_at.get(peer)
    return None if at is None else session.ground.clock.now() - at


def _spread(session: PeerSession) -> Spread:
    spreading, pledges = session.built.peer.spreading, session.built.peer.meeting.exchange.pledges
    return Spread(
        by_owners=spreading.by_owners,
        owned_chunks=spreading.owned if spreading.by_owners else 0,
        waiting=pledges.waiting,
        confirmed=pledges.confirmed,
        taken_back=pledges.taken_back,
        summed=spreading.summing.sums.taken,
        passed_on=spreading.relay.passed_on,
    )


def _wire(session: PeerSession) -> Wire:
    peer = session.built.peer
    return Wire(
        up_bytes=peer.traffic.up_bytes,
        down_bytes=peer.traffic.down_bytes,
        up_bytes_per_s=peer.traffic.up.per_s,
        down_bytes_per_s=peer.traffic.down.per_s,
        bytes_per_param=peer.published_bytes / session.built.replica.layout.size if peer.published_bytes else None,
        deltas_sent=peer.published,
        deltas_applied=peer.applied // len(session.built.replica.layout.chunks),
    )
