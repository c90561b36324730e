"""The signed HELLO: made for one receiver, checked in a fixed order, every failure with a code of its own.

Enters: what this peer says of itself; or the HELLO of another with the CURVE key that encrypted its connection. Leaves: bytes; or the
checked body.

Why a signature when CURVE proved a key already: an Ed25519 key and its negative share one CURVE key, and the links' keys are derived; the
signature ties the peer id itself to this session. Why so many fields: the receiver's key stops forwarding to somebody else, nonce and time
stop replay, `reply_to` ties an answer to its question.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from dataclasses import dataclass

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.identity import Identity, curve_key_of, peer_id_of, verify
from tscale_net.messages import HELLO_DOMAIN, Hello, HelloBody, HelloHead, check_versions, decode, encode
from tscale_net.ports import Clock, PeerId


@dataclass(frozen=True, slots=True)
class SentHello:
    """A HELLO that was made here."""

    nonce: bytes
    session: bytes
    wire: bytes


class HelloMaker:
    """Makes the HELLOs of one run of the program."""

    def __init__(self, identity: Identity, clock: Clock, name: str) -> None:
        self.name = name
        self.addresses: list[str] = []
        self._identity = identity
        self._clock = clock
        # Nonces come from the system, not from the injected generator, which may be seeded: they must never repeat.
        self._instance = secrets.token_bytes(limits.NONCE_BYTES)
        self._order = 0

    def make(self, destination: bytes, run: bytes, answered: HelloBody | None = None) -> SentHello:
        """A HELLO for the peer with public key `destination`; `answered` is the HELLO that it replies to, if it is the second one."""
        self._order += 1
        nonce = secrets.token_bytes(limits.NONCE_BYTES)
        session = answered.session if answered else secrets.token_bytes(limits.NONCE_BYTES)
        body = encode(
            HelloBody(
                protocol_min=limits.PROTOCOL_MIN,
                protocol_max=limits.PROTOCOL_MAX,
                public_key=self._identity.public_key,
                destination=destination,
                nonce=nonce,
                unix_ms=int(self._clock.wall() * 1000),
                reply_to=answered.nonce if answered else b"",
                instance=self._instance,
                order=self._order,
                session=session,
                run=run,
                name=self.name,
                addresses=self.addresses[: limits.ADDRESSES_PER_PEER],
            )
        )
        return SentHello(nonce, session, encode(Hello(body, self._identity.sign(HELLO_DOMAIN, body))))


class HelloGate:
    """Checks HELLOs; remembers nonces for as long as their time stamp could pass."""

    def __init__(self, identity: Identity, clock: Clock) -> None:
        self._identity = identity
        self._clock = clock
        self._seen: OrderedDict[bytes, deque[tuple[bytes, float]]] = OrderedDict()

    def check(self, wire: bytes, curve_key: bytes, run: bytes, *, reply_to: bytes = b"", expected: PeerId | None = None) -> HelloBody:
        """The body of a HELLO that passes. `curve_key` (z85) encrypted the connection, `run` is this peer's own.

        Raises Refused with, in this order: version (if its head can be read), bad-hello, not-for-me, self, clock-skew, bad-key,
        key-mismatch, wrong-peer, bad-signature, replay, wrong-run.
        """
        hello, body = _read(wire, reply_to)
        if body.destination != self._identity.public_key:
            raise Refused("not-for-me", "The HELLO was made for another peer; the sender has an old address of this one.")
        if body.public_key == self._identity.public_key:
            raise Refused("self", "The peer has the identity of this one: the same home directory is used twice.")
        skew_s = body.unix_ms / 1000 - self._clock.wall()
        if abs(skew_s) > limits.CLOCK_WINDOW_S:
            raise Refused(
                "clock-skew",
                f"The two clocks differ by {abs(skew_s):.0f} s, more than {limits.CLOCK_WINDOW_S:.0f} s are not accepted. Set both (NTP).",
            )
        if curve_key_of(body.public_key) != curve_key:
            raise Refused("key-mismatch", "The peer id stated does not belong to the key that encrypted the connection.")
        peer = peer_id_of(body.public_key)
        if expected is not None and peer != expected:
            raise Refused("wrong-peer", f"{peer} answered instead of {expected}. Check the address.")
        if not verify(body.public_key, HELLO_DOMAIN, hello.body, hello.signature):
            raise Refused("bad-signature", f"The HELLO of {peer} has a wrong signature.")
        self._remember(body.public_key, body.nonce)
        if run and body.run and run != body.run:
            raise Refused(
                "wrong-run", f"The peer belongs to run {body.run.hex()[:16]}, this one to {run.hex()[:16]}. Use the join line of one run."
            )
        return body

    def _remember(self, key: bytes, nonce: bytes) -> None:
        now_s = self._clock.now()
        seen = self._seen.setdefault(key, deque(maxlen=limits.NONCES_PER_KEY))
        self._seen.move_to_end(key)
        while seen and now_s - seen[0][1] > 2 * limits.CLOCK_WINDOW_S:
            seen.popleft()
        if any(nonce == old for old, _ in seen):
            raise Refused("replay", "This HELLO was seen before; somebody replays it, or the peer's random numbers repeat.")
        seen.append((nonce, now_s))
        if len(self._seen) > limits.NONCE_KEYS:
            self._seen.popitem(last=False)


def _read(wire: bytes, reply_to: bytes) -> tuple[Hello, HelloBody]:
    if len(wire) > limits.HELLO_BYTES:
        raise Refused("bad-hello", f"A HELLO has {len(wire)} bytes; at most {limits.HELLO_BYTES} are accepted.")
    try:
        hello = decode(Hello, wire)
        head = decode(HelloHead, hello.body)
    except Refused as refusal:
        raise Refused("bad-hello", refusal.detail) from refusal
    check_versions(head)  # first: the rest of a newer version's HELLO need not have a form that is known here
    try:
        body = decode(HelloBody, hello.body)
    except Refused as refusal:
        raise Refused("bad-hello", refusal.detail) from refusal
    if len(body.run) not in (0, limits.RUN_BYTES) or not body.name.isprintable():
        raise Refused("bad-hello", "The HELLO has a run id or a name of the wrong form.")
    if body.reply_to != reply_to:
        raise Refused("bad-hello", "The HELLO answers another question than the one that was asked.")
    return hello, body
