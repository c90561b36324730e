"""`--gpus N`: the processes of this host, one per GPU, started, watched and ended together.

Enters: a command, N. Leaves: an exit code and at most one sentence. Rank 0 writes to the terminal; of the others only what explains a
failure is shown. They get sessions of their own, so that Ctrl+C reaches the launcher alone, which passes it on once to each. When one
process dies the others are asked to end (rank 0 saves if it can), then killed after a while.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from tscale_fed.parallel import limits
from tscale_fed.parallel.world import ADDRESS, LOCAL_RANK, LOCAL_SIZE, PORT, RANK, SIZE

LAUNCHER = "TSCALE_LAUNCHER"
"""Process id of the launcher, in the environment of its processes: they end when it is gone."""
EXIT_LOST = 3
"""A process that ended because another one was lost: it has nothing of its own to tell."""
STOP_ANSWER = "finishing the step and saving; Ctrl+C again stops now"
LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def rank_environments(base: Mapping[str, str], ranks: int, port: int) -> list[dict[str, str]]:
    """One environment for each process of a run on this host alone, as torchrun would give it."""
    shared = {**base, ADDRESS: LOOPBACK, PORT: str(port), SIZE: str(ranks), LOCAL_SIZE: str(ranks), "NCCL_NVLS_ENABLE": "0"}
    if os.path.isdir("/sys/class/net/lo"):  # all ranks are here, so nothing may look for another network
        shared = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", **shared}
    return [{**shared, RANK: str(rank), LOCAL_RANK: str(rank), LAUNCHER: str(os.getpid())} for rank in range(ranks)]


class Launcher:
    """Runs `command` in `ranks` processes."""

    def __init__(self, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._ranks = ranks
        self._environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signals: list[int] = []
        """Received and not yet passed on."""
        self._asked = False
        """Whether the processes have been asked to end: a second time would mean at once, without saving."""

    def run(self) -> tuple[int, str | None]:
        """(exit code, sentence for people or None). No process outlives it."""
        with tempfile.TemporaryDirectory(prefix="tscale-ranks-") as folder:
            earlier = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                self._start(Path(folder))
                first = self._watch()
                return self._verdict(first, Path(folder))
            finally:
                for process in self._processes:
                    process.kill()
                    process.wait()
                for number, handler in earlier.items():
                    signal.signal(number, handler)

    def _start(self, folder: Path) -> None:
        for rank, environment in enumerate(rank_environments(self._environment, self._ranks, free_port())):
            with (folder / str(rank)).open("wb") as errors:
                self._processes.append(
                    subprocess.Popen(self._command, env=environment, stderr=None if rank == 0 else errors, start_new_session=True)
                )

    def _watch(self) -> int | None:
        """Until all have ended: the rank whose failure came first, if one failed."""
        first: int | None = None
        end_s: float | None = None
        while any(process.poll() is None for process in self._processes):
            self._pass_on()
            codes = [process.poll() for process in self._processes]
            if first is None:
                first = next((rank for rank, code in enumerate(codes) if code not in (None, 0, EXIT_LOST)), None)
                if first is not None and not self._asked:
                    self._ask(signal.SIGTERM)
            if end_s is None and any(code is not None for code in codes):
                end_s = time.monotonic() + limits.END_S
            if end_s is not None and time.monotonic() > end_s:
                for process in self._processes:
                    process.kill()
            time.sleep(limits.WATCH_S)
        codes = [process.returncode for process in self._processes]
        return first if first is not None else next((rank for rank, code in enumerate(codes) if code), None)

    def _verdict(self, first: int | None, folder: Path) -> tuple[int, str | None]:
        if first is None:
            return 0, None
        code = self._processes[first].returncode
        if code < 0:
            name = signal.Signals(-code).name
            sentence = f"rank {first} of {self._ranks} was ended by {name}, so the others ended too: "
            return 1, sentence + "the same command goes on from the last checkpoint"
        if first == 0:
            return code, None  # it has told its reason itself
        said = (folder / str(first)).read_text(errors="replace").strip().splitlines()
        reason = said[-1].partition(": ")[2] or said[-1] if said else f"exit code {code}"
        return code, f"rank {first} of {self._ranks}: {reason}"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _pass_on(self) -> None:
        while self._signals:
            if not self._asked:
                print(STOP_ANSWER, file=sys.stderr, flush=True)
            self._ask(self._signals.pop(0))

    def _ask(self, number: int) -> None:
        self._asked = True
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)
