"""Leaving in order: nothing that was learned is lost.

Enters: a peer that shall go. Leaves: ordinary packets with growing coefficient until the displacement is small or ten were sent, a last
record that says so, and the answer whether a neighbour holds everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tscale_peers import limits

if TYPE_CHECKING:
    from tscale_peers.peer import SwarmPeer


async def hand_over(peer: SwarmPeer, progress: Callable[[str], None]) -> bool:
    """Publish the rest and wait for a holder. True if everything own is held by a neighbour (or there is nobody and nothing to tell)."""
    peer.renew_record()
    if peer.linked:
        peer.herald.tell(peer.linked)
        await _hand_on_sums(peer)
        await _publish_rest(peer, progress)
    handed_over = await _held(peer)
    peer.herald.tell(peer.linked)
    return handed_over


async def _hand_on_sums(peer: SwarmPeer) -> None:
    """An owner publishes what waits for a sum and takes over what is left of it; an author waits for sums that list what it gave, while
    they come: what is not listed by then stays here."""
    clock, pledges = peer.outside.clock, peer.meeting.exchange.pledges
    await peer.off_loop(peer.meeting.finish_sums)
    least, since = pledges.waiting, clock.now()
    while peer.linked and pledges.waiting and clock.now() - since < limits.leave_handover_s:
        await clock.sleep(limits.tick_s)
        await peer.off_loop(peer.meeting.settle)
        if pledges.waiting < least:
            least, since = pledges.waiting, clock.now()


async def _publish_rest(peer: SwarmPeer, progress: Callable[[str], None]) -> None:
    start = await peer.off_loop(peer.meeting.displacement_norm)
    if start == 0:
        return
    phi = peer.share()
    for n in range(limits.leave_max_publications):
        part = min(1.0, phi * 2**n)
        met = await peer.off_loop(lambda p=part: peer.meeting.publish_now(p))  # type: ignore[misc]
        if met.withheld is not None:
            progress(f"the rest of my work stays here: {met.withheld.detail}")
            return
        await peer.outside.clock.sleep(0)
        left = await peer.off_loop(peer.meeting.displacement_norm) / start
        if left < limits.leave_displacement_fraction:
            break
    progress(f"{1 - left:.0%} of my unpublished work was published in {n + 1} deltas")


async def _held(peer: SwarmPeer) -> bool:
    """Wait for receipts as long as they keep coming: a slow uplink is no reason to give up."""
    clock = peer.outside.clock
    least, since = peer.unheld(), clock.now()
    while peer.linked and peer.unheld() and clock.now() - since < limits.leave_handover_s:
        await clock.sleep(limits.tick_s)
        if peer.unheld() < least:
            least, since = peer.unheld(), clock.now()
    return not peer.unheld()
