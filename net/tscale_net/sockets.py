"""ZeroMQ sockets as this room needs them: every option set, no default trusted.

Enters: a context and keys. Leaves: configured sockets. The defaults of libzmq (no message limit, 1000 messages of queue, endless linger and
reconnect) are made for trusted networks; why each value is what it is stands in limits.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

import zmq
import zmq.asyncio

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.identity import Identity
from tscale_net.ports import Channel

ZAP_DOMAIN = b"tscale-fed"


def new_context() -> zmq.asyncio.Context:
    """A context of its own for one transport, since the admission endpoint is one per context. Raises Refused("old-libzmq")."""
    if zmq.zmq_version_info() < limits.LIBZMQ_MIN or not zmq.has("curve"):
        wanted = ".".join(str(part) for part in limits.LIBZMQ_MIN)
        raise Refused("old-libzmq", f"libzmq {zmq.zmq_version()} is installed; {wanted} with CURVE is needed. Run: pip install -U pyzmq")
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, limits.CONTEXT_SOCKETS)
    return context


def _common(made: zmq.asyncio.Socket, high_water: int) -> zmq.asyncio.Socket:
    made.linger = 0
    made.maxmsgsize = limits.MESSAGE_BYTES
    made.sndhwm = high_water
    made.rcvhwm = high_water
    made.handshake_ivl = limits.HANDSHAKE_MS
    made.heartbeat_ivl = limits.HEARTBEAT_MS
    made.heartbeat_timeout = limits.HEARTBEAT_TIMEOUT_MS
    made.heartbeat_ttl = limits.HEARTBEAT_TIMEOUT_MS
    made.tcp_maxrt = limits.RETRANSMIT_LIMIT_MS
    made.ipv6 = True
    return made


def router(context: zmq.asyncio.Context, identity: Identity) -> zmq.asyncio.Socket:
    """The listening socket: a CURVE server that says so when a message cannot be queued, and chooses routing ids itself."""
    made = _common(context.socket(zmq.ROUTER), limits.ROUTER_HIGH_WATER_MESSAGES)
    made.router_mandatory = True
    made.router_handover = False
    made.backlog = limits.LISTEN_BACKLOG
    made.zap_domain = ZAP_DOMAIN
    made.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
    made.curve_server = True
    made.curve_secretkey = identity.curve_secret
    return made


def dealer(context: zmq.asyncio.Context, identity: Identity, server_key: bytes, channel: Channel) -> zmq.asyncio.Socket:
    """One of the two sockets to a dialled peer. It does not reconnect by itself: a lost connection is a lost link."""
    control = channel is Channel.CONTROL
    high_water = limits.CONTROL_HIGH_WATER_MESSAGES if control else limits.BULK_HIGH_WATER_MESSAGES
    made = _common(context.socket(zmq.DEALER), high_water)
    made.immediate = True
    made.reconnect_ivl = -1
    made.connect_timeout = limits.CONNECT_TIMEOUT_MS
    if control:
        made.sndbuf = limits.CONTROL_SEND_BUFFER_BYTES
    made.curve_publickey = identity.curve_public
    made.curve_secretkey = identity.curve_secret
    made.curve_serverkey = server_key
    return made


def endpoint(host: str, port: int) -> str:
    """ZeroMQ's spelling of an IP address and port."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound, listening TCP socket for handing to libzmq or asyncio. Raises OSError.

    libzmq has no option for TCP congestion control; accepted connections inherit it from a listening socket made here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ask_congestion_control(made)
        made.bind((host, port))
        made.listen(limits.LISTEN_BACKLOG)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


def ask_congestion_control(connection: socket.socket) -> None:
    """Switch to the congestion control that copes with loss, where the system has it and allows it; otherwise keep the default."""
    option = getattr(socket, "TCP_CONGESTION", None)
    if option is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, option, limits.CONGESTION_CONTROL)


def ask_congestion_control_of(descriptor: int) -> None:
    """The same for a connection inside libzmq, by its descriptor; a connection that is gone is left alone."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        ask_congestion_control(connection)


def listening_pair(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Listening sockets on a port (links) and the next (hello door); port 0 takes the next free pair from the default on.

    Raises Refused("port-taken" or "cannot-listen").
    """
    if port:
        links = _listen_or_refuse(host, port)
        try:
            return links, _listen_or_refuse(host, port + 1)
        except Refused:
            links.close()
            raise
    for candidate in range(limits.DEFAULT_PORT, limits.DEFAULT_PORT + 2 * limits.PORT_PAIRS_TRIED, 2):
        try:
            return listening_pair(host, candidate)
        except Refused as refusal:
            if refusal.code != "port-taken":
                raise
    last = limits.DEFAULT_PORT + 2 * limits.PORT_PAIRS_TRIED - 1
    raise Refused("port-taken", f"No two free ports in a row between {limits.DEFAULT_PORT} and {last} on {host}. Choose one with --listen.")


def _listen_or_refuse(host: str, port: int) -> socket.socket:
    if port > 65535:
        raise Refused("cannot-listen", f"There is no port {port}; the hello door takes the port after the links. Choose a lower one.")
    try:
        return listening_socket(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fix = f"Stop what listens there (`ss -ltnp | grep {port}`), or choose another port with --listen {host}:PORT."
            raise Refused("port-taken", f"Port {port} on {host} is in use. {fix}") from error
        why = (error.strerror or str(error)).lower()
        raise Refused("cannot-listen", f"Cannot listen on {host}:{port} ({why}). Use an address of this machine, or 0.0.0.0.") from error
