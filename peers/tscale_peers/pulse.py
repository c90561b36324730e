"""What a peer does because time has passed, not because something came.

Enters: the peer, its clock. Leaves: its record renewed, others judged, dials, announcements, whether it may publish now.
Two rhythms: the house is looked after every `house_s`; announcements go out `tick_s` after there is something to announce, and while there
is nothing, nothing runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tscale_peers import limits
from tscale_peers.cadence import LinkOf, Standing
from tscale_peers.membership import Change, State
from tscale_peers.records import PeerRecord

if TYPE_CHECKING:
    from tscale_peers.peer import SwarmPeer

_STATE_WORDS = {State.LIVE: "is here", State.SUSPECT: "is not heard of lately", State.DEAD: "is gone", State.LEFT: "left"}


class Pulse:
    """Of one peer; `run` it in the peer's task group. The peer calls `news` and `consider_publishing`."""

    def __init__(self, peer: SwarmPeer) -> None:
        self._peer = peer
        self._clock = peer.outside.clock
        self._news = asyncio.Event()
        self._share_at = 0.0
        self._idle_meeting: asyncio.Task[None] | None = None

    def run(self, tasks: asyncio.TaskGroup) -> None:
        """Start both rhythms."""
        tasks.create_task(self._announce())
        tasks.create_task(self._keep_house(tasks))

    def news(self) -> None:
        """There is something to announce."""
        self._news.set()

    async def _announce(self) -> None:
        while True:
            await self._news.wait()
            await self._clock.sleep(limits.tick_s)
            self._news.clear()
            self._peer.announce()

    async def _keep_house(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            self._look_after(tasks)
            large = len(self._peer.membership.book) / limits.house_large_peers
            await self._clock.sleep(limits.house_s * min(max(1.0, large), limits.house_most))

    def _look_after(self, tasks: asyncio.TaskGroup) -> None:
        peer, now = self._peer, self._clock.now()
        changes = peer.membership.tick(now)
        if changes:
            self._show(changes)
        if len(peer.agreement) > len(peer.membership.book):
            peer.agreement.forget(peer.membership.book.__contains__)
        if peer.herald.due(peer.linked):
            peer.renew_record()
        if not peer.leaving:
            peer.dialler.tick(peer.linked, tasks)
        peer.spreading.tick(peer.membership, peer.linked, peer.rate.per_s > 0, peer.leaving, bool(changes))
        self._show_waiting()
        if changes or now >= self._share_at:
            self._share_at = now + max(limits.share_s, peer.membership.heartbeat_s() / limits.heartbeat_parts)
            live = peer.membership.live()
            peer.meeting.share = peer.share(live)
            self._choose_pace(live)
        self._measure(now)
        self.consider_publishing(now)
        peer.retry_refused(now)
        if self._may_meet_idle(now) and (self._idle_meeting is None or self._idle_meeting.done()):
            self._idle_meeting = tasks.create_task(self._meet_idle())
        peer.announce()
        need = peer.gossip.unobtainable()
        if need is not None:
            peer.reload_chunks(need)

    def _show(self, changes: Sequence[Change]) -> None:
        """Say who has come and gone."""
        for change in changes:
            again = change.before is State.SUSPECT and change.after is State.LIVE
            self._peer.board.tell("peers", f"{change.name} {'is heard of again' if again else _STATE_WORDS[change.after]}")

    def _show_waiting(self) -> None:
        """Sums and contributions that could not be made."""
        refused = self._peer.spreading.summing.refused
        while refused:
            self._peer.board.refuse(refused.popleft(), "my own sums")

    # -- meetings without training -----------------------------------------------------------------------------------

    def _may_meet_idle(self, now: float) -> bool:
        peer = self._peer
        return not peer.training_active and not peer.gossip.hold and now - peer.met_at >= limits.idle_meeting_s

    async def _meet_idle(self) -> None:
        """Beside the house: a large model takes longer to apply and hash than others wait for a heartbeat."""
        if self._may_meet_idle(self._clock.now()):
            await self._peer.off_loop(self._peer.meeting.meet_idle)

    # -- may it publish? ---------------------------------------------------------------------------------------------

    def heard(self, now: float) -> None:
        """A neighbour spoke of packets: a receipt may be what a publication waits for."""
        if not self._peer.meeting.may_publish:
            self.consider_publishing(now)

    def consider_publishing(self, now: float) -> None:
        """Whether the next meeting that is due may publish."""
        peer = self._peer
        peer.meeting.publish_not_before = peer.pacer.next_at(peer.last_delta_at.get(peer.author.peer_id))
        peer.meeting.may_publish = not peer.leaving and not peer.gossip.hold and self._uplink_free(now)

    def _uplink_free(self, now: float) -> bool:
        """Some neighbour, however slow the others are, holds what was published before; or nobody has shown any interest for long."""
        peer = self._peer
        most = limits.unheld_publications * len(peer.meeting.replica.layout.chunks)
        waited = now - peer.last_delta_at.get(peer.author.peer_id, now)
        if peer.spreading.relay.own_waiting:
            return False
        return len(peer.gossip.unheld) <= most or not peer.gossip.has_listeners() or waited > limits.uplink_patience_s

    def _measure(self, now: float) -> None:
        """The own connection, from what came and what was wanted."""
        peer = self._peer
        peer.traffic.note(peer.outside.transport.moved, now)
        chunks = len(peer.meeting.replica.layout.chunks)
        backlog = 0 if peer.gossip.hold else peer.gossip.backlog()
        unheld = peer.unheld() if peer.gossip.has_listeners() else 0  # who is alone has nobody to send to
        live = 1 + peer.membership.live_count
        peer.pacer.measure(Standing(peer.traffic.down_bytes, peer.traffic.up_bytes, backlog, unheld, chunks, live), now)

    def _choose_pace(self, live: Sequence[PeerRecord]) -> None:
        """See what the links of those who do the work allow."""
        peer = self._peer
        own = LinkOf(peer.settings.name, peer.pacer.down.bytes_per_s or 0.0, peer.rate.per_s)
        others = [LinkOf(r.name, r.down_bytes_per_s, r.tokens_per_s) for r in live]
        peer.pacer.choose(peer.published_bytes, peer.spreading.payloads(len(others)), own, others)
