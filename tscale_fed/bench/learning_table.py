"""From single runs to the answer: best rate per row, the share of the gap that a swarm closes, a table for people.

Enters: `Measured` runs of all rows, rates and seeds. Leaves: `Summary` per row, lines of text, JSON values.

Rule: every row takes the rate with the lowest mean loss over the seeds, out of the same rates; a rate at which a seed diverged is out.
Per seed, share closed = (one - row) / (one - sync), each row at its own best rate; stated is the mean and the least and greatest seed. Both
losses (see learning_rows.py) are treated alike and apart from each other, the choice of the rate included.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tscale_fed.bench.learning_rows import AVERAGE, EXACT, ONE, SIGN, SYNC, Measured, Plan
from tscale_fed.units import bytes_text

Kind = Literal["last", "mean"]
KINDS: tuple[Kind, ...] = ("last", "mean")

GOAL_CLOSED = 0.6
"""Share of the gap between one peer and synchronous training that the default rule is asked to close, in both losses."""

TITLES = {
    ONE: "one peer",
    SYNC: "synchronous, all batches",
    SIGN: "swarm: sum rule, 1 bit",
    EXACT: "swarm: sum rule, uncompressed",
    AVERAGE: "swarm: averaging rule, 1 bit",
}
_TITLE_CHARACTERS = max(map(len, TITLES.values()))


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, least and greatest of one figure over the seeds."""

    mean: float
    least: float
    greatest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.fmean(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Summary:
    """One row at its best rate, for one of the two losses."""

    row: str
    rate: float
    at_edge: bool
    """The best rate is the lowest or highest that was tried: a better one may lie beyond."""
    losses: dict[int, float]
    """Seed -> loss."""

    @property
    def loss(self) -> Spread:
        return Spread.of(list(self.losses.values()))


def loss_of(run: Measured, kind: Kind) -> float:
    """Infinite for a run that diverged."""
    value = run.last_loss if kind == "last" else run.mean_loss
    return math.inf if value is None else value


def summarise(runs: Sequence[Measured], kind: Kind) -> dict[str, Summary]:
    """Row -> summary, in the order of TITLES; rows that diverged at every rate are left out."""
    found = {}
    for row in TITLES:
        rates: dict[float, dict[int, float]] = {}
        for run in runs:
            if run.row == row:
                rates.setdefault(run.rate, {})[run.seed] = loss_of(run, kind)
        if not rates:
            continue
        means = {rate: statistics.fmean(losses.values()) for rate, losses in rates.items()}
        best = min(means, key=means.__getitem__)
        if math.isfinite(means[best]):
            found[row] = Summary(row, best, len(means) > 1 and best in (min(means), max(means)), rates[best])
    return found


def gap_closed(summaries: dict[str, Summary], row: str) -> Spread | None:
    """Share of the gap one -> sync that `row` closes; None unless all three rows were measured with the same seeds and there is a gap."""
    if not {ONE, SYNC, row} <= summaries.keys():
        return None
    one, sync, other = (summaries[name].losses for name in (ONE, SYNC, row))
    if not one.keys() == sync.keys() == other.keys() or any(one[seed] <= sync[seed] for seed in one):
        return None
    return Spread.of([(one[seed] - other[seed]) / (one[seed] - sync[seed]) for seed in one])


def goal_met(runs: Sequence[Measured]) -> bool:
    """Does the default rule close GOAL_CLOSED of the gap, by the mean over the seeds, in both losses?"""
    closed = [gap_closed(summarise(runs, kind), SIGN) for kind in KINDS]
    return all(share is not None and share.mean >= GOAL_CLOSED for share in closed)


def table_lines(plan: Plan, runs: Sequence[Measured]) -> list[str]:
    """What the bench prints: the setting, one block per loss, the scan, the verdict."""
    by_kind = {kind: summarise(runs, kind) for kind in KINDS}
    seeds = len({run.seed for run in runs})
    parameters = max((run.parameters for run in runs), default=0)
    return [
        f"{plan.dims}, {parameters / 1e6:.2f} M weights; {plan.peers} peers, {plan.fragments} x {plan.length} tokens per step and peer",
        f"{plan.steps} steps, seeds: {seeds}; a delta every {plan.publish_every_steps} steps, received one interval later",
        "held-out loss in nats per token: mean (least..greatest seed), each row at its best rate",
        "",
        *_block_lines("last basepoint", by_kind["last"], runs),
        "",
        *_block_lines(f"mean of {plan.mean_points} basepoints", by_kind["mean"], runs),
        "",
        *_scan_lines(runs),
        "",
        *_traffic_lines(runs),
        *_verdict_lines(by_kind),
    ]


def _block_lines(title: str, summaries: dict[str, Summary], runs: Sequence[Measured]) -> list[str]:
    """One loss: a line per measured row."""
    lines = [f"{title:<{_TITLE_CHARACTERS}}  {'rate':<7}{'loss':<26}gap closed"]
    for row in TITLES:
        if row in summaries:
            lines.append(f"{TITLES[row]:<{_TITLE_CHARACTERS}}  {_cells(summaries, row)}")
        elif any(run.row == row for run in runs):
            lines.append(f"{TITLES[row]:<{_TITLE_CHARACTERS}}  diverged at every rate")
    return lines


def _cells(summaries: dict[str, Summary], row: str) -> str:
    found = summaries[row]
    closed = gap_closed(summaries, row)
    rate = f"{found.rate:g}{'!' if found.at_edge else ''}"
    return f"{rate:<7}{_spread_text(found.loss, '.4f'):<26}{_spread_text(closed, '.0%') if closed else '-'}"


def _spread_text(spread: Spread, form: str) -> str:
    around = f" ({spread.least:{form}}..{spread.greatest:{form}})" if spread.least < spread.greatest else ""
    return f"{spread.mean:{form}}{around}"


def _traffic_lines(runs: Sequence[Measured]) -> list[str]:
    """What one peer receives over the run, per swarm row."""
    lines = []
    for row, title in TITLES.items():
        run = next((run for run in runs if run.row == row and run.exchanges), None)
        if run is not None:
            per_weight = run.sent_bytes / run.exchanges / run.parameters
            received = f"a peer receives {bytes_text(run.received_bytes)}, {per_weight:.3f} bytes per weight and delta"
            lines.append(f"{title:<{_TITLE_CHARACTERS}}  {received}")
    return lines


def _scan_lines(runs: Sequence[Measured]) -> list[str]:
    """Mean last loss of every row at every rate."""
    rates = sorted({run.rate for run in runs})
    lines = [f"{'last basepoint, at every rate':<{_TITLE_CHARACTERS}}  " + "  ".join(f"{rate:<8g}" for rate in rates)]
    for row, title in TITLES.items():
        if any(run.row == row for run in runs):
            means = [_mean_at(runs, row, rate) for rate in rates]
            lines.append(f"{title:<{_TITLE_CHARACTERS}}  " + "  ".join(f"{mean:<8}" for mean in means))
    return lines


def _mean_at(runs: Sequence[Measured], row: str, rate: float) -> str:
    losses = [loss_of(run, "last") for run in runs if run.row == row and run.rate == rate]
    if not losses:
        return "-"
    mean = statistics.fmean(losses)
    return f"{mean:.4f}" if math.isfinite(mean) else "diverged"


def _verdict_lines(by_kind: dict[Kind, dict[str, Summary]]) -> list[str]:
    lines = []
    if any(summary.at_edge for summaries in by_kind.values() for summary in summaries.values()):
        lines.append("!  the best rate is at the edge of the scan: add rates with --rates")
    closed = [gap_closed(by_kind[kind], SIGN) for kind in KINDS]
    if None in closed:
        return [*lines, "no verdict: one peer, synchronous and the swarm's default rule are needed, and a gap between the first two"]
    shares = [share.mean for share in closed if share is not None]
    verdict = "met" if min(shares) >= GOAL_CLOSED else "NOT met"
    reached = " and ".join(f"{share:.0%}" for share in shares)
    return [*lines, f"goal {verdict}: 1-bit deltas close {reached} of the gap, asked are {GOAL_CLOSED:.0%}"]


def summary_values(runs: Sequence[Measured]) -> dict[str, Any]:
    """The same as JSON values: loss kind -> row -> rate, losses per seed, share of the gap closed."""
    values: dict[str, Any] = {}
    for kind in KINDS:
        summaries = summarise(runs, kind)
        values[kind] = {row: _row_values(summaries, row) for row in summaries}
    return values


def _row_values(summaries: dict[str, Summary], row: str) -> dict[str, Any]:
    found, closed = summaries[row], gap_closed(summaries, row)
    return {
        "rate": found.rate,
        "at_edge": found.at_edge,
        "losses": {str(seed): loss for seed, loss in found.losses.items()},
        "gap_closed": [closed.mean, closed.least, closed.greatest] if closed else None,
    }
