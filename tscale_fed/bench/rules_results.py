"""The result file of the rules bench, to which several calls add up, and what is read off it.

Enters: rows that were run, calls (command, machine, text). Leaves: one JSON file, written after every row; derived figures; a table; a CSV
file of curves and, where matplotlib is installed, a plot.

A row is known by its name, seed, sizes, text and arithmetic: a call skips what the file has. Comparisons are made between rows of one seed,
size, number of bytes and schedule (constant or decayed), each with its own best rate for "one" and "sync":

    gap        (loss / loss of synchronous training - 1), equal tokens
    closed     (one - loss) / (one - sync)
    speed-up   steps that one peer needs to reach the row's loss / the row's ticks; from the curves of "one" rows, x=8 included
    MB to L    bytes that a peer has received when the curve crosses loss L
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tscale_fed.bench.machine import write_result
from tscale_fed.bench.rules_run import Ran
from tscale_net.errors import Refused

LEVELS = 4
"""Losses that "MB to L" is told for, at equal distances down to the best swarm's end."""


@dataclass
class Results:
    """See the module."""

    path: Path
    size: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Ran] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    """Per run: what else it is known by, and the number of its call."""

    @staticmethod
    def open(path: Path, size: str) -> Results:
        """The file as it is, or empty. Raises Refused("bad-bench") if it is something else."""
        if not path.exists():
            return Results(path, size)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            runs = [dict(each) for each in values["runs"]]
            settings = [each.pop("settings") for each in runs]
            found = [Ran(**{**each, "curve": [tuple(point) for point in each["curve"]]}) for each in runs]
            return Results(path, size, values["calls"], found, settings)
        except (ValueError, KeyError, TypeError):
            raise Refused("bad-bench", f"{path} is no result file of this bench: name another with --out") from None

    def has(self, name: str, seed: int, settings: dict[str, Any]) -> bool:
        known = zip(self.runs, self.settings, strict=True)
        return any(run.name == name and run.seed == seed and _same(other, settings) for run, other in known)

    def add(self, run: Ran, settings: dict[str, Any], call: dict[str, Any]) -> None:
        """Keep a row and write the file. Raises OSError."""
        if not self.calls or self.calls[-1] is not call:
            self.calls.append(call)
        self.runs.append(run)
        self.settings.append({**settings, "call": len(self.calls) - 1})
        self.write()

    def merge(self, other: Results) -> None:
        """Add the rows of another file that this one lacks, with their calls, and write. Raises OSError."""
        first = len(self.calls)
        self.calls.extend(other.calls)
        for run, settings in zip(other.runs, other.settings, strict=True):
            if not self.has(run.name, run.seed, settings):
                self.runs.append(run)
                self.settings.append({**settings, "call": settings["call"] + first})
        self.write()

    def every_settings(self) -> list[dict[str, Any]]:
        """All that differ, in the order in which they were run."""
        found: list[dict[str, Any]] = []
        for settings in self.settings:
            known = {name: value for name, value in settings.items() if name != "call"}
            if known not in found:
                found.append(known)
        return found

    def write(self) -> None:
        """The JSON file and the curves beside it. Raises OSError."""
        runs = [{**run.values(), "settings": settings} for run, settings in zip(self.runs, self.settings, strict=True)]
        write_result(self.path, {"bench": "rules", "size": self.size, "calls": self.calls, "runs": runs})
        self.path.with_suffix(".csv").write_text(self._curves(), encoding="utf-8")

    def _curves(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["row", "seed", "tick", "bytes_of_text", "received_mb", "loss", "loss_of_ema"])
        for run, settings in zip(self.runs, self.settings, strict=True):
            for tick, last, ema in run.curve:
                text = round(run.peer_steps * tick / run.ticks) * settings["batch"]
                writer.writerow([run.name, run.seed, tick, text, round(run.received_bytes * tick / run.ticks / 1e6, 3), last, ema])
        return out.getvalue()

    def table(self, settings: dict[str, Any]) -> list[str]:
        """Lines for people: all rows with these settings."""
        runs = [run for run, other in zip(self.runs, self.settings, strict=True) if _same(other, settings)]
        return table_lines(runs)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in other if name != "call")


# -- what is read off --------------------------------------------------------------------------------------------------


def peers_alike(runs: Sequence[Ran], run: Ran, kind: str) -> Ran | None:
    """The best row of a kind that `run` may be compared with."""
    alike = [each for each in runs if each.kind == kind and each.seed == run.seed and bool(each.decay) == bool(run.decay)]
    same_length = [each for each in alike if not each.failure and (kind != "one" or " x=" not in each.name)]
    return min(same_length, key=lambda each: each.best, default=None)


def gap(runs: Sequence[Ran], run: Ran) -> float | None:
    sync = peers_alike(runs, run, "sync")
    return None if sync is None or run.failure else run.best / sync.best - 1.0


def closed(runs: Sequence[Ran], run: Ran) -> float | None:
    one, sync = peers_alike(runs, run, "one"), peers_alike(runs, run, "sync")
    if one is None or sync is None or run.failure or one.best <= sync.best:
        return None
    return (one.best - run.best) / (one.best - sync.best)


def speed_up(runs: Sequence[Ran], run: Ran) -> tuple[float, bool] | None:
    """(steps of one peer by ticks of the row, whether one peer got there at all)."""
    alone = [each for each in runs if each.kind == "one" and each.seed == run.seed and bool(each.decay) == bool(run.decay)]
    if run.failure or not run.curve or not alone:
        return None
    wanted = min(run.curve[-1][1:])
    found = [crossing(each, wanted) for each in alone]
    reached = [tick for tick in found if tick is not None]
    if reached:
        return min(reached) / run.ticks, True
    return max(each.ticks for each in alone) / run.ticks, False


def crossing(run: Ran, loss: float) -> float | None:
    """The tick at which the curve (the better of basepoint and exponential mean) first is at `loss` or below, between points linear."""
    before: tuple[int, float] | None = None
    for tick, last, ema in run.curve:
        value = min(last, ema)
        if value <= loss:
            if before is None or before[1] <= value:
                return float(tick)
            return before[0] + (tick - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (tick, value)
    return None


def levels_of(runs: Sequence[Ran]) -> list[float]:
    """Losses for "MB to L": from the worst to the best swarm's end, in steps of 0.01."""
    ends = [min(run.curve[-1][1:]) for run in runs if run.received_bytes and run.kind != "sync" and not run.failure and run.curve]
    if not ends:
        return []
    low, high = min(ends), max(ends)
    found = [math.ceil((low + (high - low) * index / (LEVELS - 1)) * 100) / 100 for index in range(LEVELS)]
    return sorted(set(found), reverse=True)


def table_lines(runs: Sequence[Ran]) -> list[str]:
    """A header and a line per row."""
    width = max([len(run.name) for run in runs] + [4])
    levels = levels_of(runs)
    crossed = " ".join(f"MB@{level:.2f}" for level in levels)
    header = f"{'row':<{width}} seed  steps    last    mean     ema  mean_w      w0     gap  closed speed-up  d/B   B/wt       MB {crossed}"
    return [header, *(_line(runs, run, width, levels) for run in runs)]


def _line(runs: Sequence[Ran], run: Ran, width: int, levels: Sequence[float]) -> str:
    start = f"{run.name:<{width}} {run.seed:>4} {run.peer_steps:>6}"
    if run.failure:
        return f"{start} {run.failure}"
    losses = " ".join(f"{run.losses[name]:7.4f}" if name in run.losses else f"{'-':>7}" for name in ("last", "mean", "ema", "mean_w", "w0"))
    share, part, speed = gap(runs, run), closed(runs, run), speed_up(runs, run)
    figures = [
        f"{share:+7.2%}" if share is not None else f"{'-':>7}",
        f"{part:7.0%}" if part is not None else f"{'-':>7}",
        f"{'' if speed[1] else '>'}{speed[0]:.2f}".rjust(8) if speed is not None else f"{'-':>8}",
        f"{run.displacement:.3f}" if run.displacement else f"{'-':>5}",
        f"{run.received_per_weight:6.3f}",
        f"{run.received_bytes / 1e6:8.1f}",
    ]
    return f"{start} {losses} {' '.join(figures)} {' '.join(_megabytes(run, level) for level in levels)}".rstrip()


def _megabytes(run: Ran, level: float) -> str:
    tick = crossing(run, level)
    return f"{'-' if tick is None or not run.received_bytes else f'{run.received_bytes * tick / run.ticks / 1e6:.1f}':>7}"


def plot(runs: Sequence[Ran], path: Path) -> bool:
    """Loss against ticks and against received bytes, as PNG. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(14, 6), layout="constrained")
    by_tick, by_bytes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        ticks = [point[0] for point in run.curve]
        losses = [min(point[1:]) for point in run.curve]
        by_tick.plot(ticks, losses, label=f"{run.name}, seed {run.seed}", linewidth=1)
        if run.received_bytes:
            by_bytes.plot([run.received_bytes * tick / run.ticks / 1e6 for tick in ticks], losses, linewidth=1)
    by_tick.set_xlabel("steps of each peer")
    by_bytes.set_xlabel("received MB per peer")
    by_bytes.set_xscale("log")
    by_tick.set_ylabel("held-out loss, nats per byte")
    ends = [min(run.curve[-1][1:]) for run in runs if run.curve]
    if ends:
        by_tick.set_ylim(min(ends) - 0.02, max(ends) + 0.3)
    by_tick.legend(fontsize=6)
    figure.savefig(path, dpi=120)
    return True
