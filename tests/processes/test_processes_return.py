"""Coming back with work that the swarm does not have yet: kept if it is young; dropped, and said so, if the swarm has gone on for long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from log_oracle import rebuilt
from process_kit import PeerProcess, Swarm, agreed_state, free_port, write_run

from tscale_fed.checkpoint import CheckpointStore


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("max_age_batches", "sentence"),
    [
        pytest.param(100_000, "unpublished work of last time is kept", id="young", marks=pytest.mark.slow),
        pytest.param(5, "unpublished work of last time is dropped", id="old"),
    ],
)
def test_displacement_of_an_old_checkpoint(swarm: Swarm, tmp_path: Path, max_age_batches: int, sentence: str) -> None:
    config, port = write_run(tmp_path / "run", checkpoint_s=1, max_age_batches=max_age_batches), free_port()
    seed = swarm.seed(config, port)
    seed.training()
    ann = swarm.join("ann", seed.address)
    ann.until(lambda s: s.wire.deltas_sent > 0 and s.wire.deltas_applied > 0, "exchange")
    _kill_with_displacement(seed)
    batches = ann.training().swarm_batches or 0
    ann.until(lambda s: (s.swarm_batches or 0) > batches + 10, "ten batches without the seed")

    seed = swarm.seed(config, port)
    line = seed.until_says("unpublished work of last time")
    assert sentence in line
    age = int(re.findall(r"swarm has done (\d+) batches since", line)[0])
    assert age > 5
    seed.until(lambda s: s.wire.deltas_sent > 0, "publication after the return")
    state = agreed_state([seed, ann])
    assert rebuilt(seed.home, tmp_path / "copy") == state


def _kill_with_displacement(peer: PeerProcess) -> None:
    """SIGKILL once a checkpoint holds work that was not published, and the home knows whom to dial again."""

    def has_work(_: object) -> bool:
        checkpoint, _notes = CheckpointStore(peer.home / "checkpoints", 1).latest()
        return checkpoint is not None and bool(checkpoint.tensors["displacement"].any()) and (peer.home / "neighbours").exists()

    peer.until(has_work, "checkpoint with a displacement")
    peer.kill()
