"""Three real processes whose chunks have owners: everybody's work is in sums, replicas agree bit for bit, one is killed and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from log_oracle import manifest_of, packets_of, rebuilt
from process_kit import PeerProcess, Swarm, agreed_state, free_port, resume, write_run

from tscale_fed.status import Status
from tscale_peers.packet import SUM_STREAM


@pytest.mark.timeout(240)
@pytest.mark.parametrize("power_cut", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_work_goes_through_owners(swarm: Swarm, tmp_path: Path, power_cut: bool) -> None:
    run = write_run(tmp_path / "run", chunk_params=32768, spread="owners", checkpoint_s=1)
    seed = swarm.seed(run, free_port())
    seed.training()
    peers = [seed, swarm.join("ann", seed.address), swarm.join("bob", seed.address)]
    for peer in peers:
        peer.until(_gives_to_owners, "sums that list its contributions")
    owned = [peer.until(lambda s: True, "status").spread.owned_chunks for peer in peers]
    assert sum(owned) == len(manifest_of(seed.home).layout().chunks) and min(owned) > 0, "every chunk has one owner"

    state = agreed_state(peers)
    assert rebuilt(seed.home, tmp_path / "copy") == state, "the basepoint is the start weights and the packets of the log"
    sums = [key for key in packets_of(seed.home, tmp_path / "copy") if int.from_bytes(key[0][32:], "little") & SUM_STREAM]
    assert len({key[0] for key in sums}) == 3, "three owners published sums"
    if power_cut:
        resume(peers)
        _kill_one(swarm, peers)
    assert all("Traceback" not in peer.text() for peer in peers)


def _kill_one(swarm: Swarm, peers: list[PeerProcess]) -> None:
    seed = peers[0]
    confirmed = seed.until(lambda s: True, "status").spread.confirmed
    peers[2].kill()
    seed.until(lambda s: s.spread.confirmed > confirmed + 20, "sums of those that are left")
    peers[2] = swarm.start("bob")
    peers[2].until(_gives_to_owners, "sums again")
    agreed_state(peers)


def _gives_to_owners(status: Status) -> bool:
    return status.spread.by_owners and status.spread.confirmed >= 40 and status.spread.summed >= 40
