"""What happens to a simulated swarm: kills at exchanges, a stream of peers that are replaced for good, a partition.

Enters: the running swarm, the scenario. Leaves: tasks on the virtual loop; whoever was killed comes back, or somebody new does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tscale_fed.sim.scenario import Partition, Scenario
from tscale_net.errors import Refused
from tscale_net.ports import Rng
from tscale_peers.simulated_peer import Conditions, SimulatedPeer
from tscale_peers.simulation import SimulatedSwarm

HOUR_S = 3600.0
MINUTE_S = 60.0
BOOTSTRAP_ADDRESSES = 3
"""Addresses that a peer is given: one of them may be dead."""
RETRY_S = 5.0
"""After a join that failed."""
LEAST_LIVING = 2
"""Kills stop short of the last peers: a swarm that is dead altogether is another test."""


class Mishaps:
    """Start with `begin`; `stop` lets nothing new happen and waits for peers that are on their way back."""

    def __init__(self, swarm: SimulatedSwarm, scenario: Scenario, conditions_of: Callable[[int], Conditions], rng: Rng) -> None:
        self.kills = 0
        self.replaced = 0
        self.healed_at = 0.0
        self._swarm = swarm
        self._scenario = scenario
        self._conditions_of = conditions_of
        self._rng = rng
        self._happening = True
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """From now on things happen."""
        scenario = self._scenario
        if scenario.kill:
            self._swarm.on_published = self._exchanged
        if scenario.replace_per_hour:
            self._start(self._replace())
        if scenario.partition is not None:
            self._start(self._divide(scenario.partition))

    async def stop(self) -> None:
        """Nothing new happens; whoever is away comes back first."""
        self._happening = False
        while self._tasks:
            await asyncio.gather(*self._tasks)

    def _start(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- kills -------------------------------------------------------------------------------------------------------

    def _exchanged(self, sim: SimulatedPeer) -> None:
        """Each publication may be a peer's last: it dies at some moment before the next."""
        if self._happening and self._rng.random() < self._scenario.kill:
            self._start(self._die_and_return(sim, self._rng.random() * self._scenario.publish_interval_s))

    async def _die_and_return(self, sim: SimulatedPeer, after_s: float) -> None:
        swarm = self._swarm
        await swarm.clock.sleep(after_s)
        if not self._happening or not sim.alive or len(swarm.living()) <= LEAST_LIVING:
            return
        self.kills += 1
        swarm.kill(sim)
        await swarm.clock.sleep(self._scenario.rejoin_s * (0.5 + self._rng.random()))
        await self._come_back(sim)

    async def _come_back(self, sim: SimulatedPeer) -> None:
        """As a user would: start it again until it runs."""
        while not await self._started(self._swarm.restart(sim, *self._addresses(sim)), sim):
            await self._swarm.clock.sleep(RETRY_S)

    async def _started(self, start: Coroutine[Any, Any, Any], sim: SimulatedPeer) -> bool:
        """False if nobody could be reached, or no donor lived long enough: the program has ended with a sentence then."""
        try:
            await start
        except (Refused, ExceptionGroup) as error:
            if isinstance(error, ExceptionGroup) and error.split(Refused)[1] is not None:
                raise
            self._swarm.kill(sim)
            return False
        return True

    def _addresses(self, sim: SimulatedPeer) -> list[str]:
        known = list(self._swarm.addresses(but=sim))
        return self._rng.sample(known, min(BOOTSTRAP_ADDRESSES, len(known)))

    # -- replacement and partition -----------------------------------------------------------------------------------

    async def _replace(self) -> None:
        """One peer after the other dies for good, and a newcomer with an empty home comes in its place."""
        swarm = self._swarm
        pause_s = HOUR_S / (self._scenario.replace_per_hour * self._scenario.peers)
        while True:
            await swarm.clock.sleep(pause_s * (0.5 + self._rng.random()))
            if not self._happening:
                return
            living = [sim for sim in swarm.peers if sim.alive]
            if len(living) <= LEAST_LIVING:
                continue
            gone = self._rng.choice(living)
            swarm.kill(gone)
            self.replaced += 1
            self._start(self._come_new(gone))

    async def _come_new(self, gone: SimulatedPeer) -> None:
        newcomer = self._swarm.add(conditions=self._conditions_of(gone.seed))
        while not await self._started(self._swarm.join(newcomer, *self._addresses(newcomer)), newcomer):
            await self._swarm.clock.sleep(RETRY_S)

    async def _divide(self, partition: Partition) -> None:
        swarm = self._swarm
        await swarm.clock.sleep(partition.begin_minute * MINUTE_S)
        ids = [sim.identity.peer_id for sim in swarm.peers]
        cut = round(len(ids) * partition.part)
        swarm.network.partition([ids[:cut], ids[cut:]])
        await swarm.clock.sleep((partition.end_minute - partition.begin_minute) * MINUTE_S)
        swarm.network.heal()
        self.healed_at = swarm.clock.now()
