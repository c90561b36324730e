"""An outcome for people and for programs.

Enters: an `Outcome`. Leaves: the lines of the table, or one JSON object.
"""

from __future__ import annotations

import json

import msgspec

from tscale_fed.sim.outcome import Outcome
from tscale_fed.units import bytes_text, count_text

HASH_DIGITS = 16
_HEAD = f"{'speed':>6} {'peers':>6} {'steps':>9} {'deltas':>8} {'received':>10} {'sent':>10} {'longest pause':>14}"


def table_lines(outcome: Outcome, unit: str) -> list[str]:
    """The report. unit: of the loss."""
    scenario = outcome.scenario
    lines = [
        f"{scenario['peers']} peers, {outcome.minutes:.4g} minutes, {scenario['rate_mbit']:g} Mbit/s, {scenario['latency_ms']:g} ms, "
        f"codec {scenario['codec']}, seed {scenario['seed']}" + (" (stopped early)" if outcome.stopped else ""),
        "",
        _HEAD,
    ]
    for row in outcome.speeds:
        pause = f"{row.longest_gap_s:.1f} s of {row.step_s:.3g}"
        lines.append(
            f"{row.speed:>6g} {row.peers:>6} {count_text(row.steps):>9} {row.published:>8} {bytes_text(row.received_bytes):>10} "
            f"{bytes_text(row.sent_bytes):>10} {pause:>14}"
        )
    first, last = outcome.samples[0], outcome.samples[-1]
    lines += [
        "",
        f"loss      {first.loss:.4f} -> {last.loss:.4f} {unit}, held out, of what the swarm shares",
        f"moved     {bytes_text(last.bytes_per_peer)} received per peer, {count_text(last.tokens)} tokens trained",
        f"mishaps   {outcome.kills} killed and restarted, {outcome.replaced} replaced for good",
        f"mistakes  {outcome.false_deaths} times was a living peer taken for dead",
        f"refused   {_counts(outcome.refused)}",
        f"end       {_ending(outcome)}",
        f"cost      {outcome.cpu_s:.2f} s of processor time, {count_text(outcome.messages)} messages",
        f"trace     {outcome.trace[:HASH_DIGITS]}",
    ]
    return lines


def json_text(outcome: Outcome) -> str:
    """Everything, on one line."""
    return json.dumps(msgspec.to_builtins(outcome))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in counts.items()) or "nothing"


def _ending(outcome: Outcome) -> str:
    ending = outcome.ending
    if ending is None:
        return "not looked at: the run was stopped"
    if ending.settled_s < 0:
        return f"{ending.digests} different sets of deltas in {ending.replicas} replicas: they did not settle"
    same = "one and the same in all" if ending.hashes == 1 else f"{ending.hashes} different in"
    return f"basepoint {ending.hash[:HASH_DIGITS]}, {same} {ending.replicas} replicas {ending.settled_s:.1f} s after the last step"
