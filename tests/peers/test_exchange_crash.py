"""A crash that cost local training: what was published is not taken back, what was not published is kept."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.peers.core_kit import LAYOUT, STREAM, StillClock, Trainer, author, new_exchange, terms
from tscale_peers.applied import AppliedSet
from tscale_peers.basepoint import Replica
from tscale_peers.delta_log import DeltaLog
from tscale_peers.exchange import Exchange, OuterRule


def crash_and_return(folder: Path) -> tuple[Exchange, Exchange, torch.Tensor, torch.Tensor]:
    """(peer before the crash, peer after it, displacement and basepoint of the checkpoint): ten publications with training in between are
    in the log only."""
    log = DeltaLog(folder)
    peer = new_exchange(1, log=log)
    trainer = Trainer(peer, 3)
    trainer.train()
    saved, weights = peer.displacement().clone(), peer.weights.clone()
    basepoint, applied, paid = peer.replica.basepoint.clone(), peer.replica.applied.encode(), peer.paid.encode()
    start = peer.replica.weights()
    for n in range(1, 11):
        trainer.train()
        peer.publish(n, 0.5)
    log.close()
    replica = Replica(LAYOUT, terms().codec)
    replica.restore(basepoint, AppliedSet.decode(applied, len(LAYOUT.chunks)))
    who = author(1)
    back = Exchange(
        replica, weights, OuterRule(), (who.public_key, who.sign), STREAM, DeltaLog(folder), terms(), StillClock(),
        displacement=saved.clone(), paid=paid,
    )  # fmt: skip
    return peer, back, saved, start


def test_displacement_lies_between_nothing_and_what_the_checkpoint_held(tmp_path: Path) -> None:
    peer, back, saved, _ = crash_and_return(tmp_path)
    owing = back.displacement().clone()
    back.keep_unpublished(saved)
    kept = back.displacement()
    assert back.replica.state() == peer.replica.state()
    assert bool((kept * saved >= 0).all()) and bool((kept.abs() <= saved.abs()).all())
    inside = (owing * saved >= 0) & (owing.abs() <= saved.abs())
    assert torch.equal(kept[inside], owing[inside]), "what is left of it is untouched"
    assert torch.equal(back.weights, back.replica.weights() + kept)


def test_the_next_publication_does_not_take_back_what_was_published(tmp_path: Path) -> None:
    """Without training, a peer that owes its lost work would publish the opposite of it."""
    _, owing, _, start = crash_and_return(tmp_path / "owing")
    _, kept, saved, _ = crash_and_return(tmp_path / "kept")
    kept.keep_unpublished(saved)
    learned = owing.replica.weights() - start
    after = []
    for exchange in (owing, kept):
        before = exchange.replica.weights()
        for n in range(11, 16):
            exchange.publish(n, 0.5)
        after.append(float(torch.dot(exchange.replica.weights() - before, learned) / torch.dot(learned, learned)))
    assert after[0] < -0.2, "the fault that this rule is against"
    assert after[1] > after[0] / 4, "what is left is the checkpoint's own displacement"


def test_without_a_checkpoint_nothing_is_owed(tmp_path: Path) -> None:
    _, back, _, _ = crash_and_return(tmp_path)
    back.keep_unpublished(None)
    assert back.displacement_norm() == 0.0
    assert torch.equal(back.weights, back.replica.weights())
