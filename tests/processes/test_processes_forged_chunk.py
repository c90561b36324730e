"""A running peer takes no snapshot chunk on a stranger's word.

The attack: offer a packet that does not exist, answer the request with MISSING, be asked for the chunk, and give a forged one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import pytest
from log_oracle import manifest_of
from process_kit import PeerProcess, Swarm, free_port, write_run

from tscale_net.identity import Identity
from tscale_net.ports import Frame, SystemClock
from tscale_net.transfer import Transfers
from tscale_net.transport import ZmqTransport
from tscale_peers.assembly import RunTerms
from tscale_peers.donor import CHUNK_PREFIX
from tscale_peers.messages import HAVE, MISSING, WANT, Ranges
from tscale_peers.packet import stream_key

FORGER = Identity.from_seed(b"\x09" * 32)
FORGED = f"{CHUNK_PREFIX}0"
MOST_BYTES = 1 << 22
ASKED_S = 6


class Forger:
    """Serves a false chunk and speaks of a packet that only this chunk contains."""

    def __init__(self, victim: PeerProcess) -> None:
        self._manifest = manifest_of(victim.home)
        clock, rng = SystemClock(), random.Random(1)
        self.transport = ZmqTransport(FORGER, clock, rng, None, self._manifest.run_id, "forger")
        self._transfers = Transfers(self.transport, clock, rng)
        self._transfers.serve(self._provide)
        self._chunk = b""
        self.asked = asyncio.Event()

    async def attack(self, address: str) -> None:
        """Returns when the victim has asked for the chunk, or has not for a while."""
        await self.transport.start()
        peer = await self.transport.dial(address)
        pump = asyncio.create_task(self._pump(peer))
        try:
            self._chunk = self._forge(await self._transfers.fetch(FORGED, [peer], max_bytes=MOST_BYTES))
            self.transport.send(peer, HAVE, Ranges.of([self._key()]).encode())
            with contextlib.suppress(TimeoutError):  # as it should be
                await asyncio.wait_for(self.asked.wait(), ASKED_S)
                await asyncio.sleep(1)  # the chunk is on its way
        finally:
            pump.cancel()
            await self.transport.close()

    def _key(self) -> tuple[bytes, int, int]:
        return (stream_key(FORGER.public_key, 1), 1, 0)

    def _forge(self, honest: bytes) -> bytes:
        replica = RunTerms.of(self._manifest).new_replica()
        replica.load_chunk(0, honest)
        replica.basepoint.add_(1)
        replica.applied.add(*self._key())
        return replica.read_chunk(0)

    async def _provide(self, peer: str, name: str) -> bytes | None:
        self.asked.set()
        return self._chunk if name == FORGED else None

    async def _pump(self, peer: str) -> None:
        while True:
            event = await self.transport.next_event()
            if isinstance(event, Frame) and not self._transfers.handle(event) and event.kind == WANT:
                self.transport.send(peer, MISSING, event.body)


class StandsStill:
    """Was the same said several times in a row?"""

    def __init__(self, times: int) -> None:
        self._times, self._last, self._count = times, "", 0

    def __call__(self, said: str) -> bool:
        self._count = self._count + 1 if said and said == self._last else 0
        self._last = said
        return self._count >= self._times


@pytest.mark.timeout(120)
async def test_a_stranger_cannot_replace_a_chunk_of_a_running_peer(swarm: Swarm, tmp_path: Path) -> None:
    seed = swarm.seed(write_run(tmp_path / "run"), free_port())
    await asyncio.to_thread(seed.training, 4)
    await asyncio.to_thread(seed.command, "pause")
    await asyncio.to_thread(seed.until, lambda s: s.phase == "paused" and s.steps_since_publish < 3, "pause")
    stands_still = StandsStill(times=20)
    await asyncio.to_thread(seed.until, lambda s: stands_still(s.basepoint_hash), "what was being published is out")
    before = await asyncio.to_thread(seed.until, lambda s: bool(s.basepoint_hash), "state")
    await Forger(seed).attack(seed.address)
    after = await asyncio.to_thread(seed.until, lambda s: s.uptime_s > before.uptime_s + 3, "three more seconds")
    assert after.basepoint_hash == before.basepoint_hash
