"""Processes that stand still, and the end of everybody but one home."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
from log_oracle import rebuilt
from process_kit import Swarm, agreed_state, free_port, resume, write_run

STALL_S = 5.0
"""What is tested is that so long a silence is borne: the one wait here that is not for a condition."""


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_a_process_that_is_stopped_for_5_seconds_is_not_taken_for_dead(swarm: Swarm, tmp_path: Path) -> None:
    seed = swarm.seed(write_run(tmp_path / "run"), free_port())
    seed.training()
    ann = swarm.join("ann", seed.address)
    for peer in (seed, ann):
        peer.until(lambda s: [row.state for row in s.peers] == ["live"] and s.wire.deltas_applied > 0, "a live neighbour and its deltas")
    ann.signal(signal.SIGSTOP)
    time.sleep(STALL_S)
    during = seed.look()
    ann.signal(signal.SIGCONT)
    assert during is not None and [row.state for row in during.peers] in (["live"], ["suspect"])
    applied = seed.training().wire.deltas_applied
    seed.until(lambda s: s.wire.deltas_applied > applied + 1, "deltas of the peer that stood still")
    ann.until(lambda s: [row.state for row in s.peers] == ["live"], "the other one, live")
    for peer in (seed, ann):
        assert "is gone" not in peer.text() and "is down" not in peer.text(), peer.text()
    agreed_state([seed, ann])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_are_killed_and_one_home_is_left(swarm: Swarm, tmp_path: Path) -> None:
    """Every other home is deleted. The run goes on from the one that is left, with the same hash, and newcomers join it."""
    # Long intervals: the last 32 states reach back to the start when it is looked at.
    config, port = write_run(tmp_path / "run", checkpoint_s=1, publish_every_steps=60), free_port()
    seed = swarm.seed(config, port)
    seed.training()
    ann, bob = swarm.join("ann", seed.address), swarm.join("bob", seed.address)
    for peer in (ann, bob):
        peer.until(lambda s: s.wire.deltas_sent > 0 and s.wire.deltas_applied > 1, "exchange")
    seed.until(lambda s: any(seed.home.glob("checkpoints/checkpoint-*")), "checkpoint")
    state = agreed_state([seed, ann, bob])
    for peer in (seed, ann, bob):
        peer.kill()
    for peer in (ann, bob):
        shutil.rmtree(peer.home)

    seed = swarm.start("seed", "--role", "seed", "--listen", f"127.0.0.1:{port}")
    seed.training()
    assert "checkpoint of step" in seed.text()
    seed.command("pause")
    seed.until(lambda s: s.phase == "paused", "pause")
    status = seed.until(lambda s: bool(s.recent), "recent states")
    assert state in {(row.applied_digest, row.basepoint_hash) for row in status.recent}, "through the very state in which all died"

    resume([seed])
    newcomers = [swarm.join(name, seed.address) for name in ("cat", "dan")]
    for peer in newcomers:
        peer.until(lambda s: s.wire.deltas_sent > 0 and s.wire.deltas_applied > 0, "exchange of a newcomer")
    assert agreed_state([seed, *newcomers]) == rebuilt(seed.home, tmp_path / "copy")
