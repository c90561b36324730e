"""One scenario from start to end, in virtual time.

Enters: a scenario, its objective, what to call now and then. Leaves: an `Outcome`; the same one, trace included, for the same seed.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import torch

from tscale_fed.sim.mishaps import MINUTE_S, Mishaps
from tscale_fed.sim.objective import Objective
from tscale_fed.sim.outcome import Ending, Outcome, Sample, SpeedRow
from tscale_fed.sim.scenario import Scenario
from tscale_net.memory_link import Line
from tscale_net.ports import Clock, Rng
from tscale_net.virtual_time import run_virtual
from tscale_peers.membership import State
from tscale_peers.simulated_peer import NONE, REAL, Conditions, SimulatedPeer
from tscale_peers.simulation import SimulatedSwarm

SAMPLES = 60
"""Points of the curves."""
SETTLE_MOST_S = 600.0
STALL_EVERY_S = 60.0
COLLECT_AFTER_OBJECTS = 200_000
"""Some 50 MB at the very most."""
KNOWN_AFTER_S = 60.0
"""A peer that has come back, or a part that was cut off, is known to all after this."""

Report = Callable[[Sample], bool]
"""Called with each sample; True ends the simulation early."""


def simulate(scenario: Scenario, objective: Objective, report: Report = lambda sample: False) -> Outcome:
    """Run it. Raises what a peer's own fault raises: a simulation must not go on without it."""
    torch.set_num_threads(1)
    began, cpu = time.perf_counter(), time.process_time()

    async def main(clock: Clock, rng: Rng) -> Outcome:
        run = _Run(scenario, objective, report, clock, rng)
        try:
            return await run.to_the_end()
        finally:
            await run.swarm.end()

    with _few_collections():
        outcome = run_virtual(main, scenario.seed)
    return msgspec.structs.replace(outcome, real_s=time.perf_counter() - began, cpu_s=time.process_time() - cpu)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Python looks for unreachable cycles rarely: a simulation makes a great many objects and hardly any cycles."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Run:
    def __init__(self, scenario: Scenario, objective: Objective, report: Report, clock: Clock, rng: Rng) -> None:
        self._scenario = scenario
        self._objective = objective
        self._report = report
        self._clock = clock
        self._rng = random.Random(rng.random())
        self.swarm = SimulatedSwarm(
            objective.manifest,
            objective.start,
            clock,
            rng,
            latency_s=scenario.latency_ms / 1000,
            jitter_s=scenario.latency_ms / 1000 / 4,
            new_learner=objective.new_learner,
            signatures=REAL if scenario.signatures == "real" else NONE,
            checkpoint_s=scenario.checkpoint_s,
        )
        self._mishaps = Mishaps(self.swarm, scenario, self._conditions, random.Random(rng.random()))
        self._samples: list[Sample] = []
        self._false_deaths = 0

    async def to_the_end(self) -> Outcome:
        await self._found()
        self._mishaps.begin()
        stopped = await self._watch()
        minutes = self._clock.now() / MINUTE_S
        await self._mishaps.stop()
        self.swarm.network.heal()
        ending = None if stopped else await self._settle()
        refused: Counter[str] = Counter()
        for sim in self.swarm.peers:
            if sim.peer is not None:
                refused += sim.peer.board.refused
        return Outcome(
            scenario=_plain(self._scenario),
            minutes=minutes,
            stopped=stopped,
            real_s=0.0,
            cpu_s=0.0,
            messages=self.swarm.network.messages,
            kills=self._mishaps.kills,
            replaced=self._mishaps.replaced,
            refused=dict(sorted(refused.items())),
            false_deaths=self._false_deaths,
            samples=self._samples,
            speeds=self._rows(),
            ending=ending,
            trace=self.swarm.trace(),
        )

    # -- start -------------------------------------------------------------------------------------------------------

    def _conditions(self, number: int) -> Conditions:
        scenario = self._scenario
        rng = random.Random(f"{scenario.seed} {number}")
        lag = scenario.lags[number % len(scenario.lags)]
        own_delay_s = (lag - 1) * scenario.latency_ms / 1000
        line = Line(scenario.line_bytes_s, scenario.line_bytes_s, max(0.0, own_delay_s), scenario.loss / 2)
        return Conditions(
            step_s=scenario.step_s / scenario.speeds[number % len(scenario.speeds)],
            listens=number == 0 or rng.random() >= scenario.dial_only,
            line=line,
            clock_ahead_s=scenario.bad_clock_s * (2 * rng.random() - 1),
            disk_s=scenario.disk_ms / 1000,
            stall_every_s=STALL_EVERY_S,
            stall_s=scenario.stall_s,
        )

    async def _found(self) -> None:
        swarm = self.swarm
        address = await swarm.found(swarm.add(conditions=self._conditions(0)))
        others = [swarm.add(conditions=self._conditions(number)) for number in range(1, self._scenario.peers)]
        await asyncio.gather(*(self._join(sim, address) for sim in others))

    async def _join(self, sim: SimulatedPeer, address: str) -> None:
        await self._clock.sleep(self._rng.random() * min(self._scenario.step_s, MINUTE_S / 4))
        await self.swarm.join(sim, address)

    # -- on the way --------------------------------------------------------------------------------------------------

    async def _watch(self) -> bool:
        """Take samples to the end; True if it was stopped before."""
        end_s = self._scenario.minutes * MINUTE_S
        every_s = end_s / SAMPLES
        while True:
            sample = self._sample()
            self._samples.append(sample)
            if self._report(sample):
                return True
            left_s = end_s - self._clock.now()
            if left_s <= 0:
                return False
            await self._clock.sleep(min(every_s, left_s))

    def _sample(self) -> Sample:
        swarm = self.swarm
        living = swarm.living()
        shared = next(sim for sim in swarm.peers if sim.alive and sim.peer is not None and not sim.peer.gossip.hold)
        assert shared.peer is not None
        received = sum(swarm.network.moved(sim.identity.peer_id).received_bytes for sim in swarm.peers)
        self._count_false_deaths()
        return Sample(
            minute=self._clock.now() / MINUTE_S,
            loss=self._objective.loss(shared.peer.meeting.replica.weights()),
            bytes_per_peer=received / max(1, len(living)),
            tokens=sum(sim.total_steps * sim.learner.tokens_per_step for sim in swarm.peers if sim.learner is not None),
            living=len(living),
            training=sum(sim.is_training for sim in swarm.peers),
            states=len({peer.state[0] for peer in living}),
        )

    def _count_false_deaths(self) -> None:
        """Views of living peers that take another living, reachable one for dead; those that have just come or come back are left out."""
        swarm = self.swarm
        since_s = self._clock.now() - KNOWN_AFTER_S
        if since_s < self._mishaps.healed_at:
            return
        settled = [sim for sim in swarm.peers if sim.is_training and sim.started_at < since_s]
        for sim in settled:
            assert sim.peer is not None
            for other in settled:
                one, two = sim.identity.peer_id, other.identity.peer_id
                if one != two and two in sim.peer.membership.book and swarm.network.reaches(one, two):
                    self._false_deaths += sim.peer.membership.state(two) is State.DEAD

    # -- end ---------------------------------------------------------------------------------------------------------

    async def _settle(self) -> Ending:
        swarm = self.swarm
        swarm.stand_still()
        try:
            settled_s = await swarm.quiesce(SETTLE_MOST_S)
        except TimeoutError:
            settled_s = -1.0
        states = [peer.meeting.settle() for peer in swarm.living()]
        return Ending(
            settled_s=settled_s,
            replicas=len(states),
            digests=len({digest for digest, _ in states}),
            hashes=len({value for _, value in states}),
            hash=states[0][1].hex(),
            loss=self._objective.loss(swarm.living()[0].meeting.replica.weights()),
        )

    def _rows(self) -> list[SpeedRow]:
        rows = []
        for speed in sorted(set(self._scenario.speeds)):
            sims = [sim for sim in self.swarm.peers if self._scenario.speeds[sim.seed % len(self._scenario.speeds)] == speed]
            if not sims:
                continue
            moved, count = [self.swarm.network.moved(sim.identity.peer_id) for sim in sims], len(sims)
            rows.append(
                SpeedRow(
                    speed=speed,
                    peers=count,
                    steps=sum(sim.total_steps for sim in sims),
                    published=sum(sim.published for sim in sims),
                    received_bytes=sum(m.received_bytes for m in moved) / count,
                    sent_bytes=sum(m.sent_bytes for m in moved) / count,
                    longest_gap_s=max(sim.longest_gap_s for sim in sims),
                    step_s=self._scenario.step_s / speed,
                )
            )
        return rows


def _plain(scenario: Scenario) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(scenario)
    return plain
