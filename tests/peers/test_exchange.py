"""The exchange: author and receiver, crash and return, refusals that change nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from tests.peers.core_kit import LAYOUT, STREAM, StillClock, Trainer, author, new_exchange, new_replica, opened, start_weights, terms
from tscale_net.errors import Refused
from tscale_peers import limits
from tscale_peers.applied import AppliedSet
from tscale_peers.basepoint import Replica
from tscale_peers.delta_log import DeltaLog, MemoryLog, PacketLog
from tscale_peers.exchange import Exchange, OuterRule

SUM = OuterRule()
AVERAGE = OuterRule(own_leak="one", momentum_keep="one")
rules = pytest.mark.parametrize("rule", [SUM, AVERAGE, OuterRule(grid_displacement=True)], ids=["sum", "average", "grid"])


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.clone().view(torch.int32)


class Saved:
    """What a checkpoint keeps."""

    def __init__(self, exchange: Exchange) -> None:
        self.displacement = exchange.displacement().clone()
        self.weights = exchange.weights.clone()
        self.paid = exchange.paid.encode()
        self.basepoint = exchange.replica.basepoint.clone()
        self.applied = exchange.replica.applied.encode()

    def restore(self, number: int, rule: OuterRule, log: PacketLog) -> Exchange:
        replica = Replica(LAYOUT, terms().codec)
        replica.restore(self.basepoint, AppliedSet.decode(self.applied, len(LAYOUT.chunks)))
        who = author(number)
        return Exchange(
            replica, self.weights.clone(), rule, (who.public_key, who.sign), STREAM, log, terms(), StillClock(),
            displacement=self.displacement.clone(), paid=self.paid,
        )  # fmt: skip


def test_a_newcomer_starts_at_the_basepoint() -> None:
    exchange = new_exchange(1)
    assert torch.equal(bits(exchange.weights), bits(exchange.replica.weights()))
    assert exchange.displacement_norm() == 0.0


@rules
def test_weights_are_basepoint_plus_displacement_all_along(rule: OuterRule) -> None:
    one, two = new_exchange(1, rule), new_exchange(2, rule)
    trainers = [Trainer(one, 1), Trainer(two, 2)]
    for _ in range(5):
        bodies: list[bytes] = []
        for trainer in trainers:
            trainer.train()
            bodies += trainer.exchange.publish(1, 0.5).packets
        for trainer in trainers:
            trainer.exchange.receive(opened(bodies))
            held = trainer.exchange.replica.weights() + trainer.exchange.displacement()
            assert (trainer.exchange.weights - held).abs().max() <= 2.0**-18
    assert one.replica.state() == two.replica.state()


def test_the_authors_weights_stay_in_the_sum_rule() -> None:
    exchange = new_exchange(1)
    Trainer(exchange, 1).train()
    before = bits(exchange.weights)
    norm = exchange.displacement_norm()
    packets, keep = exchange.publish(1, 0.5)
    assert torch.equal(bits(exchange.weights), before)
    assert exchange.displacement_norm() < norm and keep == 0.5
    assert len(packets) == len(LAYOUT.chunks)


def test_the_averaging_rule_keeps_momentum_and_only_the_codecs_error() -> None:
    exchange = new_exchange(1, AVERAGE)
    Trainer(exchange, 1).train()
    d = exchange.displacement().clone()
    packets, keep = exchange.publish(1, 0.25)
    assert keep == 1.0
    left = d.clone()
    for packet in opened(packets):
        packet.delta.take_from(LAYOUT.chunks[packet.chunk].of(left), 0.25)
    assert torch.equal(bits(exchange.displacement()), bits(left))
    assert (exchange.weights - exchange.replica.weights() - left).abs().max() <= 2.0**-24


def test_the_coefficient_is_scale_times_share_and_never_above_the_runs_limit() -> None:
    for scale, share, want in ((0.5, 0.5, 0.25), (4.0, 0.5, 0.8)):
        exchange = new_exchange(1, OuterRule(share_scale=scale), terms(max_coefficient=0.8))
        Trainer(exchange, 1).train()
        assert opened(exchange.publish(1, share).packets, terms(max_coefficient=0.8))[0].header.coefficient == want


def test_numbers_go_on_without_gaps_and_batches_are_noted() -> None:
    exchange = new_exchange(1)
    for number in (1, 2, 3):
        Trainer(exchange, number).train()
        packets = opened(exchange.publish(10 * number, 1.0).packets)
        assert [(p.seq, p.chunk) for p in packets] == [(number, chunk.index) for chunk in LAYOUT.chunks]
    assert exchange.replica.applied.batches == {exchange.stream_key: 30}


def test_training_between_receptions_is_never_lost() -> None:
    """d is captured before a chunk's basepoint moves, also when only some chunks receive."""
    one, two = new_exchange(1), new_exchange(2)
    Trainer(one, 1).train()
    packets = opened(one.publish(1, 1.0).packets)
    move = Trainer(two, 2).train()
    two.receive(packets[:1])
    assert (two.displacement() - move).abs().max() < 1e-7


# -- on the grid -----------------------------------------------------------------------------------------------------------


def test_on_the_grid_what_d_does_not_hold_stays_in_the_weights() -> None:
    rule = OuterRule(grid_displacement=True)
    one, two = new_exchange(1, rule), new_exchange(2, rule)
    tiny = torch.full((LAYOUT.size,), 2.0**-25)
    two.weights.add_(tiny)
    two.mark_trained()
    assert two.displacement_norm() == 0.0
    Trainer(one, 1).train()
    two.receive(opened(one.publish(1, 1.0).packets))
    assert two.displacement_norm() == 0.0
    assert ((two.weights - two.replica.weights()) - tiny).abs().max() < 2.0**-27


def test_on_the_grid_a_huge_displacement_is_held_to_what_fp32_counts_exactly() -> None:
    exchange = new_exchange(1, OuterRule(grid_displacement=True))
    exchange.weights[0] += 1000.0
    exchange.mark_trained()
    unit = 2.0 ** LAYOUT.specs[0].unit_exponent
    assert float(exchange.displacement()[0]) == limits.grid_displacement_units * unit


# -- refusals --------------------------------------------------------------------------------------------------------------


def everything(exchange: Exchange) -> tuple[object, ...]:
    return (exchange.replica.state(), exchange.log.all_keys(), exchange.paid.digest(), bits(exchange.weights).tolist())


def test_weights_that_are_not_finite_are_not_published() -> None:
    exchange = new_exchange(1)
    Trainer(exchange, 1).train()
    exchange.weights[-1] = float("nan")
    before = everything(exchange)
    with pytest.raises(Refused, match="restore a checkpoint") as caught:
        exchange.publish(1, 1.0)
    assert caught.value.code == "not-finite" and everything(exchange) == before


def test_work_that_would_leave_the_range_is_not_published() -> None:
    exchange = new_exchange(1)
    values = exchange.replica.basepoint.clone()
    values[-1] = limits.basepoint_range
    exchange.replica.restore(values, exchange.replica.applied)
    exchange.drop_displacement()
    exchange.weights[-32:] += 10.0
    exchange.mark_trained()
    before = everything(exchange)
    with pytest.raises(Refused) as caught:
        exchange.publish(1, 1.0)
    assert caught.value.code == "out-of-range" and everything(exchange) == before


def test_a_full_disk_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = new_exchange(1, log=DeltaLog(tmp_path))
    Trainer(exchange, 1).train()
    before = everything(exchange)

    def full(file: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Refused, match="free disk space"):
        exchange.publish(1, 1.0)
    assert everything(exchange) == before
    monkeypatch.undo()
    assert opened(exchange.publish(1, 1.0).packets)[0].seq == 1


def test_a_receivers_refusal_is_in_its_receipt_and_the_others_are_applied() -> None:
    one, two = new_exchange(1), new_exchange(2)
    Trainer(one, 1).train()
    packets = opened(one.publish(1, 1.0).packets)
    values = two.replica.basepoint.clone()
    values[:64] = limits.basepoint_range
    values[64:128] = -limits.basepoint_range
    two.replica.restore(values, two.replica.applied)
    two.drop_displacement()
    receipts = two.receive(packets)
    assert receipts[0].outcome == "refused" and receipts[0].refusal is not None and receipts[0].refusal.code == "out-of-range"
    assert {r.outcome for r in receipts[1:]} == {"applied"}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_a_bug_of_the_caller(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        new_exchange(1).publish(1, share)


def test_rules_that_make_no_sense_are_refused_at_construction() -> None:
    for wrong in (
        {"share_scale": 0.0},
        {"share_scale": float("nan")},
        {"own_leak": "half"},
        {"own_leak": "one", "grid_displacement": True},
    ):
        with pytest.raises(ValueError, match="rule"):
            OuterRule(**wrong)  # type: ignore[arg-type]


def test_weights_of_another_model_are_refused() -> None:
    who = author(1)
    with pytest.raises(Refused) as caught:
        Exchange(new_replica(terms()), torch.empty(8), SUM, (who.public_key, who.sign), 1, MemoryLog(), terms(), StillClock())
    assert caught.value.code == "bad-checkpoint"


# -- crash and return ------------------------------------------------------------------------------------------------------


@rules
def test_a_crash_between_log_and_checkpoint_loses_nothing_and_counts_nothing_twice(rule: OuterRule, tmp_path: Path) -> None:
    """The peer that crashed and came back equals, bit for bit, the one that did not."""
    log = DeltaLog(tmp_path)
    lucky = new_exchange(1, rule, log=log)
    trainer = Trainer(lucky, 3)
    trainer.train()
    lucky.publish(1, 0.5)
    saved = Saved(lucky)
    published = lucky.publish(2, 0.5).packets + lucky.publish(3, 0.5).packets  # the same displacement again: no local steps in between
    log.close()
    back = saved.restore(1, rule, DeltaLog(tmp_path))
    assert back.recovered == len(published) == 2 * len(LAYOUT.chunks)
    assert back.replica.state() == lucky.replica.state()
    assert torch.equal(bits(back.displacement()), bits(lucky.displacement()))
    assert (back.weights - lucky.weights).abs().max() <= 2.0**-24
    assert {r.outcome for r in back.receive(opened(published))} == {"duplicate"}
    Trainer(back, 4).train()
    assert {p.seq for p in opened(back.publish(4, 0.5).packets)} == {4}


def test_in_the_sum_rule_the_checkpoints_weights_stay_as_they_were(tmp_path: Path) -> None:
    log = DeltaLog(tmp_path)
    exchange = new_exchange(1, log=log)
    Trainer(exchange, 3).train()
    saved = Saved(exchange)
    exchange.publish(1, 0.5)
    log.close()
    back = saved.restore(1, SUM, DeltaLog(tmp_path))
    assert torch.equal(bits(back.weights), bits(saved.weights))


def test_a_crash_in_the_middle_of_a_publication_goes_on_per_chunk(tmp_path: Path) -> None:
    """The torn tail cut off the last chunks' packets: these have not been seen by anybody, and their numbers are free."""
    log = DeltaLog(tmp_path)
    exchange = new_exchange(1, log=log)
    Trainer(exchange, 3).train()
    saved = Saved(exchange)
    exchange.publish(1, 0.5)
    log.close()
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-10])
    back = saved.restore(1, SUM, DeltaLog(tmp_path))
    assert back.recovered == len(LAYOUT.chunks) - 1
    again = opened(back.publish(2, 0.5).packets)
    assert [p.seq for p in again] == [2] * (len(LAYOUT.chunks) - 1) + [1]
    other = new_exchange(2)
    other.receive(opened([back.log.get(key) or b"" for key in back.log.keys(back.stream_key)]))
    assert other.replica.state() == back.replica.state()


@rules
def test_a_returning_peer_keeps_its_work_on_a_newer_basepoint(rule: OuterRule, tmp_path: Path) -> None:
    """Checkpoint, two more own publications, then death. Others go on; the peer comes back and takes a donor's chunks, which contain its
    own packets: d has paid these when the log was recovered, so nothing counts twice."""
    log = DeltaLog(tmp_path)
    peer, other = new_exchange(1, rule, log=log), new_exchange(2, rule)
    Trainer(peer, 1).train()
    saved = Saved(peer)
    other.receive(opened(peer.publish(1, 0.5).packets + peer.publish(2, 0.5).packets))
    settled = peer.displacement().clone()
    Trainer(other, 2).train()
    other.publish(1, 0.5)
    log.close()
    back = saved.restore(1, rule, DeltaLog(tmp_path))
    assert back.load_chunks({chunk.index: other.replica.read_chunk(chunk.index) for chunk in LAYOUT.chunks}) == []
    assert torch.equal(bits(back.displacement()), bits(settled))
    assert back.replica.state() == other.replica.state()
    assert (back.weights - back.replica.weights() - settled).abs().max() <= 2.0**-18


def test_own_packets_that_come_home_without_a_log_pay_their_part() -> None:
    """The log's disk was lost, the checkpoint was not: others still have the packets."""
    exchange = new_exchange(1)
    Trainer(exchange, 1).train()
    saved = Saved(exchange)
    packets = opened(exchange.publish(1, 0.5).packets)
    back = saved.restore(1, SUM, MemoryLog())
    assert {r.outcome for r in back.receive(packets)} == {"applied"}
    assert back.replica.state() == exchange.replica.state()
    assert torch.equal(bits(back.displacement()), bits(exchange.displacement()))
    assert torch.equal(bits(back.weights), bits(exchange.weights))


def test_d_that_cannot_be_settled_is_dropped_and_said_so() -> None:
    exchange, other = new_exchange(1), new_exchange(2)
    Trainer(exchange, 1).train()
    saved = Saved(exchange)
    other.receive(opened(exchange.publish(1, 0.5).packets))
    back = saved.restore(1, SUM, MemoryLog())
    last = LAYOUT.chunks[-1]
    assert back.load_chunks({last.index: other.replica.read_chunk(last.index)}) == [last.index]
    assert float(last.of(back.displacement()).abs().max()) == 0.0
    assert float(LAYOUT.chunks[0].of(back.displacement()).abs().max()) > 0.0
    assert torch.equal(last.of(back.weights), last.of(back.replica.weights()))


def test_a_donor_that_lacks_own_packets_gets_them_added_from_the_log() -> None:
    exchange, donor = new_exchange(1), new_exchange(2)
    Trainer(exchange, 1).train()
    exchange.publish(1, 0.5)
    state, d, w = exchange.replica.state(), bits(exchange.displacement()), exchange.weights.clone()
    exchange.load_chunks({chunk.index: donor.replica.read_chunk(chunk.index) for chunk in LAYOUT.chunks})
    assert exchange.replica.state() == state
    assert torch.equal(bits(exchange.displacement()), d)
    assert (exchange.weights - w).abs().max() < 2.0**-24


def test_a_bad_chunk_leaves_its_chunk_unchanged() -> None:
    exchange = new_exchange(1)
    Trainer(exchange, 1).train()
    before = everything(exchange)
    with pytest.raises(Refused):
        exchange.load_chunks({0: b"no chunk"})
    assert everything(exchange) == before


def test_the_log_keeps_own_packets_until_a_checkpoint_has_them() -> None:
    exchange = new_exchange(1, log=MemoryLog(retain_per_stream=2))
    for number in range(1, 8):
        exchange.publish(number, 0.5)
    assert exchange.log.oldest(exchange.stream_key) == 1
    exchange.checkpointed()
    exchange.publish(8, 0.5)
    assert exchange.log.oldest(exchange.stream_key) == 7


def test_dropping_the_displacement_returns_to_the_basepoint() -> None:
    exchange = new_exchange(1)
    Trainer(exchange, 1).train()
    exchange.drop_displacement()
    assert exchange.displacement_norm() == 0.0
    assert torch.equal(bits(exchange.weights), bits(exchange.replica.weights()))


def test_a_leaving_peer_drains_its_displacement() -> None:
    exchange = new_exchange(1)
    Trainer(exchange, 1).train()
    norm = exchange.displacement_norm()
    for _ in range(10):
        exchange.publish(1, 1.0)
    assert exchange.displacement_norm() < 0.45 * norm
    assert (exchange.weights - start_weights()).abs().max() > 0


def test_a_number_is_never_used_again_even_if_basepoint_and_log_have_forgotten_it() -> None:
    exchange, donor = new_exchange(1), new_exchange(2)
    Trainer(exchange, 1).train()
    exchange.publish(1, 0.5)
    back = Saved(exchange).restore(1, SUM, MemoryLog())
    back.load_chunks({chunk.index: donor.replica.read_chunk(chunk.index) for chunk in LAYOUT.chunks})
    assert len(back.replica.applied) == 0
    assert {packet.seq for packet in opened(back.publish(2, 0.5).packets)} == {2}
    forgetful = new_exchange(1, log=exchange.log)  # a checkpoint from before the first publication
    assert {packet.seq for packet in opened(forgetful.publish(2, 0.5).packets)} == {2}
