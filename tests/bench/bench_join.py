"""How long until a newcomer is useful? Real processes on loopback: a seed of the demo's run, then joiners one after the other.

    python tests/bench/bench_join.py [--joins 3] [--config configs/demo-cpu.toml]

Prints, from the start of `tscale-peer --bootstrap`: run learned, basepoint here, first own delta held by another peer; and beside it, in
the same run, what nobody can beat: a process that only imports torch and reads the same text from the disk.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tscale_fed.control_client import ControlClient
from tscale_fed.status import Status
from tscale_net.errors import Refused
from tscale_net.sockets import listening_pair

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
LOOK_EVERY_S = 0.02
PEER = [sys.executable, "-c", "import sys; from tscale_fed.cli import peer_main; sys.exit(peer_main())"]


def start(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    log = (home.parent / f"{home.name}.log").open("wb")
    return subprocess.Popen([*PEER, "--home", str(home), "--threads", "1", *arguments], stdout=log, stderr=log, cwd=ROOT)


def snapshot(home: Path) -> Status | None:
    try:
        return ControlClient(home).snapshot()
    except (Refused, OSError):
        return None


def waited(home: Path, since: float, condition: Callable[[Status], bool]) -> float:
    """Seconds since `since` until the peer's snapshot satisfies the condition."""
    while time.monotonic() - since < DEADLINE_S:
        status = snapshot(home)
        if status is not None and condition(status):
            return time.monotonic() - since
        time.sleep(LOOK_EVERY_S)
    raise SystemExit(f"not within {DEADLINE_S:.0f} s; the peer's last words:\n" + (home.parent / f"{home.name}.log").read_text()[-2000:])


def joined(folder: Path, number: int, port: int) -> dict[str, float]:
    """One newcomer, from the command line to its first delta, then stopped."""
    home = folder / f"peer-{number}"
    began = time.monotonic()
    process = start(home, "--bootstrap", f"127.0.0.1:{port}", "--listen", "127.0.0.1:0")
    try:
        answers = waited(home, began, lambda s: True)
        here = waited(home, began, lambda s: s.phase == "training" and s.basepoint_hash != "")
        status = snapshot(home)
        assert status is not None
        me = status.peer
        held = waited(folder / "seed", began, lambda s: any(p.id == me and p.last_delta_s is not None for p in s.peers))
        return {"answers": answers, "basepoint here": here, "first delta held by the seed": held}
    finally:
        process.terminate()
        process.wait()


def baseline(folder: Path) -> float:
    """Import torch and copy the seed's text and basepoint, in a fresh process."""
    files = [str(path) for path in (folder / "seed" / "data").rglob("*") if path.is_file()]
    code = "import sys, torch, pathlib\nfor f in sys.argv[1:]: pathlib.Path(f).read_bytes()"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--joins", type=int, default=3)
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo-cpu.toml"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = listening_pair("127.0.0.1", 0)
        port = first.getsockname()[1]
        first.close()
        second.close()
        seed = start(folder / "seed", "--role", "seed", "--config", arguments.config, "--listen", f"127.0.0.1:{port}")
        try:
            waited(folder / "seed", time.monotonic(), lambda s: s.wire.deltas_sent >= 1)
            floor = statistics.median(baseline(folder) for _ in range(arguments.joins))
            print(f"baseline: import torch and read the same files             {floor:6.2f} s", flush=True)
            runs = [joined(folder, n, port) for n in range(arguments.joins)]
        finally:
            seed.terminate()
            seed.wait()
    for stage in runs[0]:
        times = [run[stage] for run in runs]
        median = statistics.median(times)
        print(f"{stage:30s} median {median:6.2f} s  ({min(times):.2f}..{max(times):.2f})  {median / floor:5.1f} x baseline")


if __name__ == "__main__":
    main()
