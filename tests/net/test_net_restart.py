"""Peers that vanish without a word and come back: real processes, SIGKILL and SIGSTOP."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from net_kit import ZmqArena, identity

from tscale_net.conformance import expect
from tscale_net.ports import Frame, LinkDown, LinkUp

KIND = 40
OTHER_PROCESS = """
import asyncio, random, sys
from net_kit import identity
from tscale_net.ports import SystemClock
from tscale_net.transport import ZmqTransport

async def main():
    transport = ZmqTransport(identity(2), SystemClock(), random.Random(2))
    await transport.start()
    peer = await transport.dial(sys.argv[1])
    transport.send(peer, 40, b"here")
    while True:
        await transport.next_event()

asyncio.run(main())
"""


@pytest.fixture
async def arena() -> AsyncIterator[ZmqArena]:
    made = ZmqArena()
    yield made
    await made.close()


@pytest.fixture
async def processes() -> AsyncIterator[list[asyncio.subprocess.Process]]:
    started: list[asyncio.subprocess.Process] = []
    yield started
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def start(address: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return await asyncio.create_subprocess_exec(sys.executable, "-c", OTHER_PROCESS, address, env=environment)


async def test_killed_process_is_noticed_and_its_successor_is_heard(arena: ZmqArena, processes: list[asyncio.subprocess.Process]) -> None:
    one, address = await arena.peer(1)
    for _ in range(2):
        processes.append(await start(address))
        assert (await expect(one, LinkUp)).peer == identity(2).peer_id
        assert (await expect(one, Frame)).body == b"here"
        processes[-1].kill()
        assert (await expect(one, LinkDown)).peer == identity(2).peer_id


async def test_stopped_process_is_replaced_by_its_successor_at_once(arena: ZmqArena, processes: list[asyncio.subprocess.Process]) -> None:
    """The old session is not dead yet for TCP, and still yields: LinkDown, then LinkUp, and nothing of the old one is heard again."""
    one, address = await arena.peer(1)
    processes.append(await start(address))
    await expect(one, LinkUp)
    await expect(one, Frame)
    processes[0].send_signal(signal.SIGSTOP)
    processes.append(await start(address))
    down = await one.next_event()
    assert isinstance(down, LinkDown) and "connected again" in down.reason
    assert isinstance(await one.next_event(), LinkUp)
    assert (await expect(one, Frame)).body == b"here"
    assert len(one.links()) == 1
    processes[0].kill()
    assert one.send(identity(2).peer_id, KIND, b"to the successor")
