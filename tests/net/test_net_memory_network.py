"""Virtual time and the network in memory: jumps, deadlocks, partitions, kills, bandwidth, and one trace per seed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from net_kit import MemoryArena, identity

from tscale_net import limits
from tscale_net.conformance import expect
from tscale_net.errors import Refused
from tscale_net.memory_network import MemoryNetwork
from tscale_net.memory_transport import MemoryTransport
from tscale_net.ports import Channel, Frame, LinkDown, LinkUp, Rng
from tscale_net.testing import Deadlock, VirtualClock, run_virtual

KIND = 40


def test_time_jumps_and_wall_time_follows() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> tuple[float, float]:
        before = clock.wall()
        await asyncio.gather(clock.sleep(3600), clock.sleep(86_400))
        return clock.now(), clock.wall() - before

    now_s, passed_s = run_virtual(scene)
    assert now_s == pytest.approx(86_400) and passed_s == pytest.approx(86_400)


def test_waiting_for_nothing_is_a_deadlock() -> None:
    async def scene() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match="nothing is scheduled"):
        run_virtual(scene())


def test_what_is_left_running_is_cancelled() -> None:
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append("background")

    async def scene(clock: VirtualClock, rng: Rng) -> str:
        asyncio.get_running_loop().create_task(background())
        await clock.sleep(1)
        return "done"

    assert (run_virtual(scene), ended) == ("done", ["background"])


async def pair(network: MemoryNetwork) -> tuple[MemoryTransport, MemoryTransport, str]:
    one, two = network.transport(identity(1)), network.transport(identity(2))
    await one.start()
    address = (await two.start())[0]
    await one.dial(address)
    for transport in (one, two):
        await expect(transport, LinkUp)
    return one, two, address


def test_short_partition_delays_and_long_partition_ends_the_link() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock)
        one, two, address = await pair(network)
        groups = [[one.peer_id], [two.peer_id]]
        network.partition(groups)
        one.send(two.peer_id, KIND, b"held back")
        await clock.sleep(limits.SILENCE_S / 2)
        before_s = clock.now()
        network.heal()
        assert (await expect(two, Frame)).body == b"held back"
        assert clock.now() - before_s < 1

        network.partition(groups)
        one.send(two.peer_id, KIND, b"lost")
        before_s = clock.now()
        assert "heard" in (await expect(one, LinkDown)).reason
        await expect(two, LinkDown)
        assert clock.now() - before_s == pytest.approx(limits.SILENCE_S)
        with pytest.raises(Refused, match="no answer"):
            await one.dial(address)
        network.heal()
        await one.dial(address)
        await expect(two, LinkUp)
        one.send(two.peer_id, KIND, b"new")
        assert (await expect(two, Frame)).body == b"new"

    run_virtual(scene)


@pytest.mark.parametrize("silent", [False, True])
def test_killed_peer_is_noticed_and_comes_back(silent: bool) -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock)
        one, two, address = await pair(network)
        before_s = clock.now()
        network.kill(two.peer_id, silent=silent)
        with pytest.raises(Refused, match="Check host"):
            await one.dial(address.replace(two.peer_id, identity(3).peer_id))
        if not silent:
            await expect(one, LinkDown)
            assert clock.now() - before_s < 1
        again = network.transport(identity(2))
        assert (await again.start())[0] == address, "the same identity keeps its address"
        await again.dial(f"/ip4/{one.host}/tcp/7700/p2p/{one.peer_id}")
        await expect(one, LinkDown if silent else LinkUp)
        assert [link.peer for link in one.links()] == [two.peer_id]
        assert one.send(two.peer_id, KIND, b"hello again")
        assert (await expect(again, Frame)).body == b"hello again"

    run_virtual(scene)


def test_cut_loses_what_is_in_flight() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock)
        one, two, _ = await pair(network)
        one.send(two.peer_id, KIND, b"in flight")
        assert network.cut(one.peer_id, two.peer_id)
        assert not network.cut(one.peer_id, two.peer_id)
        await expect(one, LinkDown)
        assert isinstance(await two.next_event(), LinkDown)

    run_virtual(scene)


def test_bandwidth_takes_time_and_control_overtakes_bulk() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock, latency_s=0.01, jitter_s=0.0, bandwidth_bytes_s=100_000)
        one, two, _ = await pair(network)
        before_s = clock.now()
        for _ in range(10):
            assert one.send(two.peer_id, KIND, bytes(100_000), Channel.BULK)
        assert one.pending_bytes(two.peer_id) == 1_000_000
        one.send(two.peer_id, KIND, b"urgent")
        assert (await expect(two, Frame)).body == b"urgent"
        for _ in range(10):
            await expect(two, Frame)
        assert clock.now() - before_s == pytest.approx(10.0, rel=0.02)
        assert one.pending_bytes(two.peer_id) == 0
        while one.send(two.peer_id, KIND, bytes(400_000), Channel.BULK):
            pass
        assert one.pending_bytes(two.peer_id) <= limits.BULK_QUEUE_BYTES

    run_virtual(scene)


def test_peer_that_only_dials_cannot_be_dialled() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        arena = MemoryArena(clock, rng)
        shy = arena.network.transport(identity(5), listens=False)
        assert await shy.start() == []
        one, address = await arena.peer(1)
        with pytest.raises(Refused, match="no answer"):
            await one.dial(f"/ip4/{shy.host}/tcp/7700/p2p/{shy.peer_id}")
        await shy.dial(address)
        await expect(one, LinkUp)
        assert one.send(shy.peer_id, KIND, b"hi")

    run_virtual(scene)


def chatter(seed: int) -> str:
    """Hash of everything that 64 chatting peers see in 30 s, with a partition, a kill and a heal."""

    async def scene(clock: VirtualClock, rng: Rng) -> str:
        network = MemoryNetwork(rng, clock, bandwidth_bytes_s=1e6)
        peers = [network.transport(identity(number), f"peer {number}") for number in range(1, 65)]
        addresses = [(await peer.start())[0] for peer in peers]
        trace = hashlib.sha256()

        async def listen(peer: MemoryTransport) -> None:
            while True:
                event = await peer.next_event()
                trace.update(f"{clock.now():.9f} {peer.name} {event}".encode())

        async def talk(peer: MemoryTransport) -> None:
            for address in rng.sample(addresses, 4):
                if peer.peer_id not in address and not peer.dead:
                    await peer.dial(address)
            while not peer.dead:
                for link in peer.links():
                    peer.send(link.peer, KIND, rng.randbytes(200), rng.choice(list(Channel)))
                await clock.sleep(rng.uniform(0.5, 1.5))

        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(work) for peer in peers for work in (listen(peer), talk(peer))]
        await clock.sleep(5)
        ids = [peer.peer_id for peer in peers]
        network.partition([ids[:20], ids[20:]])
        network.kill(ids[40])
        await clock.sleep(20)
        network.heal()
        await clock.sleep(5)
        for task in tasks:
            task.cancel()
        return f"{network.messages} {trace.hexdigest()}"

    return run_virtual(scene, seed)


def test_one_seed_has_one_trace_in_every_process() -> None:
    here = chatter(1)
    assert int(here.split()[0]) > 5000
    assert chatter(1) == here != chatter(2)
    program = "import test_net_memory_network as t; print(t.chatter(1))"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == here
