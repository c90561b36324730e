"""`tscale bench spread`: what it costs, and what it takes from learning, to spread work by flooding, owners of chunks, cells, or pairs.

Enters: numbers of peers, rates, intervals, a seed. Leaves: a table and a JSON file. Bytes are counted on an overlay like that of real
swarms (spread_traffic.py); losses are those of least squares with noise (spread_ways.py), each way at its best rate of those tried.

    tscale bench spread                          P = 8, 16, 64, 256; took 5 minutes on one core
    tscale bench spread --peers 8 --rates 0.05   a quick look
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tscale_fed.bench.options import count, positive

PEERS = (8, 16, 64, 256)
RATES = (0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125, 0.0015625)
INTERVALS = 300
SEED = 1


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    parser = subparsers.add_parser("spread", help="bytes and learning of flooding, owners, cells and pairs", allow_abbrev=False)
    parser.add_argument("--peers", nargs="+", type=count, default=list(PEERS), metavar="P", help="numbers of peers")
    parser.add_argument("--rates", nargs="+", type=positive, default=list(RATES), metavar="RATE", help="every way tries them all")
    parser.add_argument("--intervals", type=count, default=INTERVALS, metavar="N", help="exchanges of a run (default: %(default)s)")
    parser.add_argument("--seed", type=count, default=SEED, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/spread.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write. Raises Refused("bad-bench") for a single peer, OSError for the file."""
    from tscale_fed.bench.machine import command_text, machine_facts, result_path, write_result
    from tscale_fed.bench.spread_traffic import traffic_of
    from tscale_fed.bench.spread_ways import DELAY, WAYS, Way, loss_of
    from tscale_net.errors import Refused
    from tscale_net.ports import SystemClock

    if min(arguments.peers) < 2:
        raise Refused("bad-bench", "--peers 1: there is nobody to spread work to; give 2 or more")
    rows = []
    print(_HEAD, flush=True)
    for peers in arguments.peers:
        for name, rule in WAYS:
            losses = {rate: loss_of(Way(name, rule, peers, rate), arguments.intervals, arguments.seed) for rate in arguments.rates}
            rate = min(losses, key=lambda rate: losses[rate])
            traffic = traffic_of(name, peers, arguments.seed) if name != "sync" else None
            row = {"peers": peers, "way": name, "rule": rule, "loss": losses[rate], "rate": rate, "losses": list(losses.values())}
            if traffic is not None:
                row |= {"received": traffic.received, "received_most": traffic.received_most, "sent": traffic.sent, "hops": traffic.hops}
            rows.append(row | {"delay": DELAY.get(name, 0)})
            print(_line(rows[-1]), flush=True)
    path = result_path("spread", arguments.out)
    values = {
        "bench": "spread", "command": command_text(), "machine": machine_facts("cpu", SystemClock().wall()),
        "intervals": arguments.intervals, "seed": arguments.seed, "rates": arguments.rates, "rows": rows,
    }  # fmt: skip
    write_result(path, values)
    print(f"written: {path}")
    return 0


_HEAD = """
payloads per peer and interval (1 = one delta of the whole model), intervals until a delta is in everybody's model, loss at the best rate

| P | way | rule | received | by the busiest | sent | hops | delay | loss | rate |
|---|---|---|---|---|---|---|---|---|---|"""


def _line(row: dict[str, Any]) -> str:
    figures = ["-"] * 4 if "received" not in row else [f"{row[key]:.2f}" for key in ("received", "received_most", "sent", "hops")]
    cells = [row["peers"], row["way"], row["rule"] or "-", *figures, row["delay"] or "-", f"{row['loss']:.3f}", f"{row['rate']:g}"]
    return "| " + " | ".join(map(str, cells)) + " |"
