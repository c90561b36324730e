"""`tscale bench ablation`: what do this architecture and this optimizer buy, at equal weights and tokens, against a plain modern block?

Enters: a text and options. Leaves: a table, a JSON file; exit code 0: the figures are reported whichever way they go.

    tscale bench ablation --text dictionary.txt.xz                 7 rows, about 8 M weights, 16 M tokens per run
    tscale bench ablation --text FILE --rows tscale/rule wide/muon --steps 3000

A row is ARCHITECTURE/OPTIMIZER (ablation_models.py, ablation_optimizers.py). Rates are searched with the first seed: three at first, then
on beyond the best one while it is at the edge; the best rate is run with the other seeds too.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.ablation_run import AblationRun

ROWS: dict[str, tuple[float, ...]] = {
    "tscale/rule": (0.01, 0.02, 0.04),
    "tscale/adamw": (0.005, 0.01, 0.02),
    "plain/rule": (0.01, 0.02, 0.04),
    "plain/adamw": (0.001, 0.002, 0.004),
    "plain/muon": (0.002, 0.004, 0.008),
    "wide/adamw": (0.001, 0.002, 0.004),
    "wide/muon": (0.002, 0.004, 0.008),
}
"""Row -> rates that are tried first, each twice the one before."""
MOST_EXTRA_RATES = 3
SEEDS = 2


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count, positive

    parser = subparsers.add_parser("ablation", help="this block and optimizer against a plain modern block", allow_abbrev=False)
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to learn, plain, .xz or .gz (without: says how to build it)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of {' '.join(ROWS)}")
    parser.add_argument("--dims", default="e256h2d12w256", help="TScale dims string; the others get as many weights (default: %(default)s)")
    parser.add_argument("--fragments", type=count, default=64, metavar="N", help="per step (default: %(default)s)")
    parser.add_argument("--tokens", type=count, default=256, metavar="N", help="per fragment (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=1000, metavar="N", help="of every run (default: %(default)s)")
    parser.add_argument("--warmup", type=count, default=100, metavar="N", help="steps over which the rate rises (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=SEEDS, metavar="N", help="start weights and fragments 1..N (default: %(default)s)")
    parser.add_argument("--extra-rates", type=int, default=MOST_EXTRA_RATES, metavar="N", help="beyond the edge at most (default: 3)")
    parser.add_argument("--seconds", type=positive, default=3600.0, metavar="S", help="no further row begins after so long (default: 3600)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/ablation.json)")


def run(arguments: argparse.Namespace) -> int:
    """Search rates, repeat with the other seeds, write after every row, print. Raises Refused for texts and shapes, OSError for files."""
    import torch

    from tscale_fed.bench.ablation_run import Plan, measure
    from tscale_fed.bench.machine import result_path
    from tscale_fed.bench.options import shape_of
    from tscale_fed.bench.progress import Progress
    from tscale_fed.bench.quality_text import DICTIONARY_RECIPE, QualityText
    from tscale_fed.bench.step_measure import forget
    from tscale_net.errors import Refused

    progress = Progress()
    if arguments.text is None:
        raise Refused("no-text", f"--text FILE is missing; {DICTIONARY_RECIPE}")
    device = torch.device(arguments.device)
    text = QualityText.open(arguments.text, device)
    shape = shape_of(arguments.dims, text.vocab)
    plan = Plan(shape, arguments.fragments, arguments.tokens, arguments.steps, arguments.warmup, device)
    path = result_path("ablation", arguments.out)
    runs: list[AblationRun] = []

    def one(row: str, rate: float, seed: int) -> float:
        forget()
        runs.append(measure(row, rate, seed, plan, text))
        last = runs[-1]
        progress.say(f"{row} rate {rate:g} seed {seed}: test {last.test:.4f}, {last.step_ms:.1f} ms/step, {last.seconds:.0f} s")
        return last.test

    for row in dict.fromkeys(arguments.rows):
        if progress.seconds > arguments.seconds:
            progress.say(f"{row}: left out, the {arguments.seconds:g} seconds are over")
            continue
        best = search(ROWS[row], arguments.extra_rates, partial(one, row, seed=1))
        for seed in range(2, arguments.seeds + 1):
            one(row, best, seed)
        _write(path, arguments, text, runs)
    print("\n".join(["", *table_lines(runs, arguments), f"written: {path}"]))
    return 0


def search(rates: Sequence[float], extra: int, loss: Callable[[float], float]) -> float:
    """The rate of the lowest loss: all of `rates`, then on by factors of 2 beyond the best while it is at the edge."""
    found = {rate: loss(rate) for rate in rates}
    for _ in range(extra):
        best = min(found, key=found.__getitem__)
        if min(found) < best < max(found) or not math.isfinite(found[best]):
            break
        further = best / 2 if best == min(found) else best * 2
        found[further] = loss(further)
    return min(found, key=found.__getitem__)


def table_lines(runs: Sequence[AblationRun], arguments: argparse.Namespace) -> list[str]:
    """A line per row: its best rate, losses of all seeds; then every rate that was tried."""
    tokens = arguments.steps * arguments.fragments * arguments.tokens
    lines = [
        f"held-out loss in nats per byte (all of the held-out part) after {tokens / 1e6:.1f} M tokens, {arguments.fragments} x "
        f"{arguments.tokens} per step; tscale: {arguments.dims}",
        f"{'row':<14}{'weights':>10}{'in layers':>10}{'rate':>8}{'test':>9}  {'(seeds)':<20}{'train':>8}{'ms/step':>9}  rates tried",
    ]
    for row in dict.fromkeys(run.row for run in runs):
        mine = [run for run in runs if run.row == row]
        tried = {run.rate: run.test for run in mine if run.seed == 1}
        best = min(tried, key=tried.__getitem__)
        chosen = [run for run in mine if run.rate == best]
        tests = [run.test for run in chosen]
        seeds = f"({' '.join(f'{test:.4f}' for test in tests)})"
        edge = "!" if len(tried) > 1 and best in (min(tried), max(tried)) else ""
        all_rates = "  ".join(f"{rate:g}: {test:.4f}" for rate, test in sorted(tried.items()))
        lines.append(
            f"{row:<14}{chosen[0].weights / 1e6:>8.2f} M{chosen[0].layer_weights / 1e6:>8.2f} M{best:>7g}{edge:<1}{_mean(tests):>9.4f}  "
            f"{seeds:<20}{_mean([run.train for run in chosen]):>8.4f}{_mean([run.step_ms for run in chosen]):>9.1f}  {all_rates}"
        )
    return lines


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _write(path: Path, arguments: argparse.Namespace, text: Any, runs: Sequence[AblationRun]) -> None:
    """The result file as far as the rows have come. Losses that are not finite become null."""
    import dataclasses
    import time

    from tscale_fed.bench.machine import command_text, machine_facts, write_result

    def finite(values: dict[str, Any]) -> dict[str, Any]:
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}

    values = {
        "bench": "ablation",
        "command": command_text(),
        "machine": machine_facts(arguments.device, time.time()),
        "text_sha256": text.sha256,
        "sizes": {name: getattr(arguments, name) for name in ("dims", "fragments", "tokens", "steps", "warmup")},
        "runs": [finite(dataclasses.asdict(run)) for run in runs],
    }
    write_result(path, values)
