"""Power cuts: SIGKILL of the seed, of a joiner without a checkpoint, of a peer that published while nobody could hear it."""

from __future__ import annotations

from pathlib import Path

import pytest
from log_oracle import assert_contiguous, packets_of, rebuilt
from process_kit import Swarm, agreed_state, free_port, resume, write_run

from tscale_fed.status import Status


def heard(status: Status) -> int:
    """From how many others deltas were applied."""
    return sum(row.last_delta_s is not None for row in status.peers)


@pytest.mark.timeout(300)
def test_the_swarm_outlives_its_seed(swarm: Swarm, tmp_path: Path) -> None:
    """The seed dies; the others go on, a newcomer joins through one of them, the restarted seed catches up; nothing counts twice."""
    config, port = write_run(tmp_path / "run", checkpoint_s=1), free_port()
    seed = swarm.seed(config, port)
    seed.training()
    ann, bob = swarm.join("ann", seed.address), swarm.join("bob", seed.address)
    for peer in (ann, bob):
        peer.until(lambda s: heard(s) == 2 and s.wire.deltas_sent > 0, "deltas of both others")
    seed.until(lambda s: any(seed.home.glob("checkpoints/checkpoint-*")) and (seed.home / "neighbours").exists(), "checkpoint")
    seed.kill()

    before = [peer.training().wire for peer in (ann, bob)]
    for peer, was in zip((ann, bob), before, strict=True):
        peer.until(lambda s, was=was: s.wire.deltas_sent > was.deltas_sent + 1, "publications without the seed")
        peer.until(lambda s, was=was: s.wire.deltas_applied > was.deltas_applied + 1, "deltas without the seed")
    cat = swarm.join("cat", bob.address)
    cat.until(lambda s: s.wire.deltas_sent > 0 and s.wire.deltas_applied > 0, "a delta of the newcomer")

    seed = swarm.seed(config, port, "seed")
    seed.until(lambda s: heard(s) == 3, "deltas of all three")
    assert "checkpoint of step" in seed.text()
    everybody = [seed, ann, bob, cat]
    state = agreed_state(everybody)
    assert_contiguous(seed.home, tmp_path / "copy")
    assert rebuilt(seed.home, tmp_path / "copy") == state


@pytest.mark.timeout(300)
def test_published_but_not_sent_survives_in_the_log(swarm: Swarm, tmp_path: Path) -> None:
    """The seed dies, then the joiner, which has published alone meanwhile; neither has a checkpoint. Both come back with everything."""
    config, port = write_run(tmp_path / "run"), free_port()
    seed = swarm.seed(config, port)
    seed.training()
    ann = swarm.join("ann", seed.address)
    ann.until(lambda s: s.wire.deltas_sent > 0 and s.wire.deltas_applied > 0, "exchange")
    seed.kill()
    alone = ann.training().wire.deltas_sent
    ann.until(lambda s: s.wire.deltas_sent >= alone + 2, "deltas that nobody hears")
    ann.kill()
    published = packets_of(ann.home, tmp_path / "copy").keys()
    unheard = published - packets_of(seed.home, tmp_path / "copy").keys()
    assert unheard and not list(ann.home.glob("checkpoints/*")) and not list(seed.home.glob("checkpoints/*"))

    seed = swarm.seed(config, port)
    seed.until(lambda s: True, "control socket")
    ann = swarm.join("ann", f"127.0.0.1:{port}")
    for peer in (seed, ann):
        peer.until(lambda s: s.wire.deltas_applied > 0 and s.wire.deltas_sent > 0, "exchange after the return")
        assert "own packets recovered from the log" in peer.text()
    state = agreed_state([seed, ann])
    assert published <= packets_of(seed.home, tmp_path / "copy").keys()
    assert_contiguous(seed.home, tmp_path / "copy")
    assert rebuilt(seed.home, tmp_path / "copy") == state


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_in_the_moment_of_publication(swarm: Swarm, tmp_path: Path) -> None:
    """The joiner dies the moment its count rises, twice, before it can hear that it arrived; all of it is applied exactly once."""
    seed = swarm.seed(write_run(tmp_path / "run", publish_every_steps=2), free_port())
    seed.training()
    for _ in range(2):
        ann = swarm.join("ann", seed.address)
        count = ann.training().wire.deltas_sent
        ann.until(lambda s, count=count: s.wire.deltas_sent > count, "publication")
        ann.kill()
    ann = swarm.join("ann", seed.address)
    ann.until(lambda s: s.wire.deltas_sent > 0, "publication after the return")
    state = agreed_state([seed, ann])
    assert rebuilt(seed.home, tmp_path / "copy") == state
    assert_contiguous(seed.home, tmp_path / "copy")
    resume([seed, ann])
    assert seed.command("stop")
    assert seed.ends() == 0, seed.text()
    ann.until(lambda s: [row.state for row in s.peers] == ["left"], "seed gone in order")
    assert agreed_state([ann])
