"""HELLO: an honest one passes once; every lie is refused with its own code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from net_kit import identity

from tscale_net import limits
from tscale_net.errors import REASONS, Refused
from tscale_net.handshake import HelloGate, HelloMaker
from tscale_net.identity import Identity, peer_id_of
from tscale_net.messages import HELLO_DOMAIN, Hello, HelloBody, decode, encode

SERVER, ALICE, MALLORY = identity(1), identity(2), identity(3)
RUN, OTHER_RUN = bytes([7]) * 32, bytes([8]) * 32


@dataclass
class HandClock:
    seconds: float = 0.0

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return 1_750_000_000.0 + self.seconds

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("a handshake does not sleep")


@dataclass
class Scene:
    clock: HandClock = field(default_factory=HandClock)
    gate: HelloGate = field(init=False)

    def __post_init__(self) -> None:
        self.gate = HelloGate(SERVER, self.clock)

    def hello(self, who: Identity = ALICE, run: bytes = RUN, destination: Identity = SERVER, name: str = "alice") -> bytes:
        return HelloMaker(who, self.clock, name).make(destination.public_key, run).wire

    def check(self, wire: bytes, who: Identity = ALICE, run: bytes = RUN, **more: Any) -> HelloBody:
        return self.gate.check(wire, who.curve_public, run, **more)

    def refusal(self, wire: bytes, who: Identity = ALICE, run: bytes = RUN, **more: Any) -> str:
        with pytest.raises(Refused) as caught:
            self.check(wire, who, run, **more)
        assert caught.value.code in REASONS and caught.value.detail.strip()
        return caught.value.code


def forge(wire: bytes, signer: Identity, **changes: Any) -> bytes:
    """The same HELLO with other fields, signed by somebody."""
    body = encode(msgspec.structs.replace(decode(HelloBody, decode(Hello, wire).body), **changes))
    return encode(Hello(body, signer.sign(HELLO_DOMAIN, body)))


def test_honest_hello_passes_and_says_who() -> None:
    scene = Scene()
    body = scene.check(scene.hello())
    assert (peer_id_of(body.public_key), body.run, body.name) == (ALICE.peer_id, RUN, "alice")
    assert len(scene.hello()) < 400


def test_answer_is_tied_to_its_question() -> None:
    scene = Scene()
    first = HelloMaker(SERVER, scene.clock, "").make(ALICE.public_key, RUN)
    asked = decode(HelloBody, decode(Hello, first.wire).body)
    maker = HelloMaker(ALICE, scene.clock, "")
    answer = maker.make(SERVER.public_key, RUN, answered=asked)
    body = scene.check(answer.wire, reply_to=first.nonce, expected=ALICE.peer_id)
    assert body.session == first.session
    assert scene.refusal(maker.make(SERVER.public_key, RUN, answered=asked).wire, reply_to=bytes(16)) == "bad-hello"
    assert scene.refusal(maker.make(SERVER.public_key, RUN).wire, reply_to=first.nonce) == "bad-hello"
    other = maker.make(SERVER.public_key, RUN, answered=asked)
    assert scene.refusal(other.wire, reply_to=first.nonce, expected=MALLORY.peer_id) == "wrong-peer"


def test_order_and_instance_tell_restarts_from_second_dials() -> None:
    scene = Scene()
    maker = HelloMaker(ALICE, scene.clock, "")
    one, two = (scene.check(maker.make(SERVER.public_key, RUN).wire) for _ in range(2))
    restarted = scene.check(scene.hello())
    assert one.instance == two.instance != restarted.instance
    assert two.order == one.order + 1


def test_lies_have_their_codes() -> None:
    scene = Scene()
    honest = scene.hello()
    assert scene.refusal(scene.hello(destination=MALLORY)) == "not-for-me"
    assert scene.refusal(scene.hello(who=SERVER), who=SERVER) == "self"
    assert scene.refusal(honest, who=MALLORY) == "key-mismatch", "a captured HELLO from another key"
    assert scene.refusal(forge(honest, MALLORY)) == "bad-signature"
    assert scene.refusal(forge(honest, MALLORY, public_key=bytes(32)), who=MALLORY) == "bad-key"
    twin = ALICE.public_key[:31] + bytes([ALICE.public_key[31] ^ 0x80])
    assert scene.refusal(forge(honest, ALICE, public_key=twin)) == "bad-signature", "the twin with the same CURVE key"
    assert scene.refusal(forge(honest, ALICE, public_key=twin), expected=ALICE.peer_id) == "wrong-peer"
    assert scene.refusal(forge(scene.hello(), ALICE, protocol_min=2, protocol_max=9)) == "version"
    assert scene.refusal(forge(honest, ALICE, run=b"short")) == "bad-hello"
    assert scene.refusal(forge(honest, ALICE, name="bell\a")) == "bad-hello"
    assert scene.refusal(bytes(limits.HELLO_BYTES + 1)) == "bad-hello"
    assert scene.check(honest), "lies about a HELLO do not use it up"


def test_versions_are_compared_before_the_form_of_what_follows() -> None:
    scene = Scene()
    fields = msgspec.msgpack.decode(decode(Hello, scene.hello()).body)

    def newer(*versions: int) -> bytes:
        body = msgspec.msgpack.encode([*versions, *fields[2:], "a field of a later version"])
        return encode(Hello(body, ALICE.sign(HELLO_DOMAIN, body)))

    assert scene.refusal(newer(limits.PROTOCOL_MAX + 1, limits.PROTOCOL_MAX + 1)) == "version"
    assert scene.refusal(newer(limits.PROTOCOL_MIN, limits.PROTOCOL_MAX)) == "bad-hello", "a known version has its known form"


def test_replay_is_refused_as_long_as_its_time_would_pass() -> None:
    scene = Scene()
    hello = scene.hello()
    scene.check(hello)
    assert scene.refusal(hello) == "replay"
    scene.clock.seconds += limits.CLOCK_WINDOW_S - 1
    assert scene.refusal(hello) == "replay"
    scene.clock.seconds += 2
    assert scene.refusal(hello) == "clock-skew"


@pytest.mark.parametrize("skew_s", [-91.0, 91.0, 1e6])
def test_clocks_apart_are_refused_with_the_difference(skew_s: float) -> None:
    scene = Scene()
    hello = scene.hello()
    scene.clock.seconds += skew_s
    with pytest.raises(Refused, match=f"{abs(skew_s):.0f} s"):
        scene.check(hello)


def test_a_flood_of_one_key_forgets_no_nonce_of_another() -> None:
    scene = Scene()
    hello = scene.hello()
    scene.check(hello)
    maker = HelloMaker(MALLORY, scene.clock, "")
    for _ in range(3 * limits.NONCES_PER_KEY):
        scene.check(maker.make(SERVER.public_key, RUN).wire, who=MALLORY)
    assert scene.refusal(hello) == "replay"


@pytest.mark.parametrize(("ours", "theirs", "passes"), [(RUN, RUN, True), (RUN, b"", True), (b"", RUN, True), (RUN, OTHER_RUN, False)])
def test_runs_do_not_mix(ours: bytes, theirs: bytes, passes: bool) -> None:
    scene = Scene()
    hello = scene.hello(run=theirs)
    if passes:
        assert scene.check(hello, run=ours).run == theirs
    else:
        assert scene.refusal(hello, run=ours) == "wrong-run"


@given(st.binary(max_size=500))
def test_garbage_is_refused(wire: bytes) -> None:
    assert Scene().refusal(wire) == "bad-hello"


@given(st.binary(max_size=300), st.binary(min_size=64, max_size=64))
def test_garbage_in_a_well_formed_hello_is_refused(body: bytes, signature: bytes) -> None:
    assert Scene().refusal(encode(Hello(body, signature))) == "bad-hello"


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_any_changed_byte_is_refused(position: int, value: int) -> None:
    scene = Scene()
    wire = bytearray(scene.hello())
    position %= len(wire)
    if wire[position] != value:
        wire[position] = value
        assert scene.refusal(bytes(wire))
