"""`tscale bench rules`: which way to meet makes many peers learn like one big machine? Simulated peers on one device.

Enters: rows in words (rules_rows.py), a size, a text. Leaves: a table, a JSON file to which calls add up, a CSV file of curves, a plot.

    tscale bench rules --size 5m --text FILE --rows "one lr=.02" "sync lr=.02,.04" "avg topk-64 H=5 lr=.02,.04 decay" "sum sign H=5"
    tscale bench rules --size tiny --rows "one" "sync" "owners avg sign/topk-256"          minutes on a processor
    tscale bench rules --size 5m --text FILE --probe                                       time of a step with 1, 2 and 4 lanes

Every peer has weights, momentum and second moments of its own; packets are not made, but each value is the one that a packet would add
(rules_codecs.py, rules_meeting.py). All rows of a seed start from the same weights and read the same text: batch t of peer k is the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.rules_results import Results

ROWS = ("one lr=.02,.04 decay", "sync lr=.02,.04 decay", "sum sign H=5 lr=.02,.04 decay", "avg topk-64 H=5 lr=.02,.04 decay")
"""Unless others are named."""


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count, positive
    from tscale_fed.bench.rules_sizes import PLAIN, SIZES

    parser = subparsers.add_parser("rules", help="rules of the swarm beside one peer and synchronous training", allow_abbrev=False)
    row_help = 'rows in words, such as "avg topk-64 H=5 lr=.02,.04 decay"; the words: tscale_fed/bench/rules_rows.py'
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=row_help)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="model and batch (default: %(default)s)")
    text_help = "text to learn, plain, .xz or .gz; its last 2 MB (of a short one: a tenth) are held out (default: the packaged novels)"
    parser.add_argument("--text", type=Path, metavar="FILE", help=text_help)
    parser.add_argument("--bytes", type=positive, metavar="N", help="of text that all peers read together (default: the size's)")
    parser.add_argument("--peers", type=count, default=8, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=1, metavar="N", help="every row with start weights and text 1..N (default: 1)")
    parser.add_argument("--seconds", type=positive, metavar="S", help="do not begin a row that would end later than this")
    parser.add_argument("--fragments", type=count, metavar="N", help="per step and peer, instead of the size's")
    arithmetic_help = f"{PLAIN} (autograd, float32), bfloat16, int8 or int8/fp8: PRECISION[/ATTENTION] of the engine (default: the size's)"
    parser.add_argument("--arithmetic", metavar="WORD", help=arithmetic_help)
    held_out_help = "held-out fragments for the losses at the end, a quarter of them for curves (default: the size's)"
    parser.add_argument("--held-out", type=count, metavar="N", help=held_out_help)
    parser.add_argument("--lanes", type=count, metavar="N", help="peers that are computed side by side (default: the size's)")
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: cpu for tiny, else cuda)")
    merge_help = "run nothing: add the rows of other result files to --out, for rows that were run side by side"
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help=merge_help)
    parser.add_argument("--probe", action="store_true", help="only time the arithmetic with 1, 2 and 4 lanes, some seconds each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/rules-SIZE.json)")


def run(arguments: argparse.Namespace) -> int:
    """Run what the result file lacks, row by row; print. Raises Refused for words, texts and devices that cannot be used."""
    from tscale_fed.bench.machine import result_path
    from tscale_fed.bench.progress import Progress
    from tscale_fed.bench.rules_call import Call
    from tscale_fed.bench.rules_results import Results
    from tscale_fed.bench.rules_rows import parse_rows

    progress = Progress()
    rows = parse_rows(arguments.rows)
    results = Results.open(result_path(f"rules-{arguments.size}", arguments.out), arguments.size)
    if arguments.merge:
        for path in arguments.merge:
            results.merge(Results.open(path, arguments.size))
        return _tell(results, results.every_settings(), complete=True)
    bench = Call(arguments, progress.say)
    if arguments.probe:
        return bench.probe()
    facts = bench.facts()
    complete = True
    for seed in range(1, arguments.seeds + 1):
        for row in rows:
            if results.has(row.name, seed, bench.settings):
                continue
            needed = bench.seconds_of(row)
            if arguments.seconds is not None and progress.seconds + needed > arguments.seconds:
                progress.say(f"{row.name}, seed {seed}: left out, it needs about {needed:.0f} s")
                complete = False
                continue
            results.add(bench.measure(row, seed), bench.settings, facts)
    return _tell(results, [bench.settings], complete)


def _tell(results: Results, settings: list[dict[str, Any]], complete: bool) -> int:
    """Print what there is; plot it. Raises Refused if there is nothing."""
    from tscale_fed.bench.rules_results import plot
    from tscale_net.errors import Refused

    if not results.runs:
        raise Refused("bad-bench", "no row was run: allow more --seconds")
    for each in settings:
        print("\n".join(["", ", ".join(f"{name} {value}" for name, value in each.items()), *results.table(each)]))
    print(f"written: {results.path}, {results.path.with_suffix('.csv').name}")
    if plot(results.runs, results.path.with_suffix(".png")):
        print(f"plotted: {results.path.with_suffix('.png')}")
    return 0 if complete else 1
