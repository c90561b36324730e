"""What is simulated. Checked at construction, with the flag's own name in every sentence.

Enters: numbers from the command line. Leaves: a `Scenario`, or Refused("bad-scenario").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tscale_net.errors import Refused

Model = Literal["none", "tiny"]
MOST_PEERS = 256
"""A full list of members is what peers are made for up to here."""
MOST_MINUTES = 7 * 24 * 60
DEFAULT_INTERVAL_S = {"none": 60.0, "tiny": 5.0}
"""A delta a minute is what home links allow a large model; a small one learns by short intervals."""
STEPS_PER_INTERVAL = {"none": 2, "tiny": 5}
"""A made-up step stands for many: it is cheap, and packets are applied between steps. Those of the model are real."""
HALF = 0.5


@dataclass(frozen=True, slots=True)
class Partition:
    """From one minute to another no packet passes between two parts of the swarm."""

    begin_minute: float
    end_minute: float
    part: float = HALF
    """Of the peers that the first part has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """See tscale_fed/commands/sim.py for what each flag means. Raises Refused("bad-scenario")."""

    peers: int = 16
    minutes: float = 10.0
    rate_mbit: float = 100.0
    latency_ms: float = 50.0
    loss: float = 0.0
    kill: float = 0.0
    rejoin_s: float = 20.0
    replace_per_hour: float = 0.0
    partition: Partition | None = None
    speeds: tuple[float, ...] = (1.0,)
    lags: tuple[float, ...] = (1.0,)
    dial_only: float = 0.0
    bad_clock_s: float = 0.0
    stall_s: float = 0.0
    disk_ms: float = 0.0
    uneven: float = 0.0
    codec: str = "sign"
    spread: Literal["auto", "flood", "owners"] = "auto"
    interval_s: float = 0.0
    model: Model = "none"
    signatures: Literal["real", "none"] = "none"
    seed: int = 1

    def __post_init__(self) -> None:
        _between("--peers", self.peers, 1, MOST_PEERS)
        _between("--minutes", self.minutes, 0.1, MOST_MINUTES)
        _between("--rate-mbit", self.rate_mbit, 0.001, 1e6)
        _between("--latency-ms", self.latency_ms, 0, 10_000)
        _between("--loss", self.loss, 0, 0.5)
        _between("--kill", self.kill, 0, 1)
        _between("--rejoin", self.rejoin_s, 0.1, 24 * 3600)
        _between("--replace-per-hour", self.replace_per_hour, 0, 100)
        _between("--dial-only", self.dial_only, 0, 1)
        _between("--bad-clock", self.bad_clock_s, 0, 7 * 24 * 3600)
        _between("--stall", self.stall_s, 0, 3600)
        _between("--slow-disk", self.disk_ms, 0, 60_000)
        _between("--uneven", self.uneven, 0, 10)
        _between("--interval", self.interval_s, 0, 24 * 3600)
        for speed in self.speeds:
            _between("--speeds", speed, 0.001, 1000)
        for lag in self.lags:
            _between("--lags", lag, 0.001, 1000)
        self._check_partition()
        self._check_codec()

    def _check_partition(self) -> None:
        part = self.partition
        if part is None:
            return
        if not 0 <= part.begin_minute < part.end_minute <= self.minutes:
            span = f"{part.begin_minute:g}-{part.end_minute:g}"
            raise _bad(f"--partition {span}: write two minutes of the run, the first before the second, up to {self.minutes:g}")
        _between("--partition", part.part, 0, 1)
        if self.peers < 2:
            raise _bad("--partition: a single peer cannot be divided; use --peers 2 or more")

    def _check_codec(self) -> None:
        from tscale_peers.codec import codec_fault

        fault = codec_fault(self.codec)
        if fault is not None:
            raise _bad(f"--codec: {fault}")

    @property
    def publish_interval_s(self) -> float:
        """Between two publications of a peer of speed 1."""
        return self.interval_s or DEFAULT_INTERVAL_S[self.model]

    @property
    def steps_per_interval(self) -> int:
        return STEPS_PER_INTERVAL[self.model]

    @property
    def step_s(self) -> float:
        """One step of a peer of speed 1."""
        return self.publish_interval_s / self.steps_per_interval

    @property
    def line_bytes_s(self) -> float:
        """Up, and down."""
        return self.rate_mbit * 1e6 / 8

    @property
    def checkpoint_s(self) -> float:
        """Peers save as often as they publish, and so lose as much by a kill as they would have sent."""
        return self.publish_interval_s


def _between(flag: str, value: float, least: float, most: float) -> None:
    if not math.isfinite(value) or not least <= value <= most:
        raise _bad(f"{flag} {value:g}: must lie between {least:g} and {most:g}")


def _bad(detail: str) -> Refused:
    return Refused("bad-scenario", detail)
