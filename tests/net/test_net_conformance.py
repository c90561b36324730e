"""Both transports keep the promises of the conformance suite; the real one on both event loops."""

from __future__ import annotations

import asyncio

import pytest
from net_kit import MemoryArena, ZmqArena

from tscale_net.conformance import CASES, Case
from tscale_net.ports import Rng
from tscale_net.testing import VirtualClock, run_virtual

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


@by_name
@pytest.mark.parametrize("seed", [1, 2])
def test_memory_transport(case: Case, seed: int) -> None:
    async def scene(clock: VirtualClock, rng: Rng) -> None:
        await case(MemoryArena(clock, rng))

    run_virtual(scene, seed)


async def on_real_sockets(case: Case) -> None:
    arena = ZmqArena()
    try:
        await case(arena)
    finally:
        await arena.close()


@by_name
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
def test_zmq_transport(case: Case, loop_name: str) -> None:
    factory = asyncio.new_event_loop
    if loop_name == "uvloop":
        factory = pytest.importorskip("uvloop", reason="uvloop is not installed here").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(on_real_sockets(case))
