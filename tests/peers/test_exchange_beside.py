"""The exchange without a stored displacement, and publications made beside training: the same swarm, less memory, less waiting."""

from __future__ import annotations

import pytest
import torch

from tests.peers.core_kit import LAYOUT, STREAM, StillClock, author, new_exchange, opened, terms
from tests.peers.exchange_kit import History, ManualHelper, bits, exchange_on, train
from tscale_net.errors import Refused
from tscale_peers import limits
from tscale_peers.applied import AppliedSet
from tscale_peers.basepoint import Replica
from tscale_peers.delta_log import MemoryLog
from tscale_peers.exchange import Exchange, OuterRule, Signer
from tscale_peers.layout import Chunk

SUM, AVERAGE = OuterRule(), OuterRule(own_leak="one", momentum_keep="one")
rules = pytest.mark.parametrize("rule", [SUM, AVERAGE], ids=["sum", "average"])
ROUNDING = 2.0**-26
"""Half a last place of weights below 0.25."""


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publication of the tests' layout takes three slices."""
    monkeypatch.setattr(limits, "draft_slice_values", 1)
    monkeypatch.setattr(limits, "draft_slices", 2)


# -- without a stored displacement -----------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("seed", range(4))
def test_an_implied_displacement_is_the_kept_one_up_to_the_rounding_of_weights(rule: OuterRule, seed: int) -> None:
    history = History(terms("exact"), seed, 25)
    kept, implied = (exchange_on(1, terms("exact"), rule=rule, keep=keep) for keep in (True, False))
    worst = 0.0
    seen: list[torch.Tensor] = []
    history.play(kept, lambda event: seen.append(kept.displacement().clone()))

    def compare(event: int) -> None:
        nonlocal worst
        worst = max(worst, float((implied.displacement() - seen[event]).abs().max()))

    history.play(implied, compare)
    assert worst <= 25 * (ROUNDING + 2.0**-19), "rounding, and a step of a unit where the two publish differently"
    assert worst > 0, "otherwise nothing was compared"


@rules
def test_implied_receiving_moves_the_displacement_by_half_a_last_place_at_most(rule: OuterRule) -> None:
    one, two = exchange_on(1, terms(), rule=rule, keep=False), new_exchange(2, rule)
    train(one, 1)
    train(two, 2)
    before = one.displacement().clone()
    one.receive(opened(two.publish(1, 0.5).packets))
    assert (one.displacement() - before).abs().max() <= ROUNDING
    assert torch.equal(bits(one.weights - one.replica.weights()), bits(one.displacement()))


def test_replicas_of_peers_that_hold_it_in_either_way_have_equal_bits() -> None:
    kept, implied = exchange_on(1, terms()), exchange_on(2, terms(), keep=False)
    for round_ in range(4):
        bodies: list[bytes] = []
        for number, exchange in enumerate((kept, implied)):
            train(exchange, 10 * round_ + number)
            bodies += exchange.publish(round_, 0.5).packets
        for exchange in (kept, implied):
            exchange.receive(opened(bodies))
    assert kept.replica.state() == implied.replica.state()
    assert implied.displacement_norm() > 0


def test_implied_chunks_that_receive_nothing_keep_their_weights_to_the_bit() -> None:
    """Writing W = B + (W - B) would round it."""
    one, two = exchange_on(1, terms(), keep=False), new_exchange(2)
    train(one, 1, size=0.3)
    before = bits(one.weights)
    train(two, 2)
    packets = opened(two.publish(1, 0.5).packets)
    one.receive(packets[1:2])
    after = bits(one.weights)
    touched = LAYOUT.chunks[packets[1].chunk]
    same = torch.ones(LAYOUT.size, dtype=torch.bool)
    touched.of(same).fill_(False)
    assert torch.equal(before[same], after[same]) and not torch.equal(touched.of(before), touched.of(after))


def test_on_the_grid_it_is_kept_whatever_was_asked_for() -> None:
    exchange = exchange_on(1, terms(), rule=OuterRule(grid_displacement=True), keep=False)
    train(exchange, 1)
    assert exchange.displacement() is exchange.displacement(), "the live buffer"


def test_an_implied_displacement_that_is_restored_is_that_of_the_weights() -> None:
    exchange = exchange_on(1, terms(), keep=False)
    train(exchange, 1)
    exchange.publish(1, 0.5)
    d, paid, applied = exchange.displacement().clone(), exchange.paid.encode(), exchange.replica.applied.encode()
    replica = Replica(LAYOUT, terms().codec)
    replica.restore(exchange.replica.basepoint, AppliedSet.decode(applied, len(LAYOUT.chunks)))
    who = author(1)
    back = Exchange(
        replica, exchange.weights.clone(), SUM, (who.public_key, who.sign), STREAM, exchange.log, terms(), StillClock(),
        displacement=d.clone(), paid=paid, keep_displacement=False,
    )  # fmt: skip
    assert back.recovered == 0 and torch.equal(bits(back.displacement()), bits(d))


# -- beside training -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_slices")
def test_a_publication_beside_training_is_what_was_captured_and_training_in_between_is_kept() -> None:
    helper = ManualHelper()
    beside, at_once = exchange_on(1, terms("exact"), helper=helper), exchange_on(1, terms("exact"))
    for exchange in (beside, at_once):
        train(exchange, 1)
    drafting = beside.begin_publication(1, 0.5)
    want = at_once.publish(1, 0.5)
    steps = 0
    while (published := drafting.advance()) is None:
        assert not beside.replica.applied.streams, "nothing that others could see has changed"
        helper.work()
        if steps == 0:
            train(beside, 2)  # the slices after the first are captured later
            train(at_once, 2)
        steps += 1
    assert steps == 3 and len(published.packets) == len(LAYOUT.chunks) and published.momentum_keep == 0.5
    first = opened(published.packets, terms("exact"))[0].chunk
    assert published.packets[first] == want.packets[first]
    assert published.packets[-1] != want.packets[-1]
    assert (beside.weights - at_once.weights).abs().max() <= 2.0**-25
    held = beside.replica.weights() + beside.displacement()
    assert (beside.weights - held).abs().max() <= 2.0**-25


def test_packets_received_meanwhile_are_not_published_as_own_work() -> None:
    helper = ManualHelper()
    one, two = exchange_on(1, terms("exact"), helper=helper), new_exchange(2, t=terms("exact"))
    train(one, 1)
    own = one.displacement().clone()
    drafting = one.begin_publication(1, 1.0)
    assert drafting.advance() is None
    train(two, 2)
    one.receive(opened(two.publish(1, 1.0).packets, terms("exact")))
    helper.work()
    published = drafting.finish()
    moved = torch.zeros_like(own)
    for packet in opened(published.packets, terms("exact")):
        packet.delta.take_from(LAYOUT.chunks[packet.chunk].of(moved))
    assert (own + moved).abs().max() <= 2.0**-19, "exactly the own move, rounded to units"
    assert one.displacement_norm() < 1e-4


@rules
def test_a_crash_after_the_log_and_before_the_basepoint_counts_once(rule: OuterRule) -> None:
    helper, log = ManualHelper(), MemoryLog()
    peer = exchange_on(1, terms(), rule=rule, helper=helper, log=log)
    train(peer, 1)
    saved, weights = peer.displacement().clone(), peer.weights.clone()
    basepoint, applied, paid = peer.replica.basepoint.clone(), peer.replica.applied.encode(), peer.paid.encode()
    drafting = peer.begin_publication(1, 0.5)
    drafting.advance()
    helper.work()
    assert len(log.all_keys()) == len(LAYOUT.chunks) and not peer.replica.applied.streams
    replica = Replica(LAYOUT, terms().codec)
    replica.restore(basepoint, AppliedSet.decode(applied, len(LAYOUT.chunks)))
    who = author(1)
    back = Exchange(replica, weights, rule, (who.public_key, who.sign), STREAM, log, terms(), StillClock(), displacement=saved, paid=paid)
    assert back.recovered == len(LAYOUT.chunks)
    drafting.finish()
    assert back.replica.state() == peer.replica.state()
    assert torch.equal(bits(back.displacement()), bits(peer.displacement()))


def test_weights_that_are_not_finite_end_the_publication_and_change_nothing() -> None:
    helper = ManualHelper()
    exchange = exchange_on(1, terms(), helper=helper)
    train(exchange, 1)
    exchange.weights[-1] = float("nan")
    drafting = exchange.begin_publication(1, 1.0)
    assert drafting.advance() is None
    helper.work()
    state = exchange.replica.state()
    with pytest.raises(Refused) as caught:
        drafting.advance()
    assert caught.value.code == "not-finite" and exchange.log.all_keys() == [] and exchange.replica.state() == state


def test_a_number_that_came_home_meanwhile_is_not_given_twice() -> None:
    """The log was lost, and an own packet of before comes back from a neighbour while its number is being given anew."""
    helper = ManualHelper()
    before = exchange_on(1, terms())
    train(before, 5)
    old = before.publish(1, 0.5).packets
    exchange = exchange_on(1, terms(), helper=helper)
    train(exchange, 6)
    drafting = exchange.begin_publication(2, 0.5)
    drafting.advance()
    (home,) = opened(old[:1])
    exchange.log.append(old[0], home.key)
    exchange.receive([home])
    helper.work()
    packets = opened(drafting.finish().packets)
    assert [(packet.chunk, packet.seq) for packet in packets][:2] == [(0, 2), (1, 1)]


def test_a_number_that_comes_home_while_its_packet_is_signed_stops_the_publication(monkeypatch: pytest.MonkeyPatch) -> None:
    before = exchange_on(1, terms())
    train(before, 5)
    old = before.publish(1, 0.5).packets
    exchange = exchange_on(1, terms())
    train(exchange, 6)
    (home,) = opened(old[:1])
    who = author(1)

    def sign(domain: bytes, message: bytes) -> bytes:
        exchange.log.append(old[0], home.key)
        return who.sign(domain, message)

    monkeypatch.setattr(exchange._publisher, "_signer", Signer(who.public_key, sign))
    state, d = exchange.replica.state(), bits(exchange.displacement())
    with pytest.raises(Refused) as caught:
        exchange.publish(2, 0.5)
    assert caught.value.code == "packet-seq" and exchange.log.all_keys() == [home.key]
    assert exchange.replica.state() == state and torch.equal(bits(exchange.displacement()), d)


def test_own_packets_that_do_not_fit_when_they_are_ready_are_said_and_come_again() -> None:
    helper = ManualHelper()
    exchange = exchange_on(1, terms(), helper=helper)
    train(exchange, 1)
    drafting = exchange.begin_publication(1, 1.0)
    drafting.advance()
    helper.work()
    values, applied = exchange.replica.basepoint.clone(), exchange.replica.applied.copy()
    full = values.clone()
    full[0:64:2], full[1:64:2] = limits.basepoint_range, -limits.basepoint_range
    exchange.replica.restore(full, applied)
    published = drafting.finish()
    assert len(published.packets) == len(LAYOUT.chunks) - 1
    (receipt,) = exchange.unplaced
    assert receipt.refusal is not None and receipt.refusal.code == "out-of-range" and receipt.key[2] == 0
    body = exchange.log.get(receipt.key)
    assert body is not None, "durable: it is offered again as others' packets are"
    full[0:64] = 0
    exchange.replica.restore(full, exchange.replica.applied)
    assert exchange.receive(opened([body]))[0].outcome == "applied"


def test_pledged_work_is_left_out_of_a_publication_as_it_was_when_captured() -> None:
    """A pledge that a sum lists between capture and encoding was part of the captured displacement, and must still be taken off."""
    helper = ManualHelper()
    exchange = exchange_on(1, terms("exact"), helper=helper)
    train(exchange, 1)
    asked: list[tuple[int, list[int]]] = []
    exchange.pledges.open_numbers = lambda chunk: [chunk + 100]  # type: ignore[method-assign]
    exchange.pledges.read = lambda chunk, numbers: asked.append((chunk, list(numbers))) or []  # type: ignore[assignment, func-returns-value]
    drafting = exchange.begin_publication(1, 0.5)
    drafting.advance()
    exchange.pledges.open_numbers = lambda chunk: []  # type: ignore[method-assign]
    helper.work()
    drafting.finish()
    assert asked == [(chunk.index, [chunk.index + 100]) for chunk in LAYOUT.chunks]


def test_every_slice_is_captured_once_and_in_order(small_slices: None) -> None:
    helper = ManualHelper()
    exchange = exchange_on(1, terms(), helper=helper)
    train(exchange, 1)
    made: list[int] = []

    def make(chunk: Chunk, payload: bytes) -> int:
        made.append(chunk.index)
        return chunk.index

    kept: list[list[int]] = []
    drafting = exchange.drafting(LAYOUT.chunks, 0.5, make, lambda listed: kept.append(list(listed)), lambda listed: listed)
    for _ in range(20):
        if (result := drafting.advance()) is not None:
            break
        helper.work()
    assert result == made == [chunk.index for chunk in LAYOUT.chunks] and kept == [made]
