"""Programs that must refuse to run: start many, two at a time, and keep what each said.

Enters: cases by name. Leaves: exit code, stderr, and the home as it was left. One sentence on stderr, an exit code other than 0, nothing
half-written: that is what every case has in common.
"""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from process_kit import environment, program

from tscale_peers.manifest import RunManifest

TIMEOUT_S = 90
AT_ONCE = 2
LEFTOVERS = ("*.unfinished*", ".unfinished*", "*.making", ".*.[0-9]*")
"""Temporary names of files and folders that are renamed when they are whole."""


@dataclass(frozen=True, slots=True)
class Case:
    """A command that must fail. `says`: words that its sentence must contain; `file_bytes`: no file may grow beyond this (a full disk)."""

    command: Sequence[str]
    says: Sequence[str]
    home: Path | None = None
    code: int = 1
    untouched: bool = False
    """The home must not even be made."""
    file_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    said: str
    """stderr."""
    shown: str
    """stdout."""


def run(case: Case) -> Outcome:
    """Raises subprocess.TimeoutExpired if the program goes on instead."""
    name, *flags = case.command
    if case.home is not None:
        flags += ["--home", str(case.home)]
    done = subprocess.run(
        [program(name), *flags],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT_S,
        preexec_fn=_limit(case.file_bytes) if case.file_bytes is not None else None,
    )
    return Outcome(done.returncode, done.stderr, done.stdout)


def _limit(file_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def run_all(cases: Mapping[str, Case]) -> dict[str, Outcome]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(cases, pool.map(run, cases.values()), strict=True))


def check(case: Case, outcome: Outcome) -> None:
    """One clear sentence, the right exit code, nothing half-written."""
    assert outcome.code == case.code, outcome.said
    assert "Traceback" not in outcome.said and "a bug" not in outcome.said, outcome.said
    lines = [line for line in outcome.said.splitlines() if line.startswith(f"{case.command[0]}") and ": " in line]
    assert len(lines) == 1, outcome.said
    for words in case.says:
        assert words in outcome.said, outcome.said
    if case.home is not None:
        _check_home(case.home, case.untouched)


def _check_home(home: Path, untouched: bool) -> None:
    if untouched:
        assert not home.exists()
    if not home.is_dir():
        return
    leftovers = [path for pattern in LEFTOVERS for path in home.rglob(pattern)]
    assert not leftovers
    if (home / "manifest").exists():
        RunManifest.decode((home / "manifest").read_bytes())
