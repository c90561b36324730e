"""Hostile input against a running peer: refused, counted with its reason, model unchanged, training goes on."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from attackers import FrameAttacker, Liar, say
from log_oracle import manifest_of
from process_kit import LOOPBACK, PeerProcess, Swarm, free_port, write_run

from tscale_fed.status import Status
from tscale_net import frames, limits
from tscale_net.address import parse
from tscale_net.errors import Refused
from tscale_net.identity import Identity
from tscale_net.ports import Frame, SystemClock
from tscale_net.transport import ZmqTransport

KEYS = iter(range(1, 255))
GARBAGE, SPARE = 40, 60
"""Connections that send noise, and silent ones beyond the cap."""


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeerProcess]:
    """One seed for all attacks: they must not add up either."""
    folder = tmp_path_factory.mktemp("hostile")
    swarm = Swarm(folder)
    seed = swarm.seed(write_run(folder / "run"), free_port())
    seed.training()
    yield seed
    swarm.close()


def identity() -> Identity:
    return Identity.from_seed(bytes([next(KEYS)]) * 32)


@asynccontextmanager
async def transport(who: Identity, run: bytes) -> AsyncIterator[ZmqTransport]:
    made = ZmqTransport(who, SystemClock(), random.Random(1), None, run, "mallory")
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def standing_still(victim: PeerProcess) -> AsyncIterator[None]:
    """Pause the victim; what happens inside must not change its model. Afterwards it trains and publishes again."""
    await asyncio.to_thread(victim.command, "pause")
    await asyncio.to_thread(victim.until, lambda s: s.phase == "paused" and s.applied_digest != "", "pause")
    before = await asyncio.to_thread(_settled, victim)
    yield
    after = await asyncio.to_thread(_settled, victim)
    assert (after.applied_digest, after.basepoint_hash) == (before.applied_digest, before.basepoint_hash)
    await asyncio.to_thread(victim.command, "resume")
    sent = before.wire.deltas_sent
    await asyncio.to_thread(victim.until, lambda s: s.wire.deltas_sent >= sent + 2, "training goes on")
    assert "Traceback" not in victim.text()


def _settled(victim: PeerProcess) -> Status:
    """A snapshot after which two idle meetings have passed without a change."""
    last = victim.until(lambda s: True, "snapshot")
    same_since = last.uptime_s

    def unchanged(status: Status) -> bool:
        nonlocal last, same_since
        if (status.applied_digest, status.wire.deltas_sent) != (last.applied_digest, last.wire.deltas_sent):
            last, same_since = status, status.uptime_s
        return status.uptime_s - same_since > 2.5

    return victim.until(unchanged, "a state that stays")


async def counted(victim: PeerProcess, code: str, more_than: int, what: str) -> None:
    await asyncio.to_thread(victim.until, lambda s: s.refused.get(code, 0) > more_than, f"refusal {code} of {what}", 20)


@pytest.mark.timeout(240)
async def test_an_admitted_liar(victim: PeerProcess) -> None:
    """Every lie is counted under its own reason; the link of the liar carries honest messages as before."""
    manifest = manifest_of(victim.home)
    who = identity()
    async with standing_still(victim), transport(who, manifest.run_id) as liar:
        peer = await liar.dial(victim.address)
        expected = Counter((await asyncio.to_thread(victim.until, lambda s: True, "snapshot")).refused)
        for lie in Liar(manifest, who).lies():
            assert liar.send(peer, lie.kind, lie.body, lie.channel), lie.what
            await counted(victim, lie.code, expected[lie.code], lie.what)
            expected[lie.code] += 1
        status = await asyncio.to_thread(victim.until, lambda s: True, "snapshot")
        assert Counter(status.refused) == expected
        assert any("refused from" in event.text for event in status.events)
        assert [link.peer for link in liar.links()] == [peer], "an honest link carries on"
        await asyncio.wait_for(_hears_records(liar), 20)


async def _hears_records(liar: ZmqTransport) -> None:
    while not isinstance(await liar.next_event(), Frame):
        pass


@pytest.mark.timeout(120)
async def test_strangers_and_broken_frames(victim: PeerProcess) -> None:
    manifest = manifest_of(victim.home)
    address = parse(victim.address)
    assert address.peer_id is not None
    before = Counter(victim.until(lambda s: True, "snapshot").refused)
    async with standing_still(victim):
        async with transport(identity(), bytes(32)) as foreigner:
            with pytest.raises(Refused) as caught:
                await foreigner.dial(victim.address)
            assert caught.value.code == "wrong-run"
        await counted(victim, "wrong-run", before["wrong-run"], "a peer of another run")

        attacker = FrameAttacker(address.host, address.port, address.peer_id, identity(), manifest.run_id)
        try:
            control, session = await attacker.join()
            for number, (what, code, header_bytes, body) in enumerate(_broken_frames(session), start=1):
                await control.send_multipart([header_bytes(number), body])
                await counted(victim, code, before[code], what)
                before[code] += 1
            await say(control, 40, b"", 999, session)
            await counted(victim, "bad-sequence", before["bad-sequence"], "a gap in the sequence")
        finally:
            attacker.close()
        await asyncio.to_thread(_garbage_at_the_door, address.port + 1)
        for code in ("bad-message", "too-large", "truncated"):
            await counted(victim, code, before[code], "a visitor of the hello door")


def _broken_frames(session: bytes) -> list[tuple[str, str, Callable[[int], bytes], bytes]]:
    """(what, code, header for a message number, body)."""

    def header(kind: int, length: int) -> Callable[[int], bytes]:
        return lambda number: frames.encode_header(kind, number, session, length)

    too_large = limits.CONTROL_BODY_BYTES + 1
    return [
        ("a body shorter than announced", "truncated", header(40, 100), b"short"),
        ("a body longer than announced", "truncated", header(40, 2), b"longer"),
        ("a control message that is too large", "too-large", header(40, too_large), bytes(too_large)),
        ("an announcement of 4 GB", "too-large", header(40, (1 << 32) - 1), b""),
        ("a reserved kind", "unknown-kind", header(9, 0), b""),
        ("a header of noise", "bad-frame", lambda number: os.urandom(32), b""),
    ]


def _garbage_at_the_door(port: int) -> None:
    for request in (b"\x05\x00abcde", b"\xff\xff", b"\x05", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection((LOOPBACK, port), timeout=10) as visit:
            visit.sendall(request)
            visit.shutdown(socket.SHUT_WR)
            assert visit.recv(100) == b""


@pytest.mark.timeout(120)
async def test_garbage_and_a_flood_of_connections(victim: PeerProcess) -> None:
    address = parse(victim.address)
    assert address.peer_id is not None
    before = victim.until(lambda s: True, "snapshot")
    flood: list[socket.socket] = []
    try:
        async with standing_still(victim):
            await asyncio.to_thread(_connect_all, flood, address.port)
            await counted(victim, "too-many", before.refused.get("too-many", 0), "connections over the cap")
            for connection in flood:
                connection.close()
            async with transport(identity(), manifest_of(victim.home).run_id) as honest:
                await _dial_in_time(honest, victim.address)
    finally:
        for connection in flood:
            connection.close()


def _connect_all(flood: list[socket.socket], port: int) -> None:
    """Some that talk garbage, and more silent ones than are let in."""
    for number in range(GARBAGE + limits.CONNECTIONS_TOTAL + SPARE):
        flood.append(socket.create_connection((LOOPBACK, port), timeout=10))
        if number < GARBAGE:
            _throw(flood[-1], os.urandom(2000))


def _throw(connection: socket.socket, garbage: bytes) -> None:
    try:
        connection.sendall(garbage)
    except OSError:
        pass  # cut already, which is the point


async def _dial_in_time(honest: ZmqTransport, address: str) -> None:
    """The flood's connections take a moment to be gone."""
    for _ in range(5):
        try:
            await honest.dial(address)
            return
        except Refused:
            continue
    raise AssertionError("an honest peer is not let in after the flood")
