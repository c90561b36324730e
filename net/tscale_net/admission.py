"""Who may finish the encryption handshake: asked by libzmq for every new connection, before any of its messages is delivered.

Enters: the CURVE key of a connection (ZAP, ZeroMQ RFC 27). Leaves: yes with the key as user id, or 400. The user id rides on every message
of that connection and is the only truth about who sent it. Policies: open (anybody who is not banned) or a list of peer ids.
"""

from __future__ import annotations

import zmq
import zmq.asyncio
from zmq.utils import z85

from tscale_net import limits
from tscale_net.identity import curve_key_of, public_key_of
from tscale_net.ports import Clock, PeerId

_ENDPOINT = "inproc://zeromq.zap.01"
_PARTS_WITH_CURVE_KEY = 9


class Admission:
    """Answers libzmq's questions; holds the bans."""

    def __init__(self, clock: Clock, allowed: frozenset[PeerId] | None = None) -> None:
        self._clock = clock
        self._allowed = None if allowed is None else frozenset(curve_key_of(public_key_of(peer)) for peer in allowed)
        self._banned_until_s: dict[bytes, float] = {}
        self._socket: zmq.asyncio.Socket | None = None

    def start(self, context: zmq.asyncio.Context) -> None:
        """Begin to answer; must come before any listening socket of the context."""
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(_ENDPOINT)

    async def run(self) -> None:
        """Answer until cancelled. A decision is made at once, so that no slow one can hold up the handshakes of others."""
        assert self._socket is not None
        while True:
            request = await self._socket.recv_multipart()
            if len(request) < 4:
                continue  # only libzmq itself reaches an inproc endpoint; nothing can be answered without a request id
            admitted, key = self._decide(request)
            status, text = (b"200", b"OK") if admitted else (b"400", b"not admitted")
            await self._socket.send_multipart([request[0], b"", request[2], request[3], status, text, key, b""])

    def _decide(self, request: list[bytes]) -> tuple[bool, bytes]:
        if len(request) != _PARTS_WITH_CURVE_KEY or request[2] != b"1.0" or request[7] != b"CURVE" or len(request[8]) != 32:
            return False, b""
        key = z85.encode(request[8])
        if self._allowed is not None and key not in self._allowed:
            return False, b""
        return self.ban_left_s(key) <= 0, key

    def ban(self, peer: PeerId, seconds: float) -> None:
        """Admit no new connection of a peer for a while."""
        if len(self._banned_until_s) >= limits.BANS:
            del self._banned_until_s[min(self._banned_until_s, key=lambda key: self._banned_until_s[key])]
        self._banned_until_s[curve_key_of(public_key_of(peer))] = self._clock.now() + seconds

    def ban_left_s(self, curve_key: bytes) -> float:
        """Seconds for which a key (z85) is still refused; 0 if it is not."""
        until_s = self._banned_until_s.get(curve_key)
        if until_s is None:
            return 0.0
        if until_s <= self._clock.now():
            del self._banned_until_s[curve_key]
            return 0.0
        return until_s - self._clock.now()

    def close(self) -> None:
        """Stop; new handshakes fail."""
        if self._socket is not None:
            self._socket.close()
