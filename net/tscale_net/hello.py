"""The hello door: a small TCP service on the port after the links', for those who know a host and port but not yet whose.

Enters: one request of at most 1 KiB. Leaves: one signed answer: whose door this is, which run, and the asker's address as seen from here.
Rules: one request, one answer, close; 3 s; so many open, so many per second and IP; nothing is kept about the asker. The answer is
signed with the asker's nonce in it, but it proves only that the answerer owns the key that it names: whether that is the right one, the
asker has to know (an id in the address) or to decide at first contact (address_book.py).
Both directions: 2 bytes length, little-endian, then msgpack.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import OrderedDict
from collections.abc import Callable

from tscale_net import limits
from tscale_net.address import Address, is_loopback
from tscale_net.errors import Refused
from tscale_net.identity import Identity, verify
from tscale_net.messages import DOOR_DOMAIN, DoorBody, DoorHead, DoorReply, DoorRequest, check_versions, decode, encode
from tscale_net.ports import Clock
from tscale_net.token_bucket import TokenBucket

_LENGTH_BYTES = 2


class HelloDoor:
    """The answering side. `run` is asked at every answer, since a newcomer learns it late."""

    def __init__(
        self, identity: Identity, clock: Clock, name: str, link_port: int, run: Callable[[], bytes], on_refused: Callable[[str, str], None]
    ) -> None:
        self._identity = identity
        self._clock = clock
        self._name = name
        self._link_port = link_port
        self._run = run
        self._on_refused = on_refused
        self._server: asyncio.Server | None = None
        self._open = 0
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    async def start(self, listening: socket.socket) -> None:
        """Begin to answer on a listening socket."""
        self._server = await asyncio.start_server(self._visit, sock=listening, limit=limits.DOOR_REQUEST_BYTES * 2)

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = writer.get_extra_info("peername")
        host, port = (str(name[0]), int(name[1])) if name else ("unknown", 0)
        self._open += 1
        try:
            if self._open > limits.DOOR_OPEN or not self._may_ask(host):
                raise Refused("too-many", f"{host} asks the hello door too often; it may try again in a second.")
            async with asyncio.timeout(limits.DOOR_TIMEOUT_S):
                request = decode(DoorRequest, await _read(reader, limits.DOOR_REQUEST_BYTES))
                observed = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                _write(writer, self._answer(request, observed))
                await writer.drain()
        except Refused as refusal:
            self._on_refused(refusal.code, refusal.detail)
        except TimeoutError:
            self._on_refused("no-hello", f"{host} opened the hello door and asked nothing in time.")
        except OSError:
            pass  # the asker went away; nothing of it is kept
        finally:
            self._open -= 1
            writer.close()

    def _may_ask(self, host: str) -> bool:
        if is_loopback(host):
            return True
        bucket = self._buckets.get(host)
        if bucket is None:
            bucket = self._buckets[host] = TokenBucket(limits.DOOR_REQUESTS_PER_S, self._clock, limits.DOOR_REQUESTS_PER_S)
            if len(self._buckets) > limits.DOOR_TRACKED_IPS:
                self._buckets.popitem(last=False)
        return bucket.try_take(1.0)

    def _answer(self, request: DoorRequest, observed: str) -> bytes:
        body = encode(
            DoorBody(
                public_key=self._identity.public_key,
                nonce=request.nonce,
                unix_ms=int(self._clock.wall() * 1000),
                protocol_min=limits.PROTOCOL_MIN,
                protocol_max=limits.PROTOCOL_MAX,
                run=self._run(),
                name=self._name,
                link_port=self._link_port,
                observed=observed,
            )
        )
        return encode(DoorReply(body, self._identity.sign(DOOR_DOMAIN, body)))

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.close()


async def ask(target: Address, hosts: list[str]) -> DoorBody:
    """Ask the door of `target` (its port plus one) at the first of `hosts` that answers.

    Raises Refused("needs-id") if none does, saying what was tried, and Refused("bad-signature", "version", "bad-message") for bad answers.
    """
    port = target.port + 1
    request = DoorRequest(limits.PROTOCOL_MIN, limits.PROTOCOL_MAX, secrets.token_bytes(limits.NONCE_BYTES))
    tried: list[str] = []
    for host in hosts:
        try:
            async with asyncio.timeout(limits.DOOR_TIMEOUT_S):
                return await _ask_host(host, port, request, target)
        except TimeoutError:
            tried.append(f"{host} port {port}: no answer within {limits.DOOR_TIMEOUT_S:.0f} s")
        except (OSError, EOFError) as error:
            why = "connection refused" if isinstance(error, ConnectionRefusedError) else (str(error) or "closed without an answer").lower()
            tried.append(f"{host} port {port}: {why}")
        except Refused as refusal:
            if refusal.code != "truncated":
                raise
            tried.append(f"{host} port {port}: closed without an answer")
    detail = f"Nobody at {target.host_port} says who it is. Tried its hello door at {'; '.join(tried)}. "
    fix = f"Check that the peer runs and that ports {target.port} and {port} are open, or use its full address ID@{target.host_port}."
    raise Refused("needs-id", detail + fix)


async def _ask_host(host: str, port: int, request: DoorRequest, target: Address) -> DoorBody:
    reader, writer = await asyncio.open_connection(host, port, limit=limits.DOOR_REPLY_BYTES * 2)
    try:
        _write(writer, encode(request))
        reply = decode(DoorReply, await _read(reader, limits.DOOR_REPLY_BYTES))
    finally:
        writer.close()
    head = decode(DoorHead, reply.body)
    if head.nonce != request.nonce or not verify(head.public_key, DOOR_DOMAIN, reply.body, reply.signature):
        raise Refused("bad-signature", f"The hello door of {target.host_port} gave an answer that is not signed by the key it names.")
    check_versions(head)
    return decode(DoorBody, reply.body)


async def _read(reader: asyncio.StreamReader, limit: int) -> bytes:
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
        if length > limit:
            raise Refused("too-large", f"A message of {length} bytes at the hello door is over {limit}.")
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise Refused("truncated", "The other side of a hello door closed before its message was complete.") from error


def _write(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(len(message).to_bytes(_LENGTH_BYTES, "little") + message)
