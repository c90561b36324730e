"""`tscale bench contraction`: how much of a displacement each codec sends for its bytes: of noise, of low rank, of training.

Enters: names of codecs, a model, numbers of steps. Leaves: a table and a JSON file. Each codec is given the same moves interval after
interval and keeps what it does not send (averaging rule: a publication gives up all that it sends), so it is seen both with a fresh
displacement and with one that consists of what it finds hard to send. "lowrank only" and "lowrank and sign" are no codecs of runs: they
show why "lowrank" sends the largest values of what its factors leave.

    tscale bench contraction        took 4 minutes on one core, most of them to train
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tscale_fed.bench.options import count

WAYS = (
    "topk-sign", "topk-sign-256", "topk-sign-512", "sign", "int4", "lowrank-4", "lowrank", "lowrank-16", "lowrank-32",
    "lowrank only", "lowrank-16 only", "lowrank and sign",
)  # fmt: skip
DIMS = "e512h4d1w128"
"""Factors are cheap only in wide matrices: as wide as trains on a processor within minutes."""
FIRST_STEPS = 80
"""Past the warm-up of the rate."""


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    parser = subparsers.add_parser("contraction", help="how much of a displacement each codec sends for its bytes", allow_abbrev=False)
    parser.add_argument("--codecs", nargs="+", default=list(WAYS), metavar="NAME", help='also "lowrank-R only", "lowrank-R and sign"')
    parser.add_argument("--dims", default=DIMS, help="the model that is trained (default: %(default)s)")
    parser.add_argument("--first-steps", type=count, default=FIRST_STEPS, metavar="N", help="before the moves (default: %(default)s)")
    parser.add_argument("--intervals", type=count, default=16, metavar="N", help="moves of 5 steps each (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/contraction.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write. Raises Refused: "packet-codec", "bad-shape"; OSError for the file."""
    import torch

    from tscale_fed.bench.contraction_moves import low_rank_moves, noise_moves, training_moves
    from tscale_fed.bench.contraction_ways import measure, way_named
    from tscale_fed.bench.machine import command_text, machine_facts, result_path, write_result
    from tscale_net.ports import SystemClock

    torch.set_num_threads(1)
    for name in arguments.codecs:
        way_named(name)
    print(f"training {arguments.dims}: {arguments.first_steps + 5 * arguments.intervals} steps ...", flush=True)
    sources = {
        "noise": noise_moves(arguments.intervals),
        "low rank": low_rank_moves(arguments.intervals),
        "training": training_moves(arguments.dims, arguments.first_steps, arguments.intervals),
    }
    rows = []
    for source, moves in sources.items():
        print(f"\n{source}\n{'':18s}{'bytes per':>12s}{'sent of a fresh':>18s}{'kept in the end,':>19s}")
        print(f"{'':18s}{'parameter':>12s}{'displacement':>18s}{'in moves':>19s}")
        for name in arguments.codecs:
            result = measure(way_named(name), moves)
            print(f"{name:18s}{result.bytes_per_parameter:12.4f}{100 * result.sent_first:16.1f} %{result.kept_last:19.2f}", flush=True)
            rows.append({"source": source, "codec": name, **result.values()})
    path = result_path("contraction", arguments.out)
    facts = {"dims": arguments.dims, "first_steps": arguments.first_steps, "intervals": arguments.intervals}
    machine = machine_facts("cpu", SystemClock().wall())
    write_result(path, {"bench": "contraction", "command": command_text(), "machine": machine, **facts, "rows": rows})
    print(f"\n{path}")
    return 0
