"""Coming back from a checkpoint, or from the start weights and the log: catch up, then judge the private work of last time.

Enters: the parts of a session whose replica is filled already. Leaves: a replica that contains what neighbours know, and a displacement
that is young enough to be of use. Work that is too old would lead the model back to where it was; how old it is can only be said once
somebody else's deltas have been compared, so a peer that comes back alone trains on, and judges when the first neighbour is there.
"""

from __future__ import annotations

from tscale_fed.find_run import FoundRun
from tscale_fed.ground import Ground
from tscale_fed.limits import ALONE_S, CATCH_UP_S
from tscale_fed.session_parts import Built
from tscale_peers import limits as swarm_limits
from tscale_peers.restart import PrivateWork, is_caught_up, own_batches


class Returning:
    """One return. `judged` says that the displacement needs no more thought."""

    def __init__(self, ground: Ground, found: FoundRun, built: Built) -> None:
        self._ground = ground
        self._found = found
        self._built = built
        limit = found.manifest.limits.displacement_max_age_batches
        stated = int(built.checkpoint.facts["swarm_batches"]) if built.checkpoint is not None else 0
        self._work = PrivateWork(stated, own_batches(built.peer), limit)
        self.judged = built.checkpoint is None or built.peer.meeting.displacement_norm() == 0

    @property
    def caught_up(self) -> bool:
        """Some neighbour's set was compared with ours, and nothing that it has is missing here."""
        return is_caught_up(self._built.peer)

    async def catch_up(self) -> None:
        """Until what neighbours know is here and applied, or for a while if nobody answers."""
        peer, clock = self._built.peer, self._ground.clock
        begun = clock.now()
        while not self.caught_up and clock.now() - begun < (CATCH_UP_S if peer.linked else ALONE_S):
            await clock.sleep(swarm_limits.tick_s)
        await peer.off_loop(peer.meeting.settle)

    @property
    def has_others(self) -> bool:
        """Whether there is or was anybody else: given or remembered addresses, or other authors in the log."""
        peer = self._built.peer
        streams = peer.gossip.known.streams.keys() - {peer.meeting.exchange.stream_key}
        return bool(streams or peer.settings.bootstrap or peer.settings.remembered)

    def judge(self) -> None:
        """Keep or drop the displacement, and say so. Between two steps, or before the first."""
        if self.judged:
            return
        self.judged = True
        age_batches, kept = self._work.judge(self._built.peer)
        since = f"the swarm has done {age_batches} batches since"
        if kept:
            self._ground.console.say(f"unpublished work of last time is kept: {since}")
        else:
            limit = self._work.max_age_batches
            self._ground.console.warn(f"unpublished work of last time is dropped: {since}, more than {limit}")
