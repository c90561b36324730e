"""Lines of the network in memory: downlinks, delays, loss; processes that stand still."""

from __future__ import annotations

import math

import pytest
from net_kit import identity

from tscale_net.conformance import expect
from tscale_net.errors import Refused
from tscale_net.memory_link import RETRANSMIT_S, SEGMENT_BYTES, Line
from tscale_net.memory_network import MemoryNetwork
from tscale_net.memory_transport import MemoryTransport
from tscale_net.ports import Channel, Frame, LinkUp, Rng
from tscale_net.stall import Stall, StallingClock
from tscale_net.testing import VirtualClock, run_virtual

KIND = 40
BODY = bytes(100_000)


async def linked(network: MemoryNetwork, *lines: Line, stall: Stall | None = None) -> list[MemoryTransport]:
    """Peers on these lines, each linked to the last one."""
    peers = [network.transport(identity(n), line=line, stall=stall if n == len(lines) else None) for n, line in enumerate(lines, 1)]
    address = [(await peer.start())[0] for peer in peers][-1]
    for peer in peers[:-1]:
        await peer.dial(address)
        await expect(peer, LinkUp)
        await expect(peers[-1], LinkUp)
    return peers


def test_senders_share_the_receivers_downlink() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock, latency_s=0.01, jitter_s=0.0)
        one, two, last = await linked(network, Line(), Line(), Line(down_bytes_s=100_000))
        before_s = clock.now()
        for _ in range(3):
            one.send(last.peer_id, KIND, BODY, Channel.BULK)
            two.send(last.peer_id, KIND, BODY, Channel.BULK)
        for _ in range(6):
            await expect(last, Frame)
        assert clock.now() - before_s == pytest.approx(6.0, rel=0.02)
        assert network.moved(last.peer_id).received_bytes >= 6 * len(BODY)

    run_virtual(scene)


def test_delays_of_both_lines_add_up() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock, latency_s=0.01, jitter_s=0.0)
        one, last = await linked(network, Line(delay_s=0.3), Line(delay_s=0.1))
        before_s = clock.now()
        one.send(last.peer_id, KIND, b"x")
        await expect(last, Frame)
        assert clock.now() - before_s == pytest.approx(0.41)

    run_virtual(scene)


def test_loss_bounds_the_rate_as_tcp_does_and_loses_nothing() -> None:
    loss, latency_s = 0.01, 0.05

    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock, latency_s=latency_s, jitter_s=0.0)
        one, last = await linked(network, Line(loss=loss), Line())
        before_s = clock.now()
        for _ in range(20):
            one.send(last.peer_id, KIND, BODY, Channel.BULK)
        for _ in range(20):
            await expect(last, Frame)
        ceiling = SEGMENT_BYTES / (2 * latency_s) * math.sqrt(1.5 / loss)
        assert 20 * len(BODY) / (clock.now() - before_s) == pytest.approx(ceiling, rel=0.02)

    run_virtual(scene)


def test_a_small_message_that_is_hit_comes_a_retransmission_later() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock, latency_s=0.05, jitter_s=0.0)
        one, last = await linked(network, Line(loss=0.3), Line())
        took = []
        for _ in range(100):
            before_s = clock.now()
            one.send(last.peer_id, KIND, b"x")
            await expect(last, Frame)
            took.append(clock.now() - before_s)
        late = [seconds for seconds in took if seconds > 0.06]
        assert 15 < len(late) < 45 and late == pytest.approx([0.05 + RETRANSMIT_S + 0.1] * len(late))

    run_virtual(scene)


def test_a_process_that_stands_still_reads_and_sleeps_on_afterwards() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network, stall = MemoryNetwork(rng, clock), Stall(clock)
        one, last = await linked(network, Line(), Line(), stall=stall)
        stall.hold(5)
        begin_s = clock.now()
        one.send(last.peer_id, KIND, b"x")
        assert (await expect(last, Frame)).body == b"x" and clock.now() - begin_s == pytest.approx(5)
        own = StallingClock(clock, stall, ahead_s=7)
        assert own.wall() == pytest.approx(clock.wall() + 7)
        stall.hold(3)
        await own.sleep(1)
        assert clock.now() - begin_s == pytest.approx(8)

    run_virtual(scene)


def test_clocks_that_are_too_far_apart_do_not_link() -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        network = MemoryNetwork(rng, clock)
        wrong, right = network.transport(identity(1), clock_ahead_s=-100), network.transport(identity(2))
        address = (await right.start())[0]
        with pytest.raises(Refused, match="differ by 100 s"):
            await wrong.dial(address)

    run_virtual(scene)
