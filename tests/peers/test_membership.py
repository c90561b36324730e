"""Records and membership: only authentic news counts; silence makes suspect, then dead; its word makes left; the book stays bounded."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscale_net.errors import Refused
from tscale_net.identity import Identity, verify
from tscale_peers import limits
from tscale_peers.membership import Membership, State
from tscale_peers.records import PeerRecord, RecordBook, open_sealed, seal
from tscale_peers.share import RateAverage, share

RUN = b"r" * 32


def identity(n: int) -> Identity:
    return Identity.from_seed(n.to_bytes(32, "big"))


def record(who: Identity, seq: int = 1, **changes: object) -> PeerRecord:
    base = PeerRecord(
        run=RUN, public_key=who.public_key, incarnation=5, seq=seq, created_unix=1.0, name="calm-heron", role="peer",
        addresses=("/ip4/10.0.0.1/tcp/7700",),
        step=3, batches=9, tokens=100, tokens_per_s=10.0, train_loss=2.0, digest=b"d" * 32, hash=b"h" * 32, leaving=False,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def sealed(who: Identity, seq: int = 1, **changes: object) -> bytes:
    return seal(record(who, seq, **changes), who.sign)


def members() -> Membership:
    return Membership(identity(1).peer_id, RecordBook(RUN, verify), random.Random(0))


def test_newest_wins_and_old_news_is_no_news() -> None:
    m, other = members(), identity(2)
    assert m.learn(sealed(other, 2), 0.0) is not None
    assert m.learn(sealed(other, 2), 1.0) is None
    assert m.learn(sealed(other, 1), 1.0) is None
    assert m.learn(sealed(other, 1, incarnation=6), 1.0) is not None, "a restarted peer counts again from 1"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"run": b"x" * 32}, "wrong-run"),
        ({"tokens_per_s": float("nan")}, "bad-record"),
        ({"tokens_per_s": -1.0}, "bad-record"),
        ({"tokens_per_s": 1e15}, "bad-record"),
        ({"name": "x" * 33}, "bad-record"),
        ({"name": "a\x1b[2J"}, "bad-record"),
        ({"role": "king"}, "bad-record"),
        ({"addresses": ("a",) * 9}, "bad-record"),
        ({"addresses": ("a" * 257,)}, "bad-record"),
        ({"digest": b"short"}, "bad-record"),
        ({"step": -1}, "bad-record"),
        ({"public_key": b"short"}, "bad-record"),
    ],
)
def test_false_records_are_refused(changes: dict[str, object], code: str) -> None:
    who = identity(2)
    with pytest.raises(Refused) as refusal:
        members().learn(sealed(who, 1, **changes), 0.0)
    assert refusal.value.code == code


def test_a_forged_record_is_refused() -> None:
    honest, liar = identity(2), identity(3)
    with pytest.raises(Refused) as refusal:
        members().learn(seal(record(honest), liar.sign), 0.0)
    assert refusal.value.code == "bad-signature"


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_refused(at: int, flip: int) -> None:
    raw = bytearray(sealed(identity(2)))
    raw[at % len(raw)] ^= flip
    with pytest.raises(Refused):
        open_sealed(bytes(raw), RUN, verify)


def test_silence_makes_suspect_then_dead_and_a_word_makes_live_again() -> None:
    m, other = members(), identity(2)
    m.learn(sealed(other, 1), 0.0)
    assert [c.after for c in m.tick(0.0)] == [State.LIVE]
    assert m.tick(limits.suspect_s - 0.1) == []
    assert [c.after for c in m.tick(limits.suspect_s)] == [State.SUSPECT]
    assert [c.after for c in m.tick(limits.dead_s)] == [State.DEAD]
    assert m.live() == []
    m.learn(sealed(other, 2), 20.0)
    assert [(c.before, c.after) for c in m.tick(20.0)] == [(State.DEAD, State.LIVE)]
    m.learn(sealed(other, 3, leaving=True), 21.0)
    assert [c.after for c in m.tick(21.0)] == [State.LEFT]
    assert m.dial_targets(set(), 100.0, lambda peer, now: True) == [], "who left is not dialled"


def test_news_is_told_once_per_link_and_again_on_a_new_link() -> None:
    m, other, neighbour = members(), identity(2), identity(3)
    m.link_up(neighbour.peer_id)
    m.learn(sealed(other, 1), 0.0)
    assert len(m.news_for(neighbour.peer_id)) == 1
    assert m.news_for(neighbour.peer_id) == []
    m.learn(sealed(other, 2), 1.0)
    assert len(m.news_for(neighbour.peer_id)) == 1
    m.link_down(neighbour.peer_id)
    m.link_up(neighbour.peer_id)
    assert m.news_for(neighbour.peer_id) == [], "who has not spoken yet may not listen either"
    m.speaks(neighbour.peer_id)
    assert len(m.news_for(neighbour.peer_id)) == 1
    m.speaks(neighbour.peer_id)
    assert m.news_for(neighbour.peer_id) == []
    assert m.learn(sealed(identity(4)), 2.0, source=neighbour.peer_id) is not None
    assert m.news_for(neighbour.peer_id) == [], "what came from there is not told back"


def test_the_book_is_bounded_and_keeps_the_freshest() -> None:
    book = RecordBook(RUN, lambda *args: True)
    for n in range(limits.record_book_peers + 5):
        book.learn(seal(record(identity(n + 10)), lambda domain, message: b"s" * 64), float(n))
    assert len(book) == limits.record_book_peers
    assert identity(10).peer_id not in book and identity(limits.record_book_peers + 14).peer_id in book


def test_share_alone_floor_and_equal_parts() -> None:
    assert share(0.0, []) == 1.0
    assert share(0.0, [0.0, 0.0, 0.0]) == 0.25
    assert share(30.0, [10.0]) == 0.75
    assert share(0.0, [1e6]) == limits.min_share


def test_rate_average_starts_at_zero_and_settles() -> None:
    rate = RateAverage(time_constant_s=10.0)
    assert rate.per_s == 0.0
    for _ in range(100):
        rate.add(50.0, 1.0)
    assert abs(rate.per_s - 50.0) < 0.01
    assert rate.add(1.0, 0.0) == rate.per_s
