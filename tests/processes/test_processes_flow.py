"""Three real processes: deltas flow in all directions, replicas agree bit for bit, the status says so, the text arrives whole; leaving."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from log_oracle import assert_contiguous, manifest_of, packets_of, rebuilt
from process_kit import PeerProcess, Swarm, agreed_state, environment, free_port, program, resume, write_run

from tscale_fed.data.manifest import MANIFEST_FILE, read_manifest
from tscale_fed.new_run import recipe_of
from tscale_fed.status import Status

STATUS_FIELDS = """run peer name role uptime_s step tokens train_loss swarm_loss basepoint_hash applied_digest recent busy_fraction
peers wire refused"""
PEER_FIELDS = "id name path state rtt_ms share lag last_delta_s"
WIRE_FIELDS = "up_bytes down_bytes bytes_per_param"


@pytest.mark.timeout(240)
def test_three_peers_exchange_agree_and_leave(swarm: Swarm, tmp_path: Path) -> None:
    seed = swarm.seed(write_run(tmp_path / "run", eval_s=5), free_port())
    seed.training()
    ann, bob = swarm.join("ann", seed.address), swarm.join("bob", seed.address)
    peers = [seed, ann, bob]
    for peer in peers:
        peer.until(_hears_two_others, "deltas of both others")
    _check_status_json(seed)

    state = agreed_state(peers)
    logs = {peer.home.name: packets_of(peer.home, tmp_path / "copy") for peer in peers}
    assert rebuilt(seed.home, tmp_path / "copy") == state
    assert_contiguous(seed.home, tmp_path / "copy")
    for name in ("ann", "bob"):
        assert logs[name].items() <= logs["seed"].items(), f"{name} keeps other bytes under a number than the seed"
    assert {key for key in logs["seed"] if key in logs["ann"]} & {key for key in logs["bob"]}
    _check_text(seed, ann)
    resume(peers)

    _check_leaving(seed, ann, bob)


def _hears_two_others(status: Status) -> bool:
    heard = [row for row in status.peers if row.last_delta_s is not None and row.state == "live"]
    return len(heard) == 2 and status.wire.deltas_sent >= 2 and status.swarm_loss is not None


def _check_status_json(peer: PeerProcess) -> None:
    command = [program("tscale-status"), "--home", str(peer.home), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert shown.returncode == 0, shown.stderr
    status = json.loads(shown.stdout)
    assert set(STATUS_FIELDS.split()) <= status.keys()
    assert len(status["peers"]) == 2 and all(set(PEER_FIELDS.split()) <= row.keys() for row in status["peers"])
    assert set(WIRE_FIELDS.split()) <= status["wire"].keys()
    assert 0.12 < status["wire"]["bytes_per_param"] < 0.15 and status["wire"]["up_bytes"] > 0 and status["wire"]["down_bytes"] > 0
    assert status["step"] > 0 and status["tokens"] > 0 and status["train_loss"] > 0 and status["swarm_loss"] > 0
    assert 0 < status["busy_fraction"] <= 1 and status["role"] == "seed" and len(status["run"]) == 64
    assert 1 <= len(status["recent"]) <= 32
    newest = {"applied_digest": status["applied_digest"], "basepoint_hash": status["basepoint_hash"]}
    assert newest in status["recent"] and all(len(value) == 64 for pair in status["recent"] for value in pair.values())
    assert all(row["rtt_ms"] is None or row["rtt_ms"] > 0 for row in status["peers"])


def _check_text(seed: PeerProcess, joiner: PeerProcess) -> None:
    """The joiner was given nothing but an address: its text came from the seed, byte for byte."""
    (source,), (copy,) = (list(peer.home.glob(f"data/*/{MANIFEST_FILE}")) for peer in (seed, joiner))
    manifest = read_manifest(source.parent)
    assert manifest == read_manifest(copy.parent)
    names = [file.name for file in recipe_of(manifest_of(seed.home))[1].files()]
    assert names
    for name in names:
        assert (source.parent / name).read_bytes() == (copy.parent / name).read_bytes(), name


def _check_leaving(seed: PeerProcess, ann: PeerProcess, bob: PeerProcess) -> None:
    """Once: publish, hand over, go, by SIGINT as by SIGTERM. Twice: gone at once."""
    ann.signal(signal.SIGINT)
    assert ann.ends() == 0, ann.text()
    assert "a neighbour holds all my deltas" in ann.text()
    seed.until(lambda s: {row.name: row.state for row in s.peers}["ann"] == "left", "ann gone in order")

    seed.signal(signal.SIGSTOP)  # nobody confirms bob's last deltas, so bob would wait
    bob.signal(signal.SIGINT)
    bob.until_says("Ctrl+C again stops at once")
    bob.signal(signal.SIGINT)
    assert bob.ends(deadline_s=5) == 130
    seed.signal(signal.SIGCONT)

    seed.signal(signal.SIGTERM)
    assert seed.ends() == 0, seed.text()
    assert "leaving: publishing" in seed.text()
    assert all("Traceback" not in peer.text() for peer in (seed, ann, bob))
