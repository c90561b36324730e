"""Churn in virtual time: stalls, wrong clocks, homes that come back, donors that die at any moment, the end of everybody but one home."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch

from tscale_net.errors import Refused
from tscale_net.memory_link import Line
from tscale_net.ports import Clock, Rng
from tscale_net.virtual_time import run_virtual
from tscale_peers import limits
from tscale_peers.catch_up import CatchUp, Costs
from tscale_peers.manifest import RunLimits, RunManifest
from tscale_peers.packet import Packet
from tscale_peers.packet_log import MemoryLog
from tscale_peers.peer import SwarmPeer
from tscale_peers.simulated_peer import Conditions, SimulatedPeer
from tscale_peers.simulation import SimulatedSwarm, small_run

Scenario = Callable[[SimulatedSwarm], Awaitable[None]]


def simulate(scenario: Scenario, seed: int = 1, max_age_batches: int = 2000, chunk_params: int = 1 << 11, **options: object) -> None:
    torch.set_num_threads(1)
    manifest, start = small_run(publish_every_steps=3, chunk_params=chunk_params)
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    manifest = RunManifest(**{**fields, "limits": RunLimits(displacement_max_age_batches=max_age_batches)})

    async def main(clock: Clock, rng: Rng) -> None:
        swarm = SimulatedSwarm(manifest, start, clock, rng, **options)  # type: ignore[arg-type]
        try:
            await scenario(swarm)
        finally:
            await swarm.end()

    run_virtual(main, seed)


async def founded(swarm: SimulatedSwarm, others: int, conditions: Callable[[int], Conditions] = lambda number: Conditions()) -> str:
    address = await swarm.found(swarm.add(conditions=conditions(0)))
    await asyncio.gather(*[swarm.join(swarm.add(conditions=conditions(number)), address) for number in range(1, 1 + others)])
    return address


async def all_equal(swarm: SimulatedSwarm) -> None:
    swarm.stand_still()
    await swarm.quiesce()
    assert len({peer.meeting.settle() for peer in swarm.living()}) == 1


def of(sim: SimulatedPeer) -> SwarmPeer:
    assert sim.peer is not None
    return sim.peer


def deaths(swarm: SimulatedSwarm) -> list[str]:
    return [f"{sim.name}: {notice.text}" for sim in swarm.peers for notice in sim.notices if notice.text.endswith("is gone")]


# -- nobody is taken for dead ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [3, 11])
def test_processes_that_stand_still_for_5_seconds_are_not_taken_for_dead(others: int) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, others, lambda number: Conditions(stall_every_s=15, stall_s=5))
        await swarm.clock.sleep(90)
        assert deaths(swarm) == []
        assert max(sim.longest_gap_s for sim in swarm.peers) < 1 + 2 * 5, "no stall takes longer than it does"
        assert min(sim.longest_gap_s for sim in swarm.peers) > 5
        await all_equal(swarm)

    simulate(scenario)


def test_a_real_death_is_known_to_all_soon() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 17)
        await swarm.clock.sleep(30)
        gone = swarm.peers[5]
        swarm.kill(gone)
        await swarm.clock.sleep(2 * limits.dead_s)
        assert len(deaths(swarm)) == 17 and all(text.endswith("peer-5 is gone") for text in deaths(swarm))

    simulate(scenario)


def test_slow_lines_slow_disks_and_loss_stop_nobody() -> None:
    """One peer with ten times the lag, one on a slow disk, one on a lossy line, one that nobody can dial."""
    odd = {
        1: Conditions(line=Line(delay_s=0.36)),
        2: Conditions(disk_s=0.3),
        3: Conditions(line=Line(up_bytes_s=20_000, down_bytes_s=20_000, loss=0.05)),
        4: Conditions(listens=False),
    }

    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 6, lambda number: odd.get(number, Conditions()))
        await swarm.clock.sleep(90)
        assert deaths(swarm) == []
        for sim in swarm.peers:
            assert sim.longest_gap_s < 5 and of(sim).published > 20, sim.name
        await all_equal(swarm)

    simulate(scenario)


def test_clocks_that_are_a_minute_apart_do_no_harm_and_worse_ones_are_refused() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await founded(swarm, 4, lambda number: Conditions(clock_ahead_s=(-40.0, 0.0, 40.0)[number % 3]))
        await swarm.clock.sleep(90)
        assert deaths(swarm) == []
        for peer in swarm.living():
            assert len(peer.membership.live()) == 4 and len(peer.agreement.agreeing) == 4
        with pytest.raises(Refused) as refusal:
            await swarm.join(swarm.add(conditions=Conditions(clock_ahead_s=7200)), address)
        assert "clocks differ by 7240 s" in refusal.value.detail
        swarm.peers.pop()
        await all_equal(swarm)

    simulate(scenario)


# -- joining ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.2, 0.5, 1.0, 2.0, 4.0])
def test_a_donor_may_die_at_any_moment(after_s: float) -> None:
    """The snapshot takes 5 s here; whenever its first donor dies, the other one continues."""

    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await founded(swarm, 2)
        await swarm.clock.sleep(10)
        newcomer = swarm.add()
        joining = asyncio.ensure_future(swarm.join(newcomer, address, *of(swarm.peers[1]).settings.addresses))
        await swarm.clock.sleep(after_s)
        swarm.kill(swarm.peers[0])
        await joining
        await swarm.clock.sleep(5)
        await all_equal(swarm)

    simulate(scenario, chunk_params=1 << 10, bandwidth_bytes_s=4000.0)


def test_each_newcomer_may_join_through_the_last_one() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await swarm.found(swarm.add())
        for _ in range(5):
            newcomer = swarm.add()
            await swarm.join(newcomer, address)
            await swarm.clock.sleep(4)
            address = of(newcomer).settings.addresses[0]
        await swarm.clock.sleep(10)
        assert all(len(peer.membership.live()) == 5 for peer in swarm.living())
        await all_equal(swarm)

    simulate(scenario)


# -- coming back -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_age_batches", "kept"), [(2000, True), (5, False)])
def test_a_peer_comes_back_with_its_private_work_unless_that_is_too_old(max_age_batches: int, kept: bool) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await founded(swarm, 3)
        await swarm.clock.sleep(20)
        away = swarm.peers[2]
        swarm.save(away)
        assert away.home.checkpoint is not None
        work = away.home.checkpoint.private.displacement.clone()
        swarm.kill(away)
        away.step_s = 1e6  # it does not train again, so its displacement shows what it came back with
        await swarm.clock.sleep(25)
        await swarm.restart(away, address)
        await swarm.clock.sleep(20)
        assert away.is_training and away.lives == 2
        left = of(away).meeting.exchange.displacement()
        assert float(work.norm()) > 0
        assert torch.equal(left, work if kept else torch.zeros_like(work))
        await all_equal(swarm)

    simulate(scenario, max_age_batches=max_age_batches)


def test_what_was_published_after_the_checkpoint_counts_once() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await founded(swarm, 2)
        await swarm.clock.sleep(20)
        sim = swarm.peers[1]
        swarm.save(sim)
        await swarm.clock.sleep(10)
        published = of(sim).published
        swarm.kill(sim)
        await swarm.clock.sleep(3)
        await swarm.restart(sim, address)
        await swarm.clock.sleep(10)
        stream = of(sim).meeting.exchange.stream_key
        assert of(sim).meeting.replica.applied.highest(stream, 0) > published, "numbers go on"
        await all_equal(swarm)
        replica = swarm.run.new_replica()
        replica.set_start(swarm.start)
        total = replica.basepoint.clone()
        everything = {key: body for one in swarm.peers for key in one.log.all_keys() if (body := one.log.get(key)) is not None}
        for body in everything.values():
            packet = Packet.decode(body, swarm.run.terms)
            packet.delta.add_to(swarm.run.terms.layout.chunks[packet.chunk].of(total))
        assert torch.equal(of(sim).meeting.replica.basepoint, total)

    simulate(scenario, new_log=lambda: MemoryLog(1000))


# -- far behind ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("away_s", "by_snapshot"), [(12, False), (240, True)])
def test_far_behind_takes_whichever_is_fewer_bytes(away_s: float, by_snapshot: bool) -> None:
    """Logs keep everything here; 2 chunks of 8 KiB against packets of half a kilobyte."""

    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 3)
        await swarm.clock.sleep(10)
        away = swarm.peers[3]
        away.step_s = 1e6
        of(away).gossip.catch_up = CatchUp(Costs.of(swarm.run.terms), 0)
        ids = [sim.author.peer_id for sim in swarm.peers]
        swarm.network.partition([ids[:3], ids[3:]])
        await swarm.clock.sleep(away_s)
        before = swarm.network.moved(ids[3]).received_bytes
        swarm.network.heal()
        swarm.stand_still()
        await swarm.clock.sleep(limits.redial_max_s * 1.5)
        await swarm.quiesce()
        texts = [notice.text for notice in away.notices if notice.kind == "catch-up"]
        assert bool(texts) is by_snapshot and all("fewer bytes" in text for text in texts)
        missed = 3 * away_s / 3 * 2 * 580
        received = swarm.network.moved(ids[3]).received_bytes - before
        assert (received < missed) or not by_snapshot
        await all_equal(swarm)

    simulate(scenario, new_log=lambda: MemoryLog(1000))


# -- the end of everybody but one home -------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_survives", [True, False])
def test_everybody_is_killed_and_one_home_is_left(log_survives: bool) -> None:
    """The run goes on with the identical hash; newcomers with new identities join it."""

    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 4)
        await swarm.clock.sleep(30)
        left = swarm.peers[2]
        state = of(left).meeting.settle()
        swarm.save(left)
        if log_survives:
            await swarm.clock.sleep(15)
            state = of(left).meeting.settle()
        else:
            left.home.log, left.home.pledges = MemoryLog(), MemoryLog()
        for sim in list(swarm.peers):
            swarm.kill(sim)
        await swarm.clock.sleep(60)

        address = await swarm.restart(left, role="seed")
        assert of(left).meeting.settle() == state
        batches = of(left).swarm_batches()
        newcomers = [swarm.add() for _ in range(3)]
        await asyncio.gather(*[swarm.join(sim, address) for sim in newcomers])
        assert all(of(sim).meeting.replica.applied.contains(*key) for sim in newcomers for key in left.log.all_keys()[:5])
        await swarm.clock.sleep(30)
        assert of(left).swarm_batches() > batches and of(left).published > 3 and all(of(sim).published > 3 for sim in newcomers)
        await all_equal(swarm)

    simulate(scenario)
