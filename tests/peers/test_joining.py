"""Joining in virtual time: whom to ask for the run, donors that lie or give nothing, and what a newcomer need not fetch twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import pytest
import torch

from tscale_net.errors import Refused
from tscale_net.ports import PeerId
from tscale_net.transfer import Transfers
from tscale_net.virtual_time import run_virtual
from tscale_peers import joining, limits
from tscale_peers.donor import CHUNK_PREFIX, MANIFEST, provide_from
from tscale_peers.gossip import NeedChunks
from tscale_peers.intake import Intake
from tscale_peers.joining import ChunkFetch, learn_run
from tscale_peers.peer import Outside, SwarmPeer
from tscale_peers.simulation import SimulatedPeer, SimulatedSwarm, small_run, toy_verify


def simulate(scenario: Callable[[SimulatedSwarm], Awaitable[None]], **options: object) -> None:
    torch.set_num_threads(1)
    manifest, start = small_run(publish_every_steps=3)

    async def main(clock: object, rng: object) -> None:
        swarm = SimulatedSwarm(manifest, start, clock, rng, **options)  # type: ignore[arg-type]
        try:
            await scenario(swarm)
        finally:
            await swarm.end()

    run_virtual(main, 1)


def of(sim: SimulatedPeer) -> SwarmPeer:
    assert sim.peer is not None
    return sim.peer


def serve(sim: SimulatedPeer, swarm: SimulatedSwarm, change: Callable[[str, bytes | None], bytes | None]) -> None:
    """Let a donor give something else than what it has."""
    peer = of(sim)

    async def nothing(name: str) -> None:
        return None

    honest = provide_from(peer, swarm.run.manifest.encode(), len(swarm.run.terms.layout.chunks), lambda: None, nothing)

    async def provide(asker: PeerId, name: str) -> bytes | None:
        content = await honest(asker, name)
        assert content is None or isinstance(content, bytes)
        return change(name, content)

    peer.outside.transfers.serve(provide)


async def two_donors(swarm: SimulatedSwarm) -> tuple[str, str]:
    address = await swarm.found(swarm.add())
    await swarm.join(swarm.add(), address)
    await swarm.clock.sleep(12)
    swarm.stand_still()
    await swarm.quiesce()
    return address, of(swarm.peers[1]).settings.addresses[0]


async def stranger(swarm: SimulatedSwarm) -> Outside:
    transport = swarm.network.transport(swarm.add().author.identity, "stranger", b"")
    await transport.start()
    return Outside(transport, Transfers(transport, swarm.clock, swarm.rng), swarm.clock, swarm.rng, toy_verify)


@pytest.mark.parametrize("lie", [lambda b: b"noise", lambda b: b[:-3], lambda b: b[:1] + b"\x07" + b[2:], lambda b: b""])
def test_a_donor_of_chunks_that_cannot_be_loaded_is_passed_over(lie: Callable[[bytes], bytes]) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        addresses = await two_donors(swarm)
        serve(swarm.peers[0], swarm, lambda name, b: lie(b) if b is not None and name.startswith(CHUNK_PREFIX) else b)
        newcomer = swarm.add()
        await swarm.join(newcomer, *addresses)
        await swarm.quiesce()
        assert of(newcomer).meeting.settle() == of(swarm.peers[0]).meeting.settle()
        assert any(n.kind == "refused" and "snapshot chunk" in n.text for n in newcomer.notices)

    simulate(scenario)


def test_what_the_snapshot_contains_is_not_fetched_again_as_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[bytes] = []

    async def scenario(swarm: SimulatedSwarm) -> None:
        addresses = await two_donors(swarm)
        monkeypatch.setattr(Intake, "put", lambda self, source, body: fetched.append(body))
        newcomer = swarm.add(step_s=0)
        await swarm.join(newcomer, *addresses)
        await swarm.clock.sleep(60)
        assert swarm.peers[0].log.all_keys() and fetched == []
        assert of(newcomer).gossip.compared and of(newcomer).gossip.backlog() == 0

    simulate(scenario, bandwidth_bytes_s=4000.0)  # slow enough that others are heard of before it is here


def test_the_first_address_that_gives_a_true_manifest_wins() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        liar, honest = await two_donors(swarm)
        serve(swarm.peers[0], swarm, lambda name, b: b"\x00" + b[1:] if b is not None and name == MANIFEST else b)
        outside = await stranger(swarm)
        learned = await learn_run(outside, ["/ip4/10.9.9.9/tcp/7700", liar, honest])
        assert learned.address == honest and learned.manifest == swarm.run.manifest
        assert outside.transport.run == swarm.run.run

    simulate(scenario)


def test_no_address_that_works_names_each_and_why() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        one = await stranger(swarm)
        other = await stranger(swarm)
        address = f"/ip4/{other.transport.host}/tcp/7700/p2p/{other.transport.peer_id}"  # type: ignore[attr-defined]
        with pytest.raises(Refused) as refusal:
            await learn_run(one, ["/ip4/10.9.9.9/tcp/7700", address])
        assert refusal.value.code == "unreachable"
        assert "10.9.9.9" in refusal.value.detail and "has not joined a run itself" in refusal.value.detail

    simulate(scenario)


def test_if_nobody_gives_a_chunk_the_join_ends_with_a_sentence() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        address = await swarm.found(swarm.add())
        serve(swarm.peers[0], swarm, lambda name, b: None if name == f"{CHUNK_PREFIX}1" else b)
        with pytest.raises(BaseExceptionGroup) as raised:
            await swarm.join(swarm.add(), address)
        refusal = raised.value.exceptions[0]
        assert isinstance(refusal, Refused) and refusal.code == "no-snapshot" and "chunk 1" in refusal.detail
        swarm.peers.pop()

    simulate(scenario)


def test_a_donor_that_still_joins_gives_nothing_and_odd_names_are_not_here() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await swarm.found(swarm.add())
        peer = of(swarm.peers[0])

        async def extra(name: str) -> None:
            return None

        provide = provide_from(peer, b"manifest", 2, lambda: None, extra)
        assert await provide("x", f"{CHUNK_PREFIX}1") is not None
        for name in ("2", "-1", "", " 1", "1.0", "²", "9" * 180, "../0"):
            assert await provide("x", CHUNK_PREFIX + name) is None
        peer.gossip.hold = True
        assert await provide("x", f"{CHUNK_PREFIX}1") is None
        assert await provide("x", MANIFEST) == b"manifest"
        peer.gossip.hold = False

    simulate(scenario)


def test_chunks_that_bring_nothing_are_fetched_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour that speaks of packets which never were must not have us fetch megabytes for ever."""
    fetched: list[tuple[float, tuple[int, ...]]] = []

    async def scenario(swarm: SimulatedSwarm) -> None:
        await swarm.found(swarm.add(step_s=0))
        peer = of(swarm.peers[0])

        async def run(self: ChunkFetch, chunks: Sequence[int]) -> None:
            fetched.append((swarm.clock.now(), tuple(chunks)))
            if 2 in chunks:
                self.loaded.append(2)

        monkeypatch.setattr(joining.ChunkFetch, "run", run)
        for _ in range(400):
            peer.reload_chunks(NeedChunks((0, 2), ("ghost",)))
            await swarm.clock.sleep(10)

    simulate(scenario)
    useless, useful = ([at for at, chunks in fetched if index in chunks] for index in (0, 2))
    gaps = [b - a for a, b in zip(useless, useless[1:], strict=False)]
    assert len(useless) <= 8 and gaps == sorted(gaps)
    assert len(useful) > 100, "what brings something keeps its short pause"
    assert min(b - a for a, b in zip(useful, useful[1:], strict=False)) >= limits.chunk_reload_pause_s


def test_reloading_says_what_came_and_takes_only_what_is_ahead() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await two_donors(swarm)
        first, second = of(swarm.peers[0]), of(swarm.peers[1])
        before = first.meeting.settle()
        await ChunkFetch(first, swarm.run.manifest, only_if_ahead=True, donors=[second.author.peer_id]).run([0, 1])
        assert first.meeting.settle() == before, "a chunk that is not ahead changes nothing"

    simulate(scenario)
