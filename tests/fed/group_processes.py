"""Starts processes of a group on this machine, as torchrun would, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORKER = Path(__file__).parent / "group_worker.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return {
        **os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def run_ranks(size: int, arguments: Sequence[str], script: Path = WORKER) -> None:
    """All ranks of one group; fails with the first rank's last words if one fails."""
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, str(script), *arguments], env=rank_environment(rank, size, port), stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in processes]
    failed = [words[-1500:] for words, code in ended if code != 0]
    assert not failed, failed[0]
