"""The control socket inside a running peer: hands out snapshots, takes a few commands, of this machine's same user only.

Enters: one request per line, JSON `{"command": "snapshot" | "subscribe" | "stop" | "pause" | "resume"}`, at most 4 KiB.
Leaves: one line of JSON per answer, `{"snapshot": {...}}`, `{"done": "sentence"}` or `{"refused": ["code", "sentence"]}`; after `subscribe`
one snapshot per second until the client goes away.

Training never waits for a client: each has its own task, a snapshot that a slow client has not taken yet is skipped (not queued),
and a client that takes nothing for a few seconds is closed. The client's half is `control_client.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from tscale_fed.control_path import choose_path, peer_uid
from tscale_fed.limits import (
    CONTROL_CLIENTS,
    CONTROL_COMMAND_S,
    CONTROL_IDLE_S,
    CONTROL_REQUEST_BYTES,
    CONTROL_WRITE_S,
    SUBSCRIBE_INTERVAL_S,
)
from tscale_fed.status import Status
from tscale_net.errors import Refused

Command = Callable[[], "str | None | Awaitable[str | None]"]
"""What a command does: called on the event loop, returns (or resolves to) one sentence for people, or None. May raise Refused."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a client asks."""

    command: str


class Reply(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What it gets: exactly one of the three."""

    snapshot: Status | None = None
    done: str | None = None
    refused: tuple[str, str] | None = None


_REQUEST = msgspec.json.Decoder(Request)


def _line(reply: Reply) -> bytes:
    return msgspec.json.encode(reply) + b"\n"


class ControlServer:
    """Serves `snapshot` and `commands` on the control socket of `home` between `start` and `close`.

    `snapshot` must be cheap and must not block; it is called on the event loop. `own_uid` exists for tests.
    """

    def __init__(
        self,
        home: Path,
        snapshot: Callable[[], Status],
        commands: Mapping[str, Command],
        *,
        interval_s: float = SUBSCRIBE_INTERVAL_S,
        environment: Mapping[str, str] | None = None,
        own_uid: int | None = None,
    ) -> None:
        self._home = home
        self._snapshot = snapshot
        self._commands = dict(commands)
        self._interval_s = interval_s
        self._environment = os.environ if environment is None else environment
        self._own_uid = os.getuid() if own_uid is None else own_uid
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> Path:
        """Listen; returns the socket's path. A socket left by a dead peer is replaced: the home lock says that no other peer runs.

        Raises Refused if the directory is not ours, OSError if the file system takes no socket.
        """
        path = choose_path(self._home, self._environment)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(path))
            path.chmod(0o600)
            listener.setblocking(False)
            self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=CONTROL_REQUEST_BYTES)
        except BaseException:
            listener.close()
            raise
        self._path = path
        return path

    async def close(self) -> None:
        """Close all clients and remove the socket. May be called twice."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()  # accepted while we were closing
            return
        task = asyncio.get_running_loop().create_task(self._serve_client(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client until it leaves, falls silent or misbehaves. Swallowed: a connection that breaks, since nobody is left to tell."""
        try:
            refusal = self._refusal_at_the_door(writer)
            if refusal is not None:
                await self._send(writer, Reply(refused=refusal))
                return
            while await self._serve_request(reader, writer):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            writer.transport.abort()
        finally:
            # Closing flushes in the background; not awaited, so that a client that takes nothing cannot hold up the peer's end.
            writer.close()

    def _refusal_at_the_door(self, writer: asyncio.StreamWriter) -> tuple[str, str] | None:
        uid = peer_uid(writer.get_extra_info("socket"))
        if uid is not None and uid != self._own_uid:
            return ("not-ours", "this peer belongs to another user: run tscale-status as that user")
        if len(self._clients) > CONTROL_CLIENTS:
            return ("too-many-clients", f"{CONTROL_CLIENTS} programs already watch this peer: close one of them")
        return None

    async def _serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the client is done with."""
        try:
            data = await asyncio.wait_for(reader.readuntil(b"\n"), CONTROL_IDLE_S)
            request = _REQUEST.decode(data)
        except asyncio.IncompleteReadError:
            return False
        except asyncio.LimitOverrunError:
            await self._send(writer, Reply(refused=("too-large", f"a request is one line of at most {CONTROL_REQUEST_BYTES} bytes")))
            return False
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            await self._send(writer, Reply(refused=("bad-request", f'a request is one line such as {{"command": "snapshot"}}: {error}')))
            return False
        if request.command == "subscribe":
            await self._stream(reader, writer)
            return False
        await self._send(writer, await self._answer(request.command))
        return True

    async def _answer(self, command: str) -> Reply:
        if command == "snapshot":
            return Reply(snapshot=self._snapshot())
        action = self._commands.get(command)
        if action is None:
            known = ", ".join(["snapshot", "subscribe", *sorted(self._commands)])
            return Reply(refused=("unknown-command", f"this peer knows no command '{command[:40]}'; it knows {known}"))
        try:
            result = action()
            if inspect.isawaitable(result):
                result = await asyncio.wait_for(result, CONTROL_COMMAND_S)
        except Refused as refusal:
            return Reply(refused=(refusal.code, refusal.detail))
        except TimeoutError:
            return Reply(refused=("timeout", f"the peer did not finish '{command}' within {CONTROL_COMMAND_S:.0f} s; it may still do so"))
        return Reply(done=result or "done")

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A snapshot now and every interval, until the client closes its end (or sends anything more)."""
        gone = asyncio.ensure_future(reader.read(1))
        try:
            while not gone.done():
                await self._send(writer, Reply(snapshot=self._snapshot()))
                await asyncio.wait([gone], timeout=self._interval_s)
        finally:
            gone.cancel()

    @staticmethod
    async def _send(writer: asyncio.StreamWriter, reply: Reply) -> None:
        """Raises TimeoutError if the client takes nothing for `CONTROL_WRITE_S`."""
        writer.write(_line(reply))
        await asyncio.wait_for(writer.drain(), CONTROL_WRITE_S)
