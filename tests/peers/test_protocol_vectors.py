"""The wire forms as frozen bytes: the worked example of docs/protocol.md. A change here is a change of the protocol, with a new version.

`python tests/peers/test_protocol_vectors.py` prints the bytes of this program, in the form of the table below.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from tscale_net import frames, messages
from tscale_net.blobs import root_of
from tscale_net.identity import Identity, curve_key_of, public_key_of, verify
from tscale_peers import snapshot_chunk
from tscale_peers.applied import AppliedSet
from tscale_peers.applied_wire import decode_entries, encode_entries
from tscale_peers.assembly import RunTerms
from tscale_peers.basepoint import Replica
from tscale_peers.layout import TensorSpec
from tscale_peers.manifest import RunManifest
from tscale_peers.messages import Ranges, Records, SetPart, Summary, decode_ranges, decode_records, decode_set_part, decode_summary
from tscale_peers.packet import PACKET_VERSION, Header, Packet, stream_key
from tscale_peers.records import PeerRecord, open_sealed, seal

AUTHOR = Identity.from_seed(bytes(range(32)))
OTHER = Identity.from_seed(bytes(range(32, 64)))
STREAM, SEQ, BATCHES, COEFFICIENT, WALL = 258, 3, 15, 0.5, 1_700_000_000.5
TENSORS = [TensorSpec("embedding", 2, 8, -20), TensorSpec("final", 1, 16, -18)]
START = torch.arange(32, dtype=torch.float32) / 64 - 0.25
NONCE, SESSION, INSTANCE = b"n" * 16, b"s" * 16, b"i" * 16

FROZEN = {
    "public key": "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8",
    "peer id": (
        "313244334b6f6f574134586f70314a6154334d487877594d6b436570597376346950566f704d5877437a35694859644266655342"
    ),
    "CURVE key": "6d2f2a2426485e2d792b74304f5a2f4953722f4c46595a6c566b79546e6d4e39785463544168492b",
    "frame header": "5453463101010000fd0000000000000000000000000000000000000000000000",
    "HELLO": (
        "92c4b89d0101c42003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8c42029acbae141bccaf0b22e1a94d34d0bc7361e"
        "526d0bfe12c89794bc9322966dd7c4106e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6ecf0000018bcfe56800c400c410696969696969696969696969696969"
        "6901c41073737373737373737373737373737373c4207cde9fd2d1798a2f4413308944de52ab5796aefa38bfe11936effc5d5475c97bab6272617665"
        "2d6f7474657290c4402c463b1fc0d11a134664d9a418e972135d538b0eb128dec4c237fe7e46cd51c95892a304006fbaed2d0558b45c756514545975"
        "24dc45ace45f3ead863aed4f0b"
    ),
    "BLOB_OPEN": "9205a76368756e6b2f30",
    "blob root": "8d74cea56013febc73f97a35305242795058ecb4bd164919d65e67ec1efca239",
    "manifest": (
        "8daa61646d696e5f6b65797391c42003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8ae6275646765745f6261746368"
        "6573cd2710ac6368756e6b5f706172616d73cd0400a5636f646563a47369676eac637265617465645f756e6978cb41d954fc40000000a66c696d6974"
        "7383bc646973706c6163656d656e745f6d61785f6167655f62617463686573cd07d0af6d61785f636f656666696369656e74cb3ff0000000000000ab"
        "6d61785f73747265616d73cd1000a46e616d65a76578616d706c65b37075626c6973685f65766572795f737465707305a472756c6583ad6d6f6d656e"
        "74756d5f6b656570a57368617265a86f776e5f6c65616ba57368617265ab73686172655f7363616c65cb3ff0000000000000aa73746172745f686173"
        "68c420ad1076b2467f2572f389fcbfdd3b05019c9c675ec36e2c853743c73b0354a808a774656e736f72739294a9656d62656464696e670208ec94a5"
        "66696e616c0110eea7747261696e657281a47365656401a776657273696f6e01"
    ),
    "run id": "7cde9fd2d1798a2f4413308944de52ab5796aefa38bfe11936effc5d5475c97b",
    "start hash": "ad1076b2467f2572f389fcbfdd3b05019c9c675ec36e2c853743c73b0354a808",
    "packet": (
        "67009c02c4207cde9fd2d1798a2f4413308944de52ab5796aefa38bfe11936effc5d5475c97bc42003a107bff3ce10be1d70dd18e74bc09967e4d630"
        "9ba50d5f1ddc8664125531b8cd010203000fcb3fe0000000000000a47369676ecb41d954fc40200000c400c400004000002280aa000100251cc6bc0b"
        "435494c12d45d5e42524d74d03a70ed3bef7c7022a3732273504a27aede7c8008dda60fb6c75367cdc8d86463272ba63d8b179e28a99e16a0f1c0e"
    ),
    "basepoint hash": "a13e6431aa353890a467a8544faf2249198bf8262ed7b5ca1d01cf1cbfc0e6f2",
    "applied digest": "89d80b7fcffadada7f0f71ba381cf2aca3d9474231e199a70b013827c6052ad3",
    "applied set": (
        "0105020003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b80201000000000000de0201050701030108010029acbae141"
        "bccaf0b22e1a94d34d0bc7361e526d0bfe12c89794bc9322966dd7010000000000000000020101040000"
    ),
    "digest of the applied set": "ab4a96f5cd26b57f7c8e47c5243cf6648d2a974b05e23ac5b462e966295b5d97",
    "entries of its chunk 3": "010003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b80201000000000000de020200060001",
    "snapshot chunk": (
        "0100000000002e000000010003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b802010000000000000f0102000002fcff"
        "003efcff0082fcff00befcff0002fdff003efdff0082fdff00befdff0000feff0040feff0080feff00c0feff0000ffff0040ffff0080ffff00c0ffff"
        "fcefffff042000000430000004400000045000000460000004700000048000000490000004a0000004b0000004c0000004d0000004e0000004f00000"
        "04000100"
    ),
    "HAVE": (
        "919294c42803a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8020100000000000003000294c42803a107bff3ce10be1d"
        "70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b80201000000000000040000"
    ),
    "SUMMARY": "93c420ab4a96f5cd26b57f7c8e47c5243cf6648d2a974b05e23ac5b462e966295b5d97c400c2",
    "SET_PART": (
        "94c400c400c4660105020003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b80201000000000000de0201050701030108"
        "010029acbae141bccaf0b22e1a94d34d0bc7361e526d0bfe12c89794bc9322966dd7010000000000000000020101040000c2"
    ),
    "record": (
        "02c3852feef048c2b2f48cf5730a8b06565ea007e263209af07a6772c80b3c4853d8d364b20c401f60325af0d96b8045145455be44d382fd5db9383d"
        "501f3301dc0015c4207cde9fd2d1798a2f4413308944de52ab5796aefa38bfe11936effc5d5475c97bc42003a107bff3ce10be1d70dd18e74bc09967"
        "e4d6309ba50d5f1ddc8664125531b8cf0000018bcfe5680009cb41d954fc40200000ab62726176652d6f74746572a47365656491d9502f6970342f31"
        "39322e302e322e312f7463702f373730302f7032702f313244334b6f6f574134586f70314a6154334d487877594d6b436570597376346950566f704d"
        "5877437a356948596442666553420f0fcd3c00cb4080000000000000cb4004000000000000c42089d80b7fcffadada7f0f71ba381cf2aca3d9474231"
        "e199a70b013827c6052ad3c420a13e6431aa353890a467a8544faf2249198bf8262ed7b5ca1d01cf1cbfc0e6f2c2cb000000000000000000cb7ff800"
        "0000000000cb7ff800000000000090"
    ),
}  # fmt: skip


def manifest() -> RunManifest:
    start_hash = replica_of(_manifest(bytes(32))).hash()
    return _manifest(start_hash)


def _manifest(start_hash: bytes) -> RunManifest:
    return RunManifest(
        name="example",
        tensors=TENSORS,
        start_hash=start_hash,
        created_unix=1_700_000_000.0,
        trainer={"seed": 1},
        chunk_params=1024,
        admin_keys=[AUTHOR.public_key],
    ).check()


def replica_of(run: RunManifest) -> Replica:
    """One chunk of three rows and 32 values, at the start weights."""
    replica = RunTerms.of(run).new_replica()
    replica.set_start(START)
    return replica


def displacement() -> torch.Tensor:
    """Row 0 alternates +-2**-10, row 1 is zero, row 2 is 4099 * 2**-17 with its first value negative: sums that fp32 holds exactly."""
    d = torch.zeros(32)
    d[0:8:2], d[1:8:2] = 2.0**-10, -(2.0**-10)
    d[16:] = 4099 * 2.0**-17
    d[16] *= -1
    return d


def packet() -> bytes:
    terms = RunTerms.of(manifest()).terms
    payload = terms.codec.encode(displacement(), terms.layout.chunks[0], COEFFICIENT)
    header = Header(PACKET_VERSION, terms.run, AUTHOR.public_key, STREAM, SEQ, 0, BATCHES, COEFFICIENT, "sign", WALL)
    return Packet.seal(header, payload, AUTHOR.sign)


def applied() -> AppliedSet:
    """Of five chunks: one stream in step at 7, and 9 to 10 beyond a gap in chunk 3; another stream with one packet."""
    found = AppliedSet(5)
    for chunk in range(5):
        for seq in range(1, 8):
            found.add(stream_key(AUTHOR.public_key, STREAM), seq, chunk)
    for seq in (9, 10):
        found.add(stream_key(AUTHOR.public_key, STREAM), seq, 3)
    found.note_batches(stream_key(AUTHOR.public_key, STREAM), 350)
    found.add(stream_key(OTHER.public_key, 1), 1, 0)
    return found


def moved_replica() -> Replica:
    """The start weights and the packet."""
    run = manifest()
    replica = replica_of(run)
    replica.apply(Packet.open(packet(), RunTerms.of(run).terms, verify))
    return replica


def record() -> bytes:
    replica = moved_replica()
    digest, basepoint_hash = replica.state()
    return seal(
        PeerRecord(
            run=manifest().run_id,
            public_key=AUTHOR.public_key,
            incarnation=1_700_000_000_000,
            seq=9,
            created_unix=WALL,
            name="brave-otter",
            role="seed",
            addresses=("/ip4/192.0.2.1/tcp/7700/p2p/" + AUTHOR.peer_id,),
            step=15,
            batches=15,
            tokens=15_360,
            tokens_per_s=512.0,
            train_loss=2.5,
            digest=digest,
            hash=basepoint_hash,
            leaving=False,
        ),
        AUTHOR.sign,
    )


def hello() -> bytes:
    run = manifest().run_id
    said = messages.HelloBody(
        1, 1, AUTHOR.public_key, OTHER.public_key, NONCE, 1_700_000_000_000, b"", INSTANCE, 1, SESSION, run, "brave-otter", []
    )
    body = messages.encode(said)
    return messages.encode(messages.Hello(body, AUTHOR.sign(messages.HELLO_DOMAIN, body)))


def ranges() -> bytes:
    key = stream_key(AUTHOR.public_key, STREAM)
    return Ranges.of([(key, 3, 0), (key, 3, 1), (key, 3, 2), (key, 4, 0)]).encode()


def plain_chunk() -> bytes:
    replica = moved_replica()
    entries = replica.applied.chunk_entries(0)
    listed = encode_entries(entries)
    return snapshot_chunk._HEAD.pack(1, snapshot_chunk.PLAIN, 0, len(listed)) + listed + snapshot_chunk.raw_bytes(replica.basepoint)


BUILT: dict[str, Callable[[], bytes]] = {
    "public key": lambda: AUTHOR.public_key,
    "peer id": lambda: AUTHOR.peer_id.encode(),
    "CURVE key": lambda: AUTHOR.curve_public,
    "frame header": lambda: frames.encode_header(messages.Kind.HELLO, 0, frames.NO_SESSION, len(hello())),
    "HELLO": hello,
    "BLOB_OPEN": lambda: messages.encode(messages.BlobOpen(5, "chunk/0")),
    "blob root": lambda: root_of(5, bytes(range(32))),
    "manifest": lambda: manifest().encode(),
    "run id": lambda: manifest().run_id,
    "start hash": lambda: manifest().start_hash,
    "packet": packet,
    "basepoint hash": lambda: moved_replica().state()[1],
    "applied digest": lambda: moved_replica().state()[0],
    "applied set": lambda: applied().encode(),
    "digest of the applied set": lambda: applied().digest(),
    "entries of its chunk 3": lambda: encode_entries(applied().chunk_entries(3)),
    "snapshot chunk": plain_chunk,
    "HAVE": ranges,
    "SUMMARY": lambda: msgspec.msgpack.encode(Summary(applied().digest(), b"")),
    "SET_PART": lambda: msgspec.msgpack.encode(SetPart(b"", b"", applied().encode())),
    "record": record,
}


@pytest.mark.parametrize("name", BUILT)
def test_wire_form_is_frozen(name: str) -> None:
    assert BUILT[name]().hex() == FROZEN[name]


def frozen(name: str) -> bytes:
    return bytes.fromhex(FROZEN[name])


def test_frozen_bytes_are_read_as_what_they_were_made_from() -> None:
    run = RunManifest.decode(frozen("manifest"), frozen("run id"))
    terms = RunTerms.of(run).terms
    opened = Packet.open(frozen("packet"), terms, verify)
    assert opened.key == (stream_key(AUTHOR.public_key, STREAM), SEQ, 0)
    assert opened.header.batches_total == BATCHES
    assert AppliedSet.decode(frozen("applied set"), 5).encode() == applied().encode()
    assert decode_entries(frozen("entries of its chunk 3"), 2) == applied().chunk_entries(3)
    assert open_sealed(frozen("record"), run.run_id, verify).name == "brave-otter"
    assert decode_ranges(frozen("HAVE"), 3) == [(opened.stream_key, 3, chunk) for chunk in range(3)] + [(opened.stream_key, 4, 0)]
    assert decode_summary(frozen("SUMMARY")).digest == applied().digest()
    assert decode_set_part(frozen("SET_PART")).applied == applied().encode()
    assert decode_records(msgspec.msgpack.encode(Records([frozen("record")]))) == [frozen("record")]
    assert public_key_of(frozen("peer id").decode()) == frozen("public key")
    assert curve_key_of(frozen("public key")) == frozen("CURVE key")


def test_the_packet_moves_the_basepoint_by_the_steps_that_the_page_names() -> None:
    run = manifest()
    before, after = replica_of(run).basepoint, moved_replica().basepoint
    moved = (after - before).tolist()
    assert moved[:8] == [512, -512] * 4
    assert moved[8:16] == [0] * 8
    assert moved[16:] == [-4100] + [4100] * 15


@pytest.mark.parametrize("packing", [snapshot_chunk.PLAIN, snapshot_chunk.PLANES])
def test_both_packings_of_a_snapshot_chunk_are_read(packing: int) -> None:
    """The compressed bytes are not frozen: lz4 may find shorter ones. What must stay is what they unpack to."""
    import lz4.block

    replica = moved_replica()
    data = frozen("snapshot chunk")
    listed = int.from_bytes(data[6:10], "little")
    if packing == snapshot_chunk.PLANES:
        zigzag = [value * 2 if value >= 0 else -value * 2 - 1 for value in replica.basepoint.tolist()]
        planes = b"".join(bytes((value >> shift) & 255 for value in zigzag) for shift in (24, 16, 8, 0))
        data = data[:1] + bytes([packing]) + data[2 : 10 + listed] + lz4.block.compress(planes, store_size=False)
    values, entries = snapshot_chunk.decode(data, 0, 32, torch.int32, 1)
    assert torch.equal(values, replica.basepoint)
    assert entries == replica.applied.chunk_entries(0)


def test_the_page_shows_these_bytes() -> None:
    page = "".join((Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text().split())
    text = {"peer id", "CURVE key"}
    for name, value in FROZEN.items():
        shown = frozen(name).decode() if name in text else value
        assert shown in page, f"docs/protocol.md does not show the {name}"


if __name__ == "__main__":
    for title, build in BUILT.items():
        print(f'    "{title}": "{build().hex()}",')
