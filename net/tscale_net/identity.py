"""Who a peer is: an Ed25519 key, its libp2p peer id, the CURVE key derived from it, and the file that keeps it.

Enters: a key file or a 32-byte seed. Leaves: `Identity`, which signs, and pure functions between public key, peer id and CURVE key.

Rules
- The peer id is base58btc(00 24 08 01 12 20 | public key), as libp2p names Ed25519 keys.
- The CURVE (X25519) key is the birational image of the Ed25519 key, so that an address with a peer id is enough to dial. The conversion is
  libsodium's: the bare formula accepts small-order and off-curve points. A key and its negative share one CURVE key, therefore every
  session is also signed (handshake.py).
- A signature covers domain | 00 | message: what was signed for one purpose is worthless for another.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

from tscale_net.errors import Refused
from tscale_net.ports import PeerId

_MULTIHASH_PREFIX = bytes.fromhex("002408011220")
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_VALUE = {character: value for value, character in enumerate(_BASE58)}
_FIELD_PRIME = 2**255 - 19
PEER_ID_CHARACTERS = 52
KEY_BYTES = 32
SIGNATURE_BYTES = 64
_KEY_FILE_BYTES = 4096


class Identity:
    """A private key with everything that follows from it. Holds secrets: never log or send it; its repr shows the peer id only."""

    def __init__(self, seed: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if len(seed) != KEY_BYTES:
            raise ValueError(f"an identity seed has {KEY_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._key.public_key().public_bytes_raw()
        """32 bytes, Ed25519."""
        self.peer_id: PeerId = peer_id_of(self.public_key)
        self.curve_public: bytes = curve_key_of(self.public_key)
        """40 bytes, z85 text, as libzmq wants it."""
        self.curve_secret: bytes = _curve_secret(seed, self.public_key)

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity that belongs to 32 secret bytes; always the same one."""
        return cls(seed)

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """64-byte Ed25519 signature over domain | 00 | message. `domain` names the purpose and holds no zero byte."""
        return self._key.sign(_framed(domain, message))

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def verify(public_key: bytes, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` was made by the owner of `public_key` for this purpose. False for unsafe keys and wrong lengths as well."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        curve_key_of(public_key)  # small-order keys "sign" anything
    except Refused:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _framed(domain, message))
    except InvalidSignature:
        return False
    return True


def peer_id_of(public_key: bytes) -> PeerId:
    """libp2p peer id of a 32-byte Ed25519 public key."""
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(public_key)}")
    number = int.from_bytes(_MULTIHASH_PREFIX + public_key, "big")
    text = ""
    while number:
        number, digit = divmod(number, len(_BASE58))
        text = _BASE58[digit] + text
    return "1" + text  # the one leading zero byte


def public_key_of(peer_id: PeerId) -> bytes:
    """The 32-byte Ed25519 key inside a peer id. Raises Refused("bad-peer-id")."""
    problem = Refused("bad-peer-id", f"{peer_id[:60]!r} is not a peer id: 52 characters that start with 12D3KooW are expected.")
    if len(peer_id) != PEER_ID_CHARACTERS or not peer_id.startswith("1"):
        raise problem
    number = 0
    for character in peer_id:
        value = _BASE58_VALUE.get(character)
        if value is None:
            raise problem
        number = number * len(_BASE58) + value
    size = len(_MULTIHASH_PREFIX) + KEY_BYTES
    if number.bit_length() > size * 8:
        raise problem
    raw = number.to_bytes(size, "big")
    if not raw.startswith(_MULTIHASH_PREFIX) or peer_id_of(raw[-KEY_BYTES:]) != peer_id:
        raise problem
    return raw[-KEY_BYTES:]


@lru_cache(maxsize=4096)
def curve_key_of(public_key: bytes) -> bytes:
    """z85 CURVE key (40 bytes) of an Ed25519 public key.

    Raises Refused("bad-key") for wrong lengths, small-order, off-curve and non-canonical points.
    """
    from nacl.bindings import crypto_sign_ed25519_pk_to_curve25519
    from nacl.exceptions import CryptoError
    from zmq.utils import z85

    problem = Refused("bad-key", "The public key is not a safe Ed25519 key; the peer that states it must make a new identity.")
    if len(public_key) != KEY_BYTES:
        raise problem
    if int.from_bytes(public_key, "little") & (2**255 - 1) >= _FIELD_PRIME:
        raise problem
    try:
        curve = crypto_sign_ed25519_pk_to_curve25519(public_key)
    except (CryptoError, RuntimeError) as error:  # PyNaCl raises either, by version
        raise problem from error
    return z85.encode(curve)


def _curve_secret(seed: bytes, public_key: bytes) -> bytes:
    from nacl.bindings import crypto_sign_ed25519_sk_to_curve25519
    from zmq.utils import z85

    return z85.encode(crypto_sign_ed25519_sk_to_curve25519(seed + public_key))


def _framed(domain: bytes, message: bytes) -> bytes:
    if not domain or b"\0" in domain:
        raise ValueError("a signature domain is not empty and holds no zero byte")
    return domain + b"\0" + message


def friendly_name(public_key: bytes) -> str:
    """A word pair such as "brave-otter" for people; always the same for one key, not unique."""
    from blake3 import blake3

    from tscale_net.words import ADJECTIVES, ANIMALS

    digest = blake3(public_key).digest(length=8)
    first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    return f"{ADJECTIVES[first % len(ADJECTIVES)]}-{ANIMALS[second % len(ANIMALS)]}"


def load_or_create(path: Path) -> Identity:
    """The identity kept at `path` (PKCS8 PEM); made there on first use with mode 0600 in a directory of mode 0700.

    Raises Refused("identity-file") if the file can be read by others, is damaged, or cannot be written.
    """
    try:
        return Identity(_read_seed(path))
    except FileNotFoundError:
        return _create(path)


def _create(path: Path) -> Identity:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    identity = Identity(os.urandom(KEY_BYTES))
    pem = identity._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written under another name first: a crash in between must not leave half a key that is refused for ever.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # fails if another process was first: never replaces a key
        except FileExistsError:
            return Identity(_read_seed(path))
        finally:
            os.unlink(temporary)
    except OSError as error:
        raise Refused("identity-file", f"The identity file {path} cannot be created ({_why(error)}). Choose another --home.") from error
    return identity


def _read_seed(path: Path) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno())
            pem = file.read(_KEY_FILE_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Refused("identity-file", f"The identity file {path} cannot be read ({_why(error)}).") from error
    if not stat.S_ISREG(mode.st_mode):
        raise Refused("identity-file", f"{path} is not a file. Move it away; a new identity is made on the next start.")
    if os.name == "posix" and mode.st_mode & 0o077:
        raise Refused("identity-file", f"The identity file {path} can be read by other users. Run: chmod 600 {path}")
    if os.name == "posix" and mode.st_uid not in (os.geteuid(), 0):
        raise Refused("identity-file", f"The identity file {path} belongs to another user. Copy it, or choose another --home.")
    damaged = f"The identity file {path} is damaged. Restore it, or move it away to get a new identity."
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Refused("identity-file", damaged) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Refused("identity-file", damaged)
    return key.private_bytes_raw()


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
