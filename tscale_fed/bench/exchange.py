"""`tscale bench exchange`: how much of its time does a peer of a large swarm train? Meetings measured beside steps, on this machine.

Enters: model, codec, peers, packets per interval, length of a step. Leaves: a table, a JSON file, exit code 0 if the busy fraction is at
least 94.5 % (the project's goal for 1.5 billion weights and 16 peers).

    tscale bench exchange                             1.5 billion weights on a GPU; about 75 seconds on an H100
    tscale bench exchange --device cpu --dims e128h1d4w16 --vocab 256 --step-ms 50 --interval 5

A load takes the place of training steps, and as long as one. Everything else is real: packets are opened, verified and uploaded by a thread
of their own as they come, meetings take place after every step, publications and hashes are made by the helper thread. Sockets are missing,
and summing for others as an owner of chunks. busy = time that the steps take alone / time that passed.
The baseline, in the same run: the basepoint in the machine's memory and everything done inside meetings, on a part of the model, scaled up.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.exchange_rows import Measured

DIMS, VOCAB = "e1280h20d42w1024", 50257
PEERS = 16
STEP_MS = 389.0
"""Of the 1.5B model on an H100, 24 x 1024 tokens, int8 (docs/training.md)."""
INTERVAL_S = 30.0
GOAL = 0.945
AIM = 0.97
INTERVALS_S = (30.0, 60.0, 120.0)
"""For which the busy fraction is told."""


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count, positive

    parser = subparsers.add_parser("exchange", help="how much of its time a peer of a large swarm trains", allow_abbrev=False)
    parser.add_argument("--dims", default=DIMS, help="TScale dims string (default: %(default)s)")
    parser.add_argument("--vocab", type=count, default=VOCAB, metavar="N", help="tokens of the vocabulary (default: %(default)s)")
    parser.add_argument("--codec", default="sign", help="of all deltas (default: %(default)s)")
    parser.add_argument("--chunk-params", type=count, metavar="N", help="values of a chunk (default: that of new runs)")
    parser.add_argument("--peers", type=count, default=PEERS, metavar="N", help="of the swarm (default: %(default)s)")
    payloads_help = "packets received per chunk and interval (default: 2 where owners sum them up, else one of every other peer)"
    parser.add_argument("--payloads", type=positive, metavar="N", help=payloads_help)
    parser.add_argument("--interval", type=positive, default=INTERVAL_S, metavar="S", help="between publications (default: %(default)s)")
    parser.add_argument("--step-ms", type=positive, default=STEP_MS, metavar="MS", help="length of a step (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--no-baseline", action="store_true", help="leave the basepoint in host memory out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/exchange.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write. Raises Refused for what cannot be built, OSError for the file."""
    import torch

    from tscale_fed.bench.exchange_rows import Setting, measure_baseline, measure_beside
    from tscale_fed.bench.machine import command_text, machine_facts, result_path, write_result
    from tscale_fed.bench.options import shape_of
    from tscale_fed.bench.progress import Progress
    from tscale_net.errors import Refused
    from tscale_net.ports import SystemClock

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise Refused("no-device", "bench exchange needs a GPU; with --device cpu take a small model, as `--help` shows")
    torch.set_num_threads(1)  # as beside a GPU that trains
    progress = Progress()
    setting = Setting.of(shape_of(arguments.dims, arguments.vocab), arguments)
    progress.say(setting.text())
    rows = [measure_beside(setting, progress.say)]
    if not arguments.no_baseline:
        rows.append(measure_baseline(setting, progress.say))
    path = result_path("exchange", arguments.out)
    values = {"bench": "exchange", "command": command_text(), "machine": machine_facts(arguments.device, SystemClock().wall())}
    write_result(path, {**values, "setting": setting.values(), "rows": [row.values() for row in rows]})
    print("\n".join(["", *table_lines(rows), "", verdict(rows[0]), f"written: {path}"]))
    return 0 if rows[0].busy >= GOAL else 1


def table_lines(rows: list[Measured]) -> list[str]:
    """Times are of one interval."""
    head = ["", "receive ms", "publish", "hash", "wait", "slower steps", "sum", *(f"busy at {seconds:.0f} s" for seconds in INTERVALS_S)]
    table = [head]
    for row in rows:
        s = row.meetings
        times = [s.receive, s.publish, s.hash, s.wait, row.drag_s, row.lost_s]
        busy = [f"{max(0.0, 1 - row.lost_s / seconds):.1%}" for seconds in INTERVALS_S]
        table.append([row.name, *(f"{seconds * 1e3:.0f}" for seconds in times), *busy])
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def verdict(row: Measured) -> str:
    """Goal and aim beside what was found."""
    found = "reached" if row.busy >= AIM else "goal reached, aim missed" if row.busy >= GOAL else "MISSED"
    return f"busy {row.busy:.1%} of {row.seconds:.0f} s measured; goal {GOAL:.1%}, aim {AIM:.0%}: {found}. {row.remark}"
