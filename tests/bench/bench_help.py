"""Start time of the programs: `tscale-peer --help` above `python -c pass`, median of 20 runs each, alternating. Goal: at most 60 ms.

Run: .venv/bin/python tests/bench/bench_help.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 20
GOAL_MS = 60.0


def milliseconds(command: list[str]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - started) * 1000


def main() -> int:
    """Print the table; exit code 1 if a program misses the goal."""
    folder = Path(sys.executable).parent
    if not (folder / "tscale-peer").exists():
        print(f"no tscale-peer beside {sys.executable}: run `make set-up` first", file=sys.stderr)
        return 2
    empty = [sys.executable, "-c", "pass"]
    programs = [[str(folder / name), "--help"] for name in ("tscale-peer", "tscale-status", "tscale")]
    times: dict[str, list[float]] = {}
    for _ in range(RUNS):
        for command in (empty, *programs):
            times.setdefault(" ".join([Path(command[0]).name, *command[1:]]), []).append(milliseconds(command))
    base = statistics.median(next(iter(times.values())))
    missed = False
    for name, measured in times.items():
        above = statistics.median(measured) - base
        missed |= above > GOAL_MS
        print(
            f"{name:<28} median {statistics.median(measured):6.1f} ms  above `python -c pass` {above:6.1f} ms  best {min(measured):6.1f} ms"
        )
    print(f"goal: at most {GOAL_MS:.0f} ms above: {'missed' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
