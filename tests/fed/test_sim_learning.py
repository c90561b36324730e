"""A real small model in virtual time: what kills, a joiner and the end of everybody cost in nats. Slow: minutes of processor time."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tscale_fed.sim.objective import Objective, objective_of
from tscale_fed.sim.outcome import Sample
from tscale_fed.sim.scenario import Scenario
from tscale_fed.sim.simulate import simulate
from tscale_net.ports import Clock, Rng, SystemClock
from tscale_net.virtual_time import run_virtual
from tscale_peers.peer import SwarmPeer
from tscale_peers.simulated_peer import SimulatedPeer
from tscale_peers.simulation import SimulatedSwarm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MOST_LOST_NATS = 0.03
JOINER_NATS = 0.05
BUMP_NATS = 0.01


def loss_at(samples: list[Sample], tokens: int) -> float:
    """Loss after so many tokens of all peers, between samples."""
    at = bisect_left([sample.tokens for sample in samples], tokens)
    before, after = samples[at - 1], samples[at]
    return before.loss + (after.loss - before.loss) * (tokens - before.tokens) / (after.tokens - before.tokens)


def test_kills_at_every_exchange_cost_little_beyond_the_time_that_peers_are_away(tmp_path: Path) -> None:
    scenario = Scenario(peers=8, minutes=4.0, model="tiny")
    calm = simulate(scenario, objective_of(scenario, tmp_path, SystemClock()))
    scenario = Scenario(peers=8, minutes=4.0, model="tiny", kill=0.3, rejoin_s=2.0)
    killed = simulate(scenario, objective_of(scenario, tmp_path, SystemClock()))
    assert calm.ending is not None and killed.ending is not None
    assert killed.kills > 50 and killed.ending.hashes == 1 and killed.ending.replicas == 8
    assert all(row.longest_gap_s <= row.step_s * 1.02 for row in killed.speeds), "no living peer ever stopped"
    last = killed.samples[-1]
    assert last.loss - loss_at(calm.samples, last.tokens) <= MOST_LOST_NATS


# -- one swarm, looked at closely ------------------------------------------------------------------------------------------


def watched(tmp_path: Path, look: Callable[[SimulatedSwarm, Objective], Awaitable[None]]) -> None:
    scenario = Scenario(peers=6, minutes=4.0, model="tiny")
    objective = objective_of(scenario, tmp_path, SystemClock())

    async def main(clock: Clock, rng: Rng) -> None:
        swarm = SimulatedSwarm(objective.manifest, objective.start, clock, rng, new_learner=objective.new_learner)
        try:
            address = await swarm.found(swarm.add())
            await asyncio.gather(*[swarm.join(swarm.add(), address) for _ in range(5)])
            await swarm.clock.sleep(120)
            await look(swarm, objective)
        finally:
            await swarm.end()

    run_virtual(main, 1)


def of(sim: SimulatedPeer) -> SwarmPeer:
    assert sim.peer is not None
    return sim.peer


def shared_loss(swarm: SimulatedSwarm, objective: Objective) -> float:
    return objective.loss(swarm.living()[0].meeting.replica.weights())


async def losses_for(seconds: int, swarm: SimulatedSwarm, objective: Objective) -> list[float]:
    losses = []
    for _ in range(seconds):
        await swarm.clock.sleep(1)
        losses.append(shared_loss(swarm, objective))
    return losses


def test_a_joiner_at_half_time_is_soon_as_good_and_the_swarm_does_not_notice(tmp_path: Path) -> None:
    async def look(swarm: SimulatedSwarm, objective: Objective) -> None:
        before = await losses_for(10, swarm, objective)
        newcomer = swarm.add()
        await swarm.join(newcomer, of(swarm.peers[3]).settings.addresses[0])
        after: list[float] = []
        while of(newcomer).published < 2:
            after += await losses_for(1, swarm, objective)
        assert newcomer.learner is not None
        assert objective.loss(newcomer.learner.weights) - shared_loss(swarm, objective) <= JOINER_NATS
        after += await losses_for(20, swarm, objective)
        assert max(after) - min(before) <= BUMP_NATS + noise(before)

    watched(tmp_path, look)


def noise(losses: list[float]) -> float:
    """How far the loss goes up by itself."""
    return max(later - min(losses[: at + 1]) for at, later in enumerate(losses))


def test_all_are_killed_and_one_checkpoint_is_left(tmp_path: Path) -> None:
    async def look(swarm: SimulatedSwarm, objective: Objective) -> None:
        left = swarm.peers[4]
        state, loss = of(left).meeting.settle(), shared_loss(swarm, objective)
        swarm.save(left)
        before = await losses_for(10, swarm, objective)
        for sim in list(swarm.peers):
            swarm.kill(sim)
        left.home.log, left.home.pledges = swarm.add().home.log, swarm.add().home.log  # empty ones
        address = await swarm.restart(left, role="seed")
        assert of(left).meeting.settle() == state
        assert shared_loss(swarm, objective) == pytest.approx(loss, abs=BUMP_NATS)
        newcomers = [swarm.add() for _ in range(5)]
        await asyncio.gather(*[swarm.join(sim, address) for sim in newcomers])
        after = await losses_for(60, swarm, objective)
        assert max(after) - loss <= BUMP_NATS + noise(before), "no bump"
        assert min(after) < loss, "it goes on learning"
        swarm.stand_still()
        await swarm.quiesce()
        assert len({peer.meeting.settle() for peer in swarm.living()}) == 1

    watched(tmp_path, look)
