"""A CurveZMQ client by hand (ZeroMQ RFCs 23 and 26), for what libzmq's own sockets refuse to send: parts of a message that never ends."""

from __future__ import annotations

import socket
import struct

from nacl.bindings import crypto_box_beforenm, crypto_box_easy_afternm, crypto_box_keypair, crypto_box_open_easy_afternm
from zmq.utils import z85

from tscale_net.identity import Identity

_COMMAND, _LONG = 0x04, 0x02
_MORE = 0x01


class RawCurve:
    """One connection of `identity` to the CURVE server with the z85 key `server_key`; blocking."""

    def __init__(self, host: str, port: int, identity: Identity, server_key: bytes) -> None:
        self.connection = socket.create_connection((host, port), timeout=10)
        self._counter = 0
        self._handshake(z85.decode(identity.curve_public), z85.decode(identity.curve_secret), z85.decode(server_key))

    def _handshake(self, public: bytes, secret: bytes, server: bytes) -> None:
        self.connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31))
        self._exactly(64)
        short_public, short_secret = crypto_box_keypair()
        nonce = self._nonce()
        hello_key = crypto_box_beforenm(server, short_secret)
        box = crypto_box_easy_afternm(bytes(64), b"CurveZMQHELLO---" + nonce, hello_key)
        self._command(b"\x05HELLO\x01\x00" + bytes(72) + short_public + nonce + box)
        welcome = self._frame()
        assert welcome[:8] == b"\x07WELCOME"
        opened = crypto_box_open_easy_afternm(welcome[24:], b"WELCOME-" + welcome[8:24], hello_key)
        server_short, cookie = opened[:32], opened[32:]
        self._key = crypto_box_beforenm(server_short, short_secret)
        vouch_nonce = bytes(16)
        vouch = crypto_box_easy_afternm(short_public + server, b"VOUCH---" + vouch_nonce, crypto_box_beforenm(server_short, secret))
        metadata = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER" + b"\x08Identity" + struct.pack(">I", 0)
        nonce = self._nonce()
        box = crypto_box_easy_afternm(public + vouch_nonce + vouch + metadata, b"CurveZMQINITIATE" + nonce, self._key)
        self._command(b"\x08INITIATE" + cookie + nonce + box)
        assert self._frame()[:6] == b"\x05READY"

    def send(self, part: bytes, more: bool) -> None:
        """One part of a message."""
        nonce = self._nonce()
        box = crypto_box_easy_afternm(bytes([_MORE if more else 0]) + part, b"CurveZMQMESSAGEC" + nonce, self._key)
        body = b"\x07MESSAGE" + nonce + box
        self.connection.sendall(bytes([_LONG]) + struct.pack(">Q", len(body)) + body)

    def receive(self) -> bytes:
        """One part of an answer."""
        body = self._frame()
        return crypto_box_open_easy_afternm(body[16:], b"CurveZMQMESSAGES" + body[8:16], self._key)[1:]

    def _nonce(self) -> bytes:
        self._counter += 1
        return struct.pack(">Q", self._counter)

    def _command(self, body: bytes) -> None:
        header = bytes([_COMMAND, len(body)]) if len(body) < 256 else bytes([_COMMAND | _LONG]) + struct.pack(">Q", len(body))
        self.connection.sendall(header + body)

    def _frame(self) -> bytes:
        flags = self._exactly(1)[0]
        size = struct.unpack(">Q", self._exactly(8))[0] if flags & _LONG else self._exactly(1)[0]
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            more = self.connection.recv(size - len(got))
            if not more:
                raise ConnectionResetError("closed by the server")
            got += more
        return got
