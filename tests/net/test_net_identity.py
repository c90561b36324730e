"""Identities: ids, derived keys, signatures, key files, friendly names."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr
from net_kit import identity
from zmq.utils import z85

from tscale_net.errors import Refused
from tscale_net.identity import Identity, curve_key_of, friendly_name, load_or_create, peer_id_of, public_key_of, verify
from tscale_net.words import ADJECTIVES, ANIMALS

FIELD_PRIME = 2**255 - 19


def test_peer_id_is_the_one_that_libp2p_gives() -> None:
    # libp2p: identity multihash (00, length 24) of the protobuf of an Ed25519 key (08 01 12 20 and the key of its test vector).
    public_key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    peer_id = peer_id_of(public_key)
    assert peer_id.startswith("12D3KooW") and len(peer_id) == 52
    assert Multiaddr(f"/p2p/{peer_id}").to_bytes().endswith(bytes.fromhex("002408011220") + public_key)


@given(st.binary(min_size=32, max_size=32))
def test_peer_id_round_trip(public_key: bytes) -> None:
    assert public_key_of(peer_id_of(public_key)) == public_key


@given(st.text(max_size=60) | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=52, max_size=52))
def test_other_text_is_no_peer_id(text: str) -> None:
    try:
        assert peer_id_of(public_key_of(text)) == text
    except Refused as refused:
        assert refused.code == "bad-peer-id"


def test_curve_secret_belongs_to_curve_public() -> None:
    from nacl.bindings import crypto_scalarmult_base

    for number in range(1, 40):
        me = identity(number)
        assert z85.encode(crypto_scalarmult_base(z85.decode(me.curve_secret))) == me.curve_public == curve_key_of(me.public_key)


@pytest.mark.parametrize(
    "number", [0, 1, FIELD_PRIME - 1, FIELD_PRIME, FIELD_PRIME + 1, 2, 2**255 - 1], ids=["0", "1", "-1", "p", "p+1", "off-curve", "max"]
)
@pytest.mark.parametrize("sign_bit", [0, 1])
def test_unsafe_keys_are_refused(number: int, sign_bit: int) -> None:
    hostile = (number | sign_bit << 255).to_bytes(32, "little")
    with pytest.raises(Refused) as caught:
        curve_key_of(hostile)
    assert caught.value.code == "bad-key"
    assert not verify(hostile, b"domain", b"anything", bytes(64))


def test_signature_is_bound_to_key_domain_and_message() -> None:
    me, other = identity(1), identity(2)
    signature = me.sign(b"purpose/1", b"message")
    assert verify(me.public_key, b"purpose/1", b"message", signature)
    assert not verify(me.public_key, b"purpose/2", b"message", signature)
    assert not verify(me.public_key, b"purpose/1", b"messagE", signature)
    assert not verify(other.public_key, b"purpose/1", b"message", signature)
    assert not verify(me.public_key, b"purpose/1", b"message", signature[:-1])
    twin = me.public_key[:31] + bytes([me.public_key[31] ^ 0x80])
    assert curve_key_of(twin) == me.curve_public, "a key and its negative share one CURVE key"
    assert not verify(twin, b"purpose/1", b"message", signature)
    for domain in (b"", b"zero\0byte"):
        with pytest.raises(ValueError, match="domain"):
            me.sign(domain, b"message")


def test_identity_does_not_show_its_secret() -> None:
    assert repr(identity(3)) == f"Identity({identity(3).peer_id})"
    with pytest.raises(ValueError, match="32"):
        Identity(b"short")


def test_file_is_made_private_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "home" / "identity.key"
    made = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_or_create(path).peer_id == made.peer_id
    assert os.listdir(path.parent) == ["identity.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    load_or_create(path)
    path.chmod(mode)
    with pytest.raises(Refused, match=f"chmod 600 {path}"):
        load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_damaged_file_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(Refused, match="damaged"):
        load_or_create(path)
    assert path.read_bytes() == content


def test_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = tmp_path / "identity.key"
    path.write_bytes(X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(Refused, match="damaged"):
        load_or_create(path)


def test_place_that_cannot_hold_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Refused) as caught:
        load_or_create(tmp_path / "file" / "identity.key")
    assert caught.value.code == "identity-file"
    with pytest.raises(Refused, match="cannot be read|not a file"):
        load_or_create(tmp_path)


def test_friendly_names_are_stable_and_spread() -> None:
    names = {friendly_name(identity(number).public_key) for number in range(1, 200)}
    assert len(names) > 180
    assert friendly_name(identity(1).public_key) == "witty-cheetah", "a name never changes"
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) > 100
    assert len(set(ANIMALS)) == len(ANIMALS) > 120
