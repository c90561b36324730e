"""The other end of the control socket: for `tscale-status`, the demo, tests and scripts.

Enters: a home directory. Leaves: `Status` snapshots, sentences, or `Refused` with what to do. `ControlClient` blocks, `AsyncControlClient`
does not; both open one connection per call, so that a peer that was restarted in between is simply found again.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from tscale_fed.control import Reply, Request
from tscale_fed.control_path import find_path, no_peer
from tscale_fed.limits import CONTROL_ANSWER_S, CONTROL_COMMAND_S, CONTROL_REPLY_BYTES
from tscale_fed.status import Status
from tscale_net.errors import Refused

_REPLY = msgspec.json.Decoder(Reply)
_ANSWER_MARGIN_S = 2.0
"""A command's client waits a little longer than the peer does, to hear the peer's own sentence."""


def _request(command: str) -> bytes:
    return msgspec.json.encode(Request(command)) + b"\n"


def _reply(line: bytes, home: Path) -> Reply:
    """Decode one answer; raises Refused if it is empty (peer gone), a refusal, or of another version."""
    if not line.endswith(b"\n"):
        raise Refused("peer-gone", f"the peer with the home {home} closed the connection: it is stopping or has died")
    try:
        reply = _REPLY.decode(line)
    except msgspec.MsgspecError as error:
        raise Refused("other-version", f"the peer's answer is not understood ({error}): is tscale-status of the same version?") from error
    if reply.refused is not None:
        raise Refused(*reply.refused)
    return reply


def _snapshot_of(reply: Reply) -> Status:
    if reply.snapshot is None:
        raise Refused("other-version", "the peer sent no snapshot: is tscale-status of the same version?")
    return reply.snapshot


def _silent(home: Path, seconds: float) -> Refused:
    return Refused("peer-silent", f"the peer with the home {home} did not answer within {seconds:.0f} s: it may be overloaded or suspended")


class ControlClient:
    """Blocking client of the peer that runs with `home`. All calls raise Refused ("no-peer", "peer-gone", "peer-silent", ...)."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def snapshot(self) -> Status:
        """The peer's state now."""
        with self._asked("snapshot", CONTROL_ANSWER_S) as stream:
            return _snapshot_of(_reply(stream.readline(CONTROL_REPLY_BYTES), self.home))

    def command(self, name: str) -> str:
        """Have the peer do `stop`, `pause` or `resume`; returns its one sentence."""
        with self._asked(name, CONTROL_COMMAND_S + _ANSWER_MARGIN_S) as stream:
            return _reply(stream.readline(CONTROL_REPLY_BYTES), self.home).done or "done"

    def subscribe(self) -> Iterator[Status]:
        """Snapshots, one a second, until the caller stops iterating; ends with Refused when the peer goes away."""
        with self._asked("subscribe", CONTROL_ANSWER_S) as stream:
            while True:
                yield _snapshot_of(_reply(stream.readline(CONTROL_REPLY_BYTES), self.home))

    @contextmanager
    def _asked(self, command: str, wait_s: float) -> Iterator[BinaryIO]:
        path = find_path(self.home)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(wait_s)
            try:
                connection.connect(os.fspath(path))
                connection.sendall(_request(command))
                with connection.makefile("rb") as stream:
                    yield stream
            except TimeoutError as error:
                raise _silent(self.home, wait_s) from error
            except (ConnectionError, FileNotFoundError) as error:
                raise no_peer(self.home) from error


class AsyncControlClient:
    """The same for an event loop. Cancellation closes the connection and leaves nothing behind."""

    def __init__(self, home: Path) -> None:
        self.home = home

    async def snapshot(self) -> Status:
        async with self._asked("snapshot") as reader:
            return _snapshot_of(await self._next(reader, CONTROL_ANSWER_S))

    async def command(self, name: str) -> str:
        async with self._asked(name) as reader:
            return (await self._next(reader, CONTROL_COMMAND_S + _ANSWER_MARGIN_S)).done or "done"

    async def subscribe(self) -> AsyncIterator[Status]:
        async with self._asked("subscribe") as reader:
            while True:
                yield _snapshot_of(await self._next(reader, CONTROL_ANSWER_S))

    async def _next(self, reader: asyncio.StreamReader, wait_s: float) -> Reply:
        try:
            return _reply(await asyncio.wait_for(reader.readline(), wait_s), self.home)
        except TimeoutError as error:
            raise _silent(self.home, wait_s) from error
        except (ConnectionError, ValueError) as error:
            raise Refused("peer-gone", f"the peer with the home {self.home} closed the connection or sent more than a snapshot") from error

    @asynccontextmanager
    async def _asked(self, command: str) -> AsyncIterator[asyncio.StreamReader]:
        path = find_path(self.home)
        try:
            reader, writer = await asyncio.open_unix_connection(os.fspath(path), limit=CONTROL_REPLY_BYTES)
        except (ConnectionError, FileNotFoundError) as error:
            raise no_peer(self.home) from error
        try:
            writer.write(_request(command))
            yield reader
        finally:
            writer.close()
