"""Real `tscale-peer` processes on loopback: start them, look at them through their control sockets, kill them.

Enters: a folder of the test, flags. Leaves: `PeerProcess` objects whose states are awaited with a deadline; a deadline that passes fails
with the peer's own output. Nothing here relies on how long something takes: waiting ends when the condition holds.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tscale_fed.control_client import ControlClient
from tscale_fed.status import Status
from tscale_net.errors import Refused

LOOPBACK = "127.0.0.1"
ANY_PORT = f"{LOOPBACK}:0"
DEADLINE_S = 60.0
"""Far above what any of these steps takes on two busy cores."""
POLL_S = 0.05
SETTLED_S = 2.5
"""Two idle meetings of a paused peer."""
TEXT_BYTES = 200_000

RUN_FILE = """
[run]
name = "tiny"
seed = {seed}
[model]
dims = "e128h1d2w32"
[data]
sources = ["text.txt"]
tokenizer = "bytes"
[batch]
fragments = 2
length = 32
[optimizer]
rate = 0.01
warmup_batches = 10
join_warmup_steps = 3
[swarm]
budget_batches = 100000
publish_every_steps = {publish_every_steps}
chunk_params = {chunk_params}
spread = "{spread}"
displacement_max_age_batches = {max_age_batches}
[eval]
every_s = {eval_s}
fragments = 2
batches = 1
[checkpoint]
every_s = {checkpoint_s}
"""


def write_run(
    folder: Path,
    *,
    seed: int = 1,
    publish_every_steps: int = 3,
    max_age_batches: int = 2000,
    eval_s: float = 0,
    checkpoint_s: float = 1000,
    chunk_params: int = 65536,
    spread: str = "auto",
) -> Path:
    """A run file and its text in `folder`: a model of 0.3 million weights in several chunks, a step of some milliseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(made_up_text(TEXT_BYTES))
    path = folder / "run.toml"
    path.write_text(
        RUN_FILE.format(
            seed=seed,
            publish_every_steps=publish_every_steps,
            max_age_batches=max_age_batches,
            eval_s=eval_s,
            checkpoint_s=checkpoint_s,
            chunk_params=chunk_params,
            spread=spread,
        )
    )
    return path


def made_up_text(size: int) -> str:
    """Paragraphs of words in a fixed pseudo-random order."""
    rng = random.Random(7)
    words = "peer delta swarm token basepoint share chunk seed gossip packet stream number home link door frame".split()
    lines: list[str] = []
    while size > 0:
        line = " ".join(rng.choices(words, k=12)) + (".\n\n" if rng.random() < 0.1 else ".\n")
        lines.append(line)
        size -= len(line)
    return "".join(lines)


def free_port() -> int:
    """A port whose successor is free too: links and hello door."""
    while True:
        with socket.socket() as links, socket.socket() as door:
            links.bind((LOOPBACK, 0))
            port = int(links.getsockname()[1])
            try:
                door.bind((LOOPBACK, port + 1))
            except (OSError, OverflowError):
                continue
            return port


def program(name: str) -> str:
    """The installed console script beside this interpreter."""
    path = Path(sys.executable).with_name(name)
    assert path.exists(), f"{path} is missing: install the project (`pip install -e .`) before these tests"
    return str(path)


def environment(**changes: str) -> dict[str, str]:
    """Of child processes: one thread for every library, no home of the user."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONUNBUFFERED": "1", **changes}


class PeerProcess:
    """One running `tscale-peer`."""

    def __init__(self, home: Path, flags: Sequence[str], *, name: str = "tscale-peer") -> None:
        self.home = home
        self._client = ControlClient(home)
        home.parent.mkdir(parents=True, exist_ok=True)
        self.out = home.with_name(home.name + ".out")
        self.err = home.with_name(home.name + ".err")
        command = [program(name), "--home", str(home), "--threads", "1", "--device", "cpu", *flags]
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment())

    # -- looking -----------------------------------------------------------------------------------------------------

    def look(self) -> Status | None:
        """The snapshot now; None while there is none to be had."""
        try:
            return self._client.snapshot()
        except Refused:
            return None

    def until(self, condition: Callable[[Status], bool], what: str, deadline_s: float = DEADLINE_S) -> Status:
        """The first snapshot for which `condition` holds. Fails with the peer's output if it ends or the deadline passes."""
        end = time.monotonic() + deadline_s
        last: Status | None = None
        while time.monotonic() < end:
            last = self.look() or last
            if last is not None and condition(last):
                return last
            assert self.process.poll() is None, f"{self.home.name} ended while {what} was awaited\n{self.text()}"
            time.sleep(POLL_S)
        raise AssertionError(f"{self.home.name}: no {what} within {deadline_s:.0f} s\n{_summary(last)}\n{self.text()}")

    def until_says(self, sentence: str, deadline_s: float = DEADLINE_S) -> str:
        """Wait for a line of output that contains `sentence`, and return it."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            for line in self.text().splitlines():
                if sentence in line:
                    return line
            assert self.process.poll() is None or sentence in self.text(), f"{self.home.name} ended without {sentence!r}\n{self.text()}"
            time.sleep(POLL_S)
        raise AssertionError(f"{self.home.name} did not say {sentence!r}\n{self.text()}")

    def text(self) -> str:
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def training(self, steps: int = 1) -> Status:
        return self.until(lambda s: s.phase == "training" and s.step >= steps, "training")

    @property
    def address(self) -> str:
        """A multiaddr with the peer's id, for --bootstrap."""
        status = self.until(lambda s: bool(s.addresses), "address")
        return status.addresses[0]

    # -- doing -------------------------------------------------------------------------------------------------------

    def command(self, name: str) -> str:
        return self._client.command(name)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a power cut: SIGKILL, gone when this returns."""
        self.process.kill()
        self.process.wait()

    def ends(self, deadline_s: float = DEADLINE_S) -> int:
        """The exit code, once it has ended."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.home.name} did not end within {deadline_s:.0f} s\n{self.text()}") from None


class Swarm:
    """The processes of one test, in one folder; all are gone when the test ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peers: list[PeerProcess] = []

    def seed(self, config: Path, port: int, name: str = "seed", *flags: str) -> PeerProcess:
        return self.start(name, "--role", "seed", "--config", str(config), "--listen", f"{LOOPBACK}:{port}", *flags)

    def join(self, name: str, bootstrap: str, *flags: str) -> PeerProcess:
        return self.start(name, "--bootstrap", bootstrap, "--listen", ANY_PORT, *flags)

    def start(self, name: str, *flags: str) -> PeerProcess:
        """`name` is the peer's name and its home's; a name used before starts from the same home again."""
        peer = PeerProcess(self.folder / name, ["--name", name, *flags])
        self.peers.append(peer)
        return peer

    def close(self) -> None:
        for peer in self.peers:
            if peer.process.poll() is None:
                peer.kill()


def agreed_state(peers: Sequence[PeerProcess], deadline_s: float = DEADLINE_S) -> tuple[str, str]:
    """Pause everybody, wait until all replicas are of one state, and return its (applied digest, basepoint hash)."""
    for peer in peers:
        peer.command("pause")
    for peer in peers:
        peer.until(lambda s: s.phase == "paused", "pause")
    return same_state(peers, deadline_s)


def same_state(peers: Sequence[PeerProcess], deadline_s: float = DEADLINE_S) -> tuple[str, str]:
    """The state of all of them, once it is one and the same for a while: a delta may still be on its way, and a snapshot a second old."""
    end = time.monotonic() + deadline_s
    states: dict[str, tuple[str, str]] = {}
    since, common = time.monotonic(), ("", "")
    while time.monotonic() < end:
        states = {peer.home.name: (s.applied_digest, s.basepoint_hash) for peer in peers if (s := peer.look()) is not None}
        one = next(iter(states.values())) if len(states) == len(peers) and len(set(states.values())) == 1 else ("", "")
        if one != common or not all(one):
            since, common = time.monotonic(), one
        elif time.monotonic() - since >= SETTLED_S:
            return common
        time.sleep(POLL_S)
    outputs = "\n".join(f"--- {peer.home.name}\n{peer.text()}" for peer in peers)
    raise AssertionError(f"the replicas did not agree: {states}\n{outputs}")


def resume(peers: Iterable[PeerProcess]) -> None:
    for peer in peers:
        peer.command("resume")


def _summary(status: Status | None) -> str:
    if status is None:
        return "no snapshot"
    rows = {row.name: row.state for row in status.peers}
    return f"phase {status.phase}, step {status.step}, sent {status.wire.deltas_sent}, applied {status.wire.deltas_applied}, peers {rows}"
