"""Hostile peers for the process tests: one that links honestly and then lies, one that speaks CURVE but not the protocol.

Enters: the victim's address and manifest. Leaves: messages that must all be refused, each with the reason code under which it is counted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from tscale_net import frames
from tscale_net.handshake import HelloMaker
from tscale_net.identity import Identity, curve_key_of, public_key_of
from tscale_net.messages import Attach, Hello, HelloBody, Kind, decode, encode
from tscale_net.ports import Channel, SystemClock
from tscale_peers.applied import AppliedSet
from tscale_peers.assembly import RunTerms
from tscale_peers.manifest import RunManifest
from tscale_peers.messages import HAVE, PACKET, RECORDS, SUMMARY, WANT, Range, Ranges, Records, Summary
from tscale_peers.packet import PACKET_VERSION, Header, Packet
from tscale_peers.records import PeerRecord, seal

UNKNOWN_KIND = 200


@dataclass(frozen=True, slots=True)
class Lie:
    """One message of an admitted peer, and the code under which it must be refused."""

    what: str
    code: str
    kind: int
    body: bytes
    channel: Channel = Channel.BULK


class Liar:
    """Makes lies for one run, signed with a valid identity where a signature is needed."""

    def __init__(self, manifest: RunManifest, identity: Identity) -> None:
        self.identity = identity
        self._run = RunTerms.of(manifest)
        self._layout = self._run.terms.layout
        chunk = self._layout.chunks[0]
        self._payload = bytes(self._run.terms.codec.max_payload_bytes(chunk))
        self._header = Header(PACKET_VERSION, self._run.run, identity.public_key, 5, 1, 0, 1, 0.5, manifest.codec, 1.0)

    def lies(self) -> Iterator[Lie]:
        yield from self._packets()
        yield from self._gossip()
        yield from self._records()
        yield Lie("a kind from the future", "unknown-kind", UNKNOWN_KIND, b"", Channel.CONTROL)

    # -- packets -----------------------------------------------------------------------------------------------------

    def _packets(self) -> Iterator[Lie]:
        good = self._sealed(self._header)
        flipped = bytes([*good[:-1], good[-1] ^ 1])
        yield self._packet("a flipped bit in the signature", "bad-signature", flipped)
        yield self._packet("a flipped bit in the payload", "bad-signature", good[:-70] + bytes([good[-70] ^ 1]) + good[-69:])
        forged = replace_header(self._header, author=bytes(31) + b"\x01")
        yield self._packet("somebody else's name", "bad-signature", self._sealed(forged))
        yield self._packet("nothing", "packet-truncated", b"")
        yield self._packet("a header length without a header", "packet-truncated", good[:40])
        yield self._packet("half a packet", "packet-truncated", good[: len(good) // 2])
        yield self._packet("a packet and more", "packet-oversized", self._sealed(self._header, self._payload + b"more"))
        yield self._packet("the payload of a smaller chunk", "packet-truncated", self._sealed(self._header, self._payload[:-8]))
        yield self._packet("noise", "packet-malformed", random.Random(1).randbytes(3000))
        yield self._packet("a header that is too long", "packet-malformed", b"\xff\xff" + bytes(70_000))
        for what, code, changes in self._false_headers():
            yield self._packet(what, code, self._sealed(replace_header(self._header, **changes)))
        yield self._packet("scales that no encoder writes", "packet-scale", self._sealed(self._header, b"\xff" * len(self._payload)))

    def _false_headers(self) -> list[tuple[str, str, dict[str, object]]]:
        return [
            ("another run", "wrong-run", {"run": bytes(32)}),
            ("another packet version", "packet-version", {"version": 9}),
            ("a chunk that does not exist", "packet-chunk", {"chunk": len(self._layout.chunks)}),
            ("an unknown codec", "packet-codec", {"codec": "gzip"}),
            ("number 0", "packet-seq", {"seq": 0}),
            ("a number beyond 63 bits", "packet-seq", {"seq": (1 << 64) - 1}),
            ("coefficient NaN", "packet-coefficient", {"coefficient": math.nan}),
            ("coefficient infinite", "packet-coefficient", {"coefficient": math.inf}),
            ("coefficient 0", "packet-coefficient", {"coefficient": 0.0}),
            ("coefficient negative", "packet-coefficient", {"coefficient": -0.5}),
            ("coefficient above the limit", "packet-coefficient", {"coefficient": 1000.0}),
            ("a creation time that is no number", "packet-malformed", {"created_unix": math.nan}),
            ("an author key of 31 bytes", "packet-malformed", {"author": bytes(31)}),
        ]

    def _sealed(self, header: Header, payload: bytes | None = None) -> bytes:
        return Packet.seal(header, self._payload if payload is None else payload, self.identity.sign)

    def _packet(self, what: str, code: str, body: bytes) -> Lie:
        return Lie(f"packet: {what}", code, PACKET, body)

    # -- gossip ------------------------------------------------------------------------------------------------------

    def _gossip(self) -> Iterator[Lie]:
        stream, chunks = bytes(40), len(self._layout.chunks)
        for kind in (HAVE, WANT, SUMMARY):
            yield Lie(f"gossip {kind}: noise", "bad-message", kind, b"\xc1noise", Channel.CONTROL)
        for what, wrong in {
            "a chunk beyond the run": Range(stream, 1, 0, chunks),
            "a range that runs backwards": Range(stream, 1, 3, 1),
            "number 0": Range(stream, 0, 0, 0),
            "a short stream key": Range(b"short", 1, 0, 0),
        }.items():
            yield Lie(f"gossip: {what}", "bad-message", HAVE, Ranges([wrong]).encode(), Channel.CONTROL)
        encode_summary = msgspec.msgpack.encode
        yield Lie("summary: a short digest", "bad-message", SUMMARY, encode_summary(Summary(b"x", b"")), Channel.CONTROL)
        noise = encode_summary(Summary(bytes(32), random.Random(2).randbytes(300)))
        yield Lie("summary: noise for a set", "bad-applied-set", SUMMARY, noise)
        other = AppliedSet(chunks + 1)
        other.add(stream, 1, chunks)
        yield Lie("summary: the set of another layout", "bad-applied-set", SUMMARY, encode_summary(Summary(bytes(32), other.encode())))

    # -- records -----------------------------------------------------------------------------------------------------

    def _records(self) -> Iterator[Lie]:
        me = self.identity
        record = PeerRecord(self._run.run, me.public_key, 1, 1, 1.0, "liar", "peer", (), 0, 0, 0, 0.0, 0.0, b"", b"", False)
        sealed = seal(record, me.sign)
        for what, code, told in [
            ("noise", "bad-record", random.Random(3).randbytes(200)),
            ("a flipped bit", "bad-signature", bytes([sealed[0] ^ 1]) + sealed[1:]),
            ("another run", "wrong-run", seal(msgspec.structs.replace(record, run=bytes(32)), me.sign)),
            ("a rate of NaN", "bad-record", seal(msgspec.structs.replace(record, tokens_per_s=math.nan), me.sign)),
            ("a rate beyond all machines", "bad-record", seal(msgspec.structs.replace(record, tokens_per_s=1e300), me.sign)),
            ("a name that moves the cursor", "bad-record", seal(msgspec.structs.replace(record, name="\x1b[2J"), me.sign)),
        ]:
            yield Lie(f"record: {what}", code, RECORDS, msgspec.msgpack.encode(Records([told])), Channel.CONTROL)


def replace_header(header: Header, **changes: object) -> Header:
    return msgspec.structs.replace(header, **changes)


class FrameAttacker:
    """An honest handshake, then whatever it likes, without the checks that the transport makes before it sends."""

    def __init__(self, host: str, port: int, peer_id: str, identity: Identity, run: bytes) -> None:
        self.identity = identity
        self._run = run
        self._victim = public_key_of(peer_id)
        self._context = zmq.asyncio.Context()
        self._endpoint = f"tcp://{host}:{port}"
        self._sockets: list[zmq.asyncio.Socket] = []

    def connect(self) -> zmq.asyncio.Socket:
        made = self._context.socket(zmq.DEALER)
        made.linger = 0
        made.curve_publickey, made.curve_secretkey = self.identity.curve_public, self.identity.curve_secret
        made.curve_serverkey = curve_key_of(self._victim)
        made.connect(self._endpoint)
        self._sockets.append(made)
        return made

    async def join(self) -> tuple[zmq.asyncio.Socket, bytes]:
        """(control connection, session id) of a session that stands."""
        control, bulk = self.connect(), self.connect()
        hello = HelloMaker(self.identity, SystemClock(), "attacker").make(self._victim, self._run).wire
        await say(control, Kind.HELLO, hello, 0)
        answer = await control.recv_multipart()
        session = decode(HelloBody, decode(Hello, answer[1]).body).session
        await say(bulk, Kind.ATTACH, encode(Attach(session)), 0)
        await bulk.recv_multipart()
        return control, session

    def close(self) -> None:
        for made in self._sockets:
            made.close(linger=0)
        self._context.term()


async def say(wire: zmq.asyncio.Socket, kind: int, body: bytes, sequence: int, session: bytes = frames.NO_SESSION) -> None:
    await wire.send_multipart([frames.encode_header(kind, sequence, session, len(body)), body])
