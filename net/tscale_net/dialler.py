"""Two encrypted connections to a dialled peer, up to the point where the session stands.

Enters: a resolved address, the peer's id, this peer's HELLO. Leaves: `Dialled` with both connections, or Refused with one sentence that
says what was tried, what happened, and what to check.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from tscale_net import limits
from tscale_net.address import Address
from tscale_net.errors import REASONS, Refused
from tscale_net.handshake import HelloGate, HelloMaker
from tscale_net.identity import Identity, curve_key_of, public_key_of
from tscale_net.messages import Attach, Bye, HelloBody, Kind, decode, encode
from tscale_net.ports import Channel, PeerId
from tscale_net.sockets import ask_congestion_control_of, dealer, endpoint
from tscale_net.wire import DealerWire

_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)
_FAMILIES = {"ip4": socket.AF_INET, "dns4": socket.AF_INET, "ip6": socket.AF_INET6, "dns6": socket.AF_INET6, "": socket.AF_UNSPEC}
_NETWORK_PROBLEMS = {
    errno.ECONNREFUSED: "nothing listens there (connection refused); check the port and that the peer runs",
    errno.EHOSTUNREACH: "there is no route to that host; check the address and your network",
    errno.ENETUNREACH: "there is no route to that network; check your connection (and IPv6, if that was used)",
}


class Dealing:
    """One dialled connection with its monitor."""

    def __init__(self, context: zmq.asyncio.Context, identity: Identity, server_key: bytes, channel: Channel) -> None:
        self.socket = dealer(context, identity, server_key, channel)
        self.wire = DealerWire(self.socket, channel)
        self._monitor = self.socket.get_monitor_socket(_EVENTS)
        self.wire.before_close = self._stop_monitor

    async def handshake(self) -> None:
        """Wait until the encryption handshake is finished. Raises Refused; "unreachable" if there was no TCP connection at all."""
        connected = False
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            match event["event"]:
                case zmq.EVENT_CONNECTED:
                    connected = True
                    ask_congestion_control_of(int(event["value"]))
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    raise Refused("not-admitted")
                case _ if connected:
                    raise Refused("wrong-key")
                case _:
                    raise Refused("unreachable")

    async def lost(self) -> None:
        """Returns when the connection ends."""
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            if event["event"] in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                return

    def _stop_monitor(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)


@dataclass(slots=True)
class Dialled:
    """A session that stands, seen from the dialling side."""

    hello: HelloBody
    dealings: dict[Channel, Dealing]


class Dialler:
    """Makes sessions with peers whose id is known."""

    def __init__(self, context: zmq.asyncio.Context, identity: Identity, maker: HelloMaker, gate: HelloGate) -> None:
        self._context = context
        self._identity = identity
        self._maker = maker
        self._gate = gate

    async def dial(self, target: Address, peer: PeerId, run: bytes, hello_sent: Callable[[], None]) -> Dialled:
        """Try the target's addresses one after the other. `hello_sent` is called when the peer may have heard of this dial.

        Raises Refused. Cancellation closes everything.
        """
        tried: list[str] = []
        for host in await resolve(target):
            try:
                return await self._dial_host(host, target, peer, run, hello_sent)
            except Refused as refusal:
                if refusal.code != "unreachable":
                    raise
                tried.append(f"{host} port {target.port}: {await probe(host, target.port)}")
        raise Refused("unreachable", f"{target.host_port} cannot be reached. Tried {'; '.join(tried)}.")

    async def _dial_host(self, host: str, target: Address, peer: PeerId, run: bytes, hello_sent: Callable[[], None]) -> Dialled:
        public_key = public_key_of(peer)
        server_key = curve_key_of(public_key)
        dealings = {channel: Dealing(self._context, self._identity, server_key, channel) for channel in Channel}
        try:
            await self._connect(dealings, endpoint(host, target.port), target, peer)
            sent = self._maker.make(public_key, run)
            control, bulk = dealings[Channel.CONTROL].wire, dealings[Channel.BULK].wire
            try:
                async with asyncio.timeout(limits.HELLO_TIMEOUT_S):
                    hello_sent()
                    await control.send(Kind.HELLO, sent.wire)
                    answer = await _answer(control, Kind.HELLO)
                    hello = self._gate.check(answer, server_key, run, reply_to=sent.nonce, expected=peer)
                    if hello.session != sent.session:
                        raise Refused("bad-hello", f"{target.host_port} answered for another session.")
                    await bulk.send(Kind.ATTACH, encode(Attach(sent.session)))
                    await _answer(bulk, Kind.ATTACHED)
            except TimeoutError:
                detail = f"{target.host_port} encrypts but did not answer HELLO within {limits.HELLO_TIMEOUT_S:.0f} s. Try again later."
                raise Refused("no-answer", detail) from None
        except BaseException:
            for dealing in dealings.values():
                dealing.wire.close()
            raise
        return Dialled(hello, dealings)

    async def _connect(self, dealings: dict[Channel, Dealing], where: str, target: Address, peer: PeerId) -> None:
        try:
            async with asyncio.timeout(limits.CONNECT_TIMEOUT_S):
                for dealing in dealings.values():
                    dealing.socket.connect(where)
                for dealing in dealings.values():
                    await dealing.handshake()
        except TimeoutError:
            raise Refused("unreachable") from None
        except Refused as refusal:
            match refusal.code:
                case "wrong-key":
                    detail = f"{target.host_port} accepted the connection but not the handshake: it is not {peer}, or no tscale-fed peer. "
                    raise Refused("wrong-key", detail + "Check port and id in the address.") from None
                case "not-admitted":
                    detail = f"{target.host_port} does not admit this identity: it is banned there, or not on its list. Ask its owner."
                    raise Refused("not-admitted", detail) from None
            raise


async def _answer(wire: DealerWire, wanted: Kind) -> bytes:
    header, body = await wire.receive()
    if header.kind == Kind.BYE:
        bye = decode(Bye, body)
        detail = "".join(character if character.isprintable() else "?" for character in bye.detail)
        raise Refused(bye.code if bye.code in REASONS else "bad-hello", f"The peer refused: {detail}")
    if header.kind != wanted:
        raise Refused("bad-hello", f"The peer answered with a message of kind {header.kind} instead of {wanted.name}.")
    return body


async def resolve(target: Address) -> list[str]:
    """IP addresses of a target, IPv4 first. Raises Refused("unreachable")."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(limits.RESOLVE_TIMEOUT_S):
            found = await loop.getaddrinfo(target.host, target.port, family=_FAMILIES[target.kind], type=socket.SOCK_STREAM)
    except TimeoutError:
        why = f"the name server did not answer within {limits.RESOLVE_TIMEOUT_S:.0f} s"
        raise Refused("unreachable", f"The host name {target.host} could not be resolved ({why}). Check your network.") from None
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror.lower() if isinstance(error, socket.gaierror) and error.strerror else "not a host name"
        raise Refused("unreachable", f"The host name {target.host} could not be resolved ({why}). Check its spelling.") from error
    hosts = dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET))
    return list(hosts)[: limits.ADDRESSES_PER_PEER]


async def probe(host: str, port: int) -> str:
    """Why no connection to host and port comes about, in words; asked of the system after libzmq failed, which does not tell."""
    try:
        async with asyncio.timeout(limits.PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
        return "connected now, but not before; try again"
    except TimeoutError:
        waited_s = limits.CONNECT_TIMEOUT_S + limits.PROBE_TIMEOUT_S
        return f"no answer within {waited_s:.0f} s; check the address, that the peer runs, and that a firewall or router lets the port in"
    except OSError as error:
        return _NETWORK_PROBLEMS.get(error.errno or 0, (os.strerror(error.errno) if error.errno else str(error)).lower())
