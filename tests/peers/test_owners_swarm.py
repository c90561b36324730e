"""Whole swarms whose chunks have owners, in virtual time: replicas agree, owners die, halves part and meet, strangers lie."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import torch

from tests.peers.test_simulation import from_packets
from tscale_net.identity import Identity
from tscale_net.memory_transport import MemoryTransport
from tscale_net.ports import Channel, Clock, Rng
from tscale_net.virtual_time import run_virtual
from tscale_peers import limits
from tscale_peers.assembly import RunTerms
from tscale_peers.layout import TensorSpec
from tscale_peers.manifest import RuleSpec, RunManifest
from tscale_peers.messages import CONTRIBUTION, RECORDS
from tscale_peers.packet import PACKET_VERSION, SUM_STREAM, Header, Packet
from tscale_peers.packet_log import MemoryLog
from tscale_peers.peer import SwarmPeer
from tscale_peers.relay import framed
from tscale_peers.simulation import SimulatedPeer, SimulatedSwarm, ToyAuthor, small_run

Scenario = Callable[[SimulatedSwarm], Awaitable[None]]
SETTLED_S = limits.owner_settled_s + limits.owners_look_s + 5
"""By then everybody gives its work to owners."""
KEPT = 1000
"""Logs keep everything, so that a basepoint can be made again from packets."""


def simulate(scenario: Scenario, run: tuple[RunManifest, torch.Tensor] | None = None, seed: int = 1) -> None:
    torch.set_num_threads(1)
    manifest, start = run or small_run(publish_every_steps=2, chunk_params=1024, spread="owners")

    async def main(clock: Clock, rng: Rng) -> None:
        swarm = SimulatedSwarm(manifest, start, clock, rng, new_log=lambda: MemoryLog(KEPT))
        try:
            await scenario(swarm)
        finally:
            await swarm.end()

    run_virtual(main, seed)


async def founded(swarm: SimulatedSwarm, peers: int, step_s: float = 2.0) -> str:
    address = await swarm.found(swarm.add(step_s))
    await asyncio.gather(*[swarm.join(swarm.add(step_s * (0.7 + 0.6 * swarm.rng.random())), address) for _ in range(peers - 1)])
    return address


def of(sim: SimulatedPeer) -> SwarmPeer:
    assert sim.peer is not None
    return sim.peer


def waiting(swarm: SimulatedSwarm) -> int:
    return sum(peer.meeting.exchange.pledges.waiting for peer in swarm.living())


async def all_equal(swarm: SimulatedSwarm) -> None:
    """Training stops; sums that are due come out; what no sum lists is taken back. Then all hold equal bits: the start plus all packets."""
    swarm.stand_still()
    begun = swarm.clock.now()
    while waiting(swarm):
        assert swarm.clock.now() - begun < 3 * limits.pledge_patience_s, "contributions are listed or taken back, sooner or later"
        await swarm.clock.sleep(1)
    await swarm.quiesce()
    living = swarm.living()
    assert len({peer.meeting.settle() for peer in living}) == 1
    recomputed = from_packets(swarm)
    for peer in living:
        assert torch.equal(peer.meeting.replica.basepoint, recomputed)
        weights = peer.meeting.replica.weights() + peer.meeting.exchange.displacement()
        assert torch.allclose(peer.meeting.exchange.weights, weights, atol=1e-5), "W = B + d all along"
    assert not any(peer.agreement.differing for peer in living)


def sums_of(peer: SwarmPeer) -> set[bytes]:
    """Streams of sums in a replica."""
    return {key for key in peer.meeting.replica.applied.streams if int.from_bytes(key[32:], "little") & SUM_STREAM}


def nothing_refused(swarm: SimulatedSwarm) -> None:
    assert not sum((peer.board.refused for peer in swarm.living()), Counter())


AVERAGE = RuleSpec(own_leak="one", momentum_keep="one")


@pytest.mark.parametrize("rule", [RuleSpec(), pytest.param(AVERAGE, marks=pytest.mark.slow)], ids=["sum", "average"])
def test_work_of_all_comes_through_owners_and_replicas_are_equal(rule: RuleSpec) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 8)
        await swarm.clock.sleep(SETTLED_S + 10)
        living = swarm.living()
        published = [peer.published for peer in living]
        assert all(peer.spreading.by_owners for peer in living)
        assert sorted(peer.spreading.owned for peer in living) == [0, 0, 0, 0, 1, 1, 1, 1], "four chunks, four owners"
        assert all(peer.meeting.exchange.pledges.confirmed > 8 for peer in living), "everybody's work is in somebody's sums"
        assert all(len(sums_of(peer)) >= 4 for peer in living)
        assert not any(peer.meeting.exchange.pledges.taken_back for peer in living)
        before = living[0].swarm_batches()
        await swarm.clock.sleep(10)
        steps = sum(10 / sim.step_s for sim in swarm.peers)
        assert 0.5 * steps < living[0].swarm_batches() - before < 1.5 * steps, "sums state the batches of all"
        assert all(peer.published > was for peer, was in zip(living, published, strict=True))
        nothing_refused(swarm)
        await all_equal(swarm)

    simulate(scenario, small_run(publish_every_steps=2, chunk_params=1024, spread="owners", rule=rule))


def test_sums_may_have_a_codec_of_their_own() -> None:
    manifest, start = small_run(publish_every_steps=2, chunk_params=1024, spread="owners", rule=AVERAGE, codec="topk-sign-8")
    denser = msgspec.structs.replace(manifest, sum_codec="int8").check()

    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 3, step_s=1.0)
        await swarm.clock.sleep(SETTLED_S + 10)
        for peer in swarm.living():
            sums = [Packet.decode(body, swarm.run.terms) for body in bodies_of(peer, sums_of(peer))]
            assert len(sums) > 4 and {packet.header.codec for packet in sums} == {"int8"}
            assert peer.meeting.exchange.pledges.confirmed > 8
        nothing_refused(swarm)
        await all_equal(swarm)

    simulate(scenario, (denser, start))


def bodies_of(peer: SwarmPeer, streams: set[bytes]) -> list[bytes]:
    log = peer.meeting.exchange.log
    found = [log.get(key) for stream in sorted(streams) for key in log.keys(stream)]
    return [body for body in found if body is not None]


@pytest.mark.slow
def test_auto_changes_over_when_there_are_enough_peers_and_back() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await founded(swarm, limits.owners_from_peers - 1)
        await swarm.clock.sleep(SETTLED_S)
        assert not any(peer.spreading.by_owners or sums_of(peer) for peer in swarm.living())
        await swarm.join(swarm.add(), address)
        await swarm.clock.sleep(SETTLED_S)
        assert all(peer.spreading.by_owners for peer in swarm.living())
        for sim in swarm.peers[1 : limits.owners_slack_peers + 2]:
            swarm.kill(sim)
        await swarm.clock.sleep(2 * limits.dead_s)
        assert not any(peer.spreading.by_owners for peer in swarm.living())
        await all_equal(swarm)

    simulate(scenario, small_run(publish_every_steps=2, chunk_params=1024))


def test_owners_that_are_killed_cost_nobody_else_anything() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 8)
        await swarm.clock.sleep(SETTLED_S)
        owners = [sim for sim in swarm.peers if of(sim).spreading.owned]
        for sim in owners[:2]:
            swarm.kill(sim)
        await swarm.clock.sleep(2 * limits.dead_s)
        living = swarm.living()
        assert all(peer.meeting.exchange.pledges.taken_back for peer in living), "what the dead had not summed"
        assert sum(peer.spreading.owned for peer in living) == 4
        confirmed = [peer.meeting.exchange.pledges.confirmed for peer in living]
        await swarm.clock.sleep(10)
        assert all(peer.meeting.exchange.pledges.confirmed > was for peer, was in zip(living, confirmed, strict=True))
        await all_equal(swarm)

    simulate(scenario)


def test_an_owner_that_leaves_hands_on_what_it_has() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 4)
        await swarm.clock.sleep(SETTLED_S)
        leaver = next(sim for sim in swarm.peers if of(sim).spreading.owned)
        peer = of(leaver)
        peer.training_active = False
        start = peer.meeting.displacement_norm()
        assert await peer.leave()
        assert not peer.spreading.summing.sums.waiting() and peer.meeting.displacement_norm() < 0.2 * start
        swarm.kill(leaver)
        await swarm.clock.sleep(10)
        await all_equal(swarm)

    simulate(scenario)


def test_both_halves_have_owners_and_all_sums_count_when_they_meet() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 6)
        await swarm.clock.sleep(SETTLED_S)
        halves = [[sim.author.peer_id for sim in swarm.peers[:3]], [sim.author.peer_id for sim in swarm.peers[3:]]]
        swarm.network.partition(halves)
        await swarm.clock.sleep(40)
        for half in (swarm.peers[:3], swarm.peers[3:]):
            assert sum(of(sim).spreading.owned for sim in half) == 4, "each half sums all chunks"
            assert all(of(sim).meeting.exchange.pledges.confirmed for sim in half)
        assert of(swarm.peers[0]).state[0] != of(swarm.peers[5]).state[0]
        swarm.network.heal()
        await swarm.clock.sleep(20)
        await all_equal(swarm)

    simulate(scenario)


def test_a_newcomer_contributes_at_once_and_owns_its_part_later() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await founded(swarm, 4)
        await swarm.clock.sleep(SETTLED_S)
        newcomer = swarm.add()
        await swarm.join(newcomer, address)
        await swarm.clock.sleep(10)
        assert of(newcomer).meeting.exchange.pledges.confirmed and not of(newcomer).spreading.owned
        await swarm.clock.sleep(SETTLED_S)
        assert of(newcomer).spreading.owned or any(not peer.spreading.owned for peer in swarm.living())
        await all_equal(swarm)

    simulate(scenario)


def test_contributions_pass_over_peers_without_a_link_of_their_own() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await founded(swarm, 16)
        await swarm.clock.sleep(SETTLED_S + 5)
        living = swarm.living()
        assert any(len(peer.linked) < 15 for peer in living)
        assert sum(peer.spreading.relay.passed_on for peer in living) > 0
        assert not any(peer.meeting.exchange.pledges.taken_back for peer in living)
        await all_equal(swarm)

    simulate(scenario)


# -- strangers that lie --------------------------------------------------------------------------------------------------


class Liar:
    """A linked peer of the run that sends contributions as it likes."""

    def __init__(self, swarm: SimulatedSwarm, transport: MemoryTransport, author: ToyAuthor, victim: SwarmPeer) -> None:
        self.swarm, self.transport, self.author, self.victim = swarm, transport, author, victim

    def contribution(self, number: int = 1, size: int = 0, **changes: object) -> bytes:
        terms = self.swarm.run.terms
        where = terms.layout.chunks[0]
        payload = terms.codec.encode(torch.full((where.size,), 1e-3), where, 0.1) + bytes(size)
        fields: dict[str, object] = dict(
            version=PACKET_VERSION, run=terms.run, author=self.author.public_key, stream=5, seq=number, chunk=0, batches_total=1,
            coefficient=0.1, codec="sign", created_unix=0.0, owner=self.victim.author.public_key,
        )  # fmt: skip
        return Packet.seal(Header(**{**fields, **changes}), payload, self.author.sign)  # type: ignore[arg-type]

    async def sends(self, *contributions: bytes, hops: int = 3) -> None:
        for contribution in contributions:
            self.transport.send(self.victim.author.peer_id, CONTRIBUTION, framed(contribution, hops), Channel.BULK)
        await self.swarm.clock.sleep(3)


async def lied_to(swarm: SimulatedSwarm) -> Liar:
    await founded(swarm, 3)
    await swarm.clock.sleep(SETTLED_S)
    identity = Identity.from_seed(b"liar" * 8)
    transport = swarm.network.transport(identity, "liar", swarm.run.run)
    victim = of(swarm.peers[1])
    await transport.start()
    (address,) = victim.settings.addresses
    await transport.dial(address)
    return Liar(swarm, transport, ToyAuthor(identity), victim)


def test_false_contributions_are_refused_and_counted_and_change_nothing() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        liar = await lied_to(swarm)
        victim, sums = liar.victim, liar.victim.spreading.summing.sums
        good, stranger = liar.contribution(), Identity.from_seed(b"none" * 8).public_key
        await liar.sends(good)
        taken = sums.taken
        cases = {
            "contribution-known": good,
            "wrong-owner": liar.contribution(2, owner=stranger),
            "packet-oversized": liar.contribution(3, size=1),
            "bad-signature": liar.contribution(4)[:-1] + b"\x00",
            "packet-version": liar.contribution(5, version=1),
            "packet-coefficient": liar.contribution(6, coefficient=2.0),
            "packet-malformed": liar.contribution(7, owner=b""),
        }
        for code, contribution in cases.items():
            before = victim.board.refused[code]
            await liar.sends(contribution)
            assert victim.board.refused[code] == before + 1, code
        relayed = liar.contribution(8, owner=of(swarm.peers[0]).author.public_key)
        await liar.sends(relayed, hops=0)
        assert victim.board.refused["too-many-hops"] == 1
        assert included_of_liar(victim, liar) == {1}
        assert sums.taken >= taken
        await all_equal(swarm)

    simulate(scenario)


def included_of_liar(victim: SwarmPeer, liar: Liar) -> set[int]:
    """Numbers of the liar's contributions that were ever summed at the victim."""
    from tscale_peers.included import short_id
    from tscale_peers.packet import stream_key

    known = victim.spreading.summing.sums._known.get(0, {})
    pairs = known.get(short_id(stream_key(liar.author.public_key, 5)), [])
    return {number for first, last in pairs for number in range(first, last + 1)}


def test_a_flood_of_contributions_is_bounded_and_ends_the_link() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        liar = await lied_to(swarm)
        victim = liar.victim
        bodies = [liar.contribution(number) for number in range(1, limits.waiting_per_author + 5)]
        await liar.sends(*bodies)
        assert victim.board.refused["owner-busy"] >= 1, "one author fills no sum alone"
        await liar.sends(*[b"\x00" * 40] * (int(limits.strikes) + 40))
        assert liar.author.peer_id not in victim.linked, "nonsense ends the link"
        await all_equal(swarm)

    simulate(scenario)


# -- traffic --------------------------------------------------------------------------------------------------------------


CHUNK = 1 << 16
WAVE = 8
"""Peers that join at a time: more would mostly ask each other for chunks that none of them has."""


def large_run(chunks: int) -> tuple[RunManifest, torch.Tensor]:
    """Chunks whose packets are larger than their headers, and than the list of 64 authors that a sum carries: 8 KiB."""
    tensors = [TensorSpec(f"matrix {n}", 16, CHUNK // 16, -20) for n in range(chunks)]
    manifest = RunManifest(
        name="traffic", tensors=tensors, start_hash=bytes(32), created_unix=0.0, trainer={}, chunk_params=CHUNK,
        publish_every_steps=10, spread="owners",
    )  # fmt: skip
    replica = RunTerms.of(manifest).new_replica()
    replica.set_start(torch.randn(chunks * CHUNK, generator=torch.Generator().manual_seed(1)) * 0.5)
    return RunManifest.decode(manifest.encode()), replica.weights()


def received_payloads(peers: int, chunks: int) -> float:
    """Bytes that a peer receives per interval, but for records, in units of one delta of the whole model."""
    measured: list[float] = []

    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await swarm.found(swarm.add(2.0))
        for begin in range(1, peers, WAVE):
            await asyncio.gather(*[swarm.join(swarm.add(2.0), address) for _ in range(begin, min(begin + WAVE, peers))])
        await swarm.clock.sleep(SETTLED_S)
        living = swarm.living()
        before, published = [Counter(peer.received_bytes) for peer in living], sum(peer.published for peer in living)
        await swarm.clock.sleep(40)
        received = sum((Counter(peer.received_bytes) - was for peer, was in zip(living, before, strict=True)), Counter())
        publications = sum(peer.published for peer in living) - published
        whole = sum(peer.published_bytes for peer in living) / peers
        measured.append((received.total() - received[RECORDS]) / publications / whole)
        assert all(peer.spreading.by_owners for peer in living) and not waiting_too_long(living)
        print(f"{peers} peers: {measured[-1]:.2f} payloads per interval; by kind {dict(received)}")

    simulate(scenario, large_run(chunks))
    return measured[0]


def waiting_too_long(living: list[SwarmPeer]) -> int:
    return sum(peer.meeting.exchange.pledges.taken_back for peer in living)


def test_traffic_per_peer_hardly_grows_with_the_swarm() -> None:
    """The same at a quarter of the size: 4 peers and 16."""
    few, many = received_payloads(4, 8), received_payloads(16, 8)
    assert few < 2.0 and many < 2 * few


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_64_peers_receive_at_most_twice_what_8_do() -> None:
    few, many = received_payloads(8, 16), received_payloads(64, 16)
    assert many <= 2 * few
