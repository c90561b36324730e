"""The control socket: snapshots, commands, own user only, and clients that misbehave."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tscale_fed import control
from tscale_fed.control import ControlServer
from tscale_fed.control_client import AsyncControlClient, ControlClient
from tscale_fed.control_path import POINTER_NAME, find_path
from tscale_fed.limits import CONTROL_CLIENTS, CONTROL_PATH_BYTES, CONTROL_REQUEST_BYTES
from tscale_fed.tui.testing import FakePeer
from tscale_net.errors import Refused


@asynccontextmanager
async def serving(home: Path, fake: FakePeer | None = None, **options: object) -> AsyncIterator[ControlServer]:
    fake = fake or FakePeer(3)
    commands = {"pause": fake.pause, "resume": fake.resume, "stop": fake.stop}
    server = ControlServer(home, fake.snapshot, commands, **options)  # type: ignore[arg-type]
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def ask(home: Path, data: bytes) -> bytes:
    """Send raw bytes, return what comes until the server closes or has answered one line."""
    reader, writer = await asyncio.open_unix_connection(os.fspath(find_path(home)), limit=2**22)
    try:
        writer.write(data)
        return await reader.readline()
    finally:
        writer.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "h"
    path.mkdir(mode=0o700)
    return path


async def test_snapshot_and_commands(home: Path) -> None:
    async with serving(home):
        client = AsyncControlClient(home)
        first, second = await client.snapshot(), await client.snapshot()
        assert second.step > first.step and len(first.peers) == 3
        assert await client.command("pause") == "paused: still connected, not training"
        assert (await client.snapshot()).phase == "paused"
        with pytest.raises(Refused, match="knows no command 'fly'.*pause, resume, stop"):
            await client.command("fly")


async def test_blocking_client(home: Path) -> None:
    async with serving(home, interval_s=0.01):
        client = ControlClient(home)
        assert (await asyncio.to_thread(client.snapshot)).name == "brave-otter"
        assert await asyncio.to_thread(client.command, "stop") == "leaving: the last deltas go out"

        def three() -> list[int]:
            return [snapshot.step for snapshot, _ in zip(client.subscribe(), range(3), strict=False)]

        steps = await asyncio.to_thread(three)
        assert len(steps) == 3 and steps == sorted(set(steps))


async def test_subscription_ends_with_the_peer(home: Path) -> None:
    async with serving(home, interval_s=0.01) as server:
        stream = AsyncControlClient(home).subscribe()
        assert (await anext(stream)).step < (await anext(stream)).step
        await server.close()
        with pytest.raises(Refused) as gone:
            while True:
                await anext(stream)
        assert gone.value.code == "peer-gone"
    with pytest.raises(Refused, match="start one with tscale-peer"):
        await AsyncControlClient(home).snapshot()
    with pytest.raises(Refused, match="no peer runs"):
        ControlClient(home).snapshot()


async def test_socket_is_private_and_removed(home: Path) -> None:
    async with serving(home):
        path = find_path(home)
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert not path.exists()


async def test_a_socket_left_by_a_killed_peer_is_replaced(home: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(os.fspath(home / "control.sock"))
    dead.close()
    with pytest.raises(Refused, match="no peer runs"):
        ControlClient(home).snapshot()
    async with serving(home):
        assert (await AsyncControlClient(home).snapshot()).step > 0


async def test_another_user_is_refused(home: Path) -> None:
    async with serving(home, own_uid=os.getuid() + 1):
        with pytest.raises(Refused, match="belongs to another user") as refusal:
            await AsyncControlClient(home).snapshot()
        assert refusal.value.code == "not-ours"


async def test_long_home_uses_a_short_path(home: Path, tmp_path: Path) -> None:
    long = home / ("x" * 120)
    long.mkdir(mode=0o700)
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    async with serving(long, environment={"XDG_RUNTIME_DIR": str(runtime)}):
        path = find_path(long)
        assert len(os.fsencode(path)) <= CONTROL_PATH_BYTES and path.parent == runtime / "tscale-fed"
        assert (await AsyncControlClient(long).snapshot()).step > 0
        assert (long / POINTER_NAME).exists()
    (runtime / "tscale-fed").chmod(0o755)
    with pytest.raises(Refused, match="not a directory of yours alone"):
        async with serving(long, environment={"XDG_RUNTIME_DIR": str(runtime)}):
            pass


@pytest.mark.parametrize(
    ("request_line", "code"),
    [
        (b"\n", b"bad-request"),
        (b"{}\n", b"bad-request"),
        (b'{"command": 3}\n', b"bad-request"),
        (b'{"command": "snapshot", "more": 1}\n', b"bad-request"),
        (b"\xff\xfe\n", b"bad-request"),
        (b'"' + b"x" * (CONTROL_REQUEST_BYTES * 2), b"too-large"),
        (b'{"command": "' + b"y" * 200 + b'"}\n', b"unknown-command"),
    ],
    ids=["empty", "no-command", "wrong-type", "extra-field", "not-utf8", "too-long", "unknown"],
)
async def test_bad_requests_are_answered_and_harmless(home: Path, request_line: bytes, code: bytes) -> None:
    async with serving(home):
        assert code in await ask(home, request_line)
        assert (await AsyncControlClient(home).snapshot()).step > 0


async def test_clients_that_leave_at_once(home: Path) -> None:
    async with serving(home):
        for data in (b"", b'{"comm', b'{"command": "subscribe"}\n'):
            _, writer = await asyncio.open_unix_connection(os.fspath(find_path(home)))
            writer.write(data)
            writer.transport.abort()
        assert (await AsyncControlClient(home).snapshot()).step > 0


async def test_too_many_clients(home: Path) -> None:
    async with serving(home):
        path = os.fspath(find_path(home))
        held = [await asyncio.open_unix_connection(path) for _ in range(CONTROL_CLIENTS)]
        with pytest.raises(Refused, match="already watch this peer"):
            await AsyncControlClient(home).snapshot()
        for _, writer in held:
            writer.close()


async def test_a_client_that_never_reads_is_closed_and_blocks_nobody(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CONTROL_WRITE_S", 0.05)
    async with serving(home, FakePeer(200), interval_s=0.001) as server:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(os.fspath(find_path(home)))
            silent.sendall(b'{"command": "subscribe"}\n')
            other = AsyncControlClient(home)
            while not server._clients:
                await other.snapshot()
            while server._clients:
                assert (await other.snapshot()).step > 0
                await asyncio.sleep(0.01)


async def test_commands_may_wait_refuse_or_fail(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CONTROL_COMMAND_S", 0.05)

    async def slow() -> str:
        await asyncio.Event().wait()
        return "never"

    async def quick() -> None:
        return None

    def refusing() -> str:
        raise Refused("not-now", "the peer is joining: wait until it trains")

    server = ControlServer(home, FakePeer(0).snapshot, {"slow": slow, "quick": quick, "refusing": refusing})
    await server.start()
    try:
        client = AsyncControlClient(home)
        assert await client.command("quick") == "done"
        with pytest.raises(Refused, match="wait until it trains"):
            await client.command("refusing")
        with pytest.raises(Refused, match="did not finish 'slow'"):
            await client.command("slow")
    finally:
        await server.close()
        await server.close()


def test_also_on_uvloop(home: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def once() -> int:
        async with serving(home, interval_s=0.01):
            stream: Callable[[], AsyncIterator[object]] = AsyncControlClient(home).subscribe
            return len([snapshot async for snapshot, _ in _limited(stream(), 2)])

    assert uvloop.run(once()) == 2


async def _limited(stream: AsyncIterator[object], count: int) -> AsyncIterator[tuple[object, int]]:
    for index in range(count):
        yield await anext(stream), index
