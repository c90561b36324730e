"""`tscale bench learning`: does a swarm with 1-bit deltas learn more than one peer, and how close does it come to synchronous training?

Enters: a preset and options. Leaves: a table, a JSON file, exit code 0 if the goal is met (see learning_table.py), else 1.

    tscale bench learning                                        a small model; took 34 minutes on two busy cores
    tscale bench learning --preset gpu --text FILE               a model of 5 M weights on one GPU
    tscale bench learning --rates 0.02 --seeds 1 --steps 100     a quick look, far from the figures

Every run (row x rate x seed) is one job of a worker process with one thread: rows do not disturb each other, and their figures depend on
the seed, not on the number of workers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.learning_rows import Measured, Plan

SWARM_ROWS = ("sign", "exact", "average")
"""Rows beside "one" and "sync", which are always measured; their meaning is in learning_rows.py."""
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": dict(dims="e128h1d4w64", fragments=4, length=64, steps=400, warmup_steps=50, device="cpu"),
    "gpu": dict(dims="e256h2d8w256", fragments=16, length=256, steps=400, warmup_steps=50, device="cuda"),
}
"""cpu: the smallest TScale model with all kinds of layers; short batches, so that the noise that averaging removes is there to remove.
gpu: 5 M weights, 4096 tokens per step and peer."""
RATES = (0.01, 0.02, 0.04, 0.08)
SEEDS = 3
MOST_WORKERS = 8
"""More processes than this wait for one GPU rather than use it (guess)."""


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    parser = subparsers.add_parser("learning", help="held-out loss of a swarm beside one peer and synchronous training", allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="model, batch and device (default: %(default)s)")
    rows_help = f"swarm rules to measure, of {', '.join(SWARM_ROWS)} (default: sign)"
    parser.add_argument("--rows", nargs="+", choices=SWARM_ROWS, default=["sign"], metavar="ROW", help=rows_help)
    parser.add_argument("--rates", nargs="+", type=_rate, default=list(RATES), metavar="RATE", help="every row tries them all")
    parser.add_argument("--seeds", type=_count, default=SEEDS, metavar="N", help="start weights and text 1..N (default: %(default)s)")
    text_help = "files, folders or jsonl to learn (default: the text that ships with the package)"
    parser.add_argument("--text", nargs="+", metavar="SRC", help=text_help)
    parser.add_argument("--device", help="cpu, cuda or cuda:N instead of the preset's")
    parser.add_argument("--dims", help="TScale dims string instead of the preset's")
    for name, what in _NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N", help=f"{what} instead of the preset's")
    workers_help = f"runs at once (default: the processor's cores, at most {MOST_WORKERS})"
    parser.add_argument("--workers", type=_count, metavar="N", help=workers_help)
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/learning-PRESET.json)")


_NUMBERS = {
    "peers": "peers",
    "steps": "steps of every row",
    "warmup_steps": "steps over which the rate rises",
    "fragments": "fragments per step and peer",
    "length": "tokens per fragment",
    "publish_every_steps": "steps between two deltas",
}


def run(arguments: argparse.Namespace) -> int:
    """Measure, write after every run, print. Raises Refused for text, shapes and devices that cannot be used, OSError for files."""
    import tempfile

    from tscale_fed.assembly import model_shape, prepare_data
    from tscale_fed.bench.learning_jobs import jobs_of, run_jobs
    from tscale_fed.bench.learning_rows import ONE, run_config
    from tscale_fed.bench.learning_table import goal_met, table_lines
    from tscale_fed.bench.machine import result_path, usable_cores
    from tscale_fed.config import DEMO_SOURCE, DataSection
    from tscale_fed.console import standard_console
    from tscale_fed.device import choose_device
    from tscale_net.ports import SystemClock

    plan, clock = plan_of(arguments), SystemClock()
    console = standard_console(clock)
    console.say(choose_device(plan.device).reason)
    started = clock.now()
    with tempfile.TemporaryDirectory(prefix="tscale-bench-") as folder:
        data = prepare_data(DataSection(sources=tuple(arguments.text or [DEMO_SOURCE])), Path(folder))
        model_shape(run_config(plan, ONE, arguments.rates[0], seed=1).recipe(), data.vocab)  # refuses bad --dims before a worker starts
        jobs = jobs_of(plan, data.directory, arguments.rows, arguments.rates, range(1, arguments.seeds + 1))
        workers = min(arguments.workers or min(usable_cores(), MOST_WORKERS), len(jobs))
        console.say(f"{len(jobs)} runs of {plan.steps} steps on {data.train_tokens} tokens, {workers} at once")
        path = result_path(f"learning-{arguments.preset}", arguments.out)
        text = {"hash": data.hash, "train_tokens": data.train_tokens, "test_tokens": data.test_tokens}

        def keep(finished: Sequence[Measured]) -> None:
            missing = len(jobs) - len(finished)
            _write(path, {"seconds": round(clock.now() - started, 1), "missing_runs": missing, "text": text}, plan, finished, clock.wall())

        runs = run_jobs(jobs, workers, console, clock, keep)
    print("\n".join(["", *table_lines(plan, runs), f"written: {path}"]))
    return 0 if goal_met(runs) else 1


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The preset with the options over it. Raises Refused("bad-bench") for fewer than two peers or steps than one interval."""
    from tscale_fed.bench.learning_rows import Plan
    from tscale_net.errors import Refused

    given = {name: getattr(arguments, name) for name in (*_NUMBERS, "dims", "device")}
    plan = Plan(**{**PRESETS[arguments.preset], **{name: value for name, value in given.items() if value is not None}})
    if plan.peers < 2:
        raise Refused("bad-bench", "--peers 1: a swarm needs at least 2 peers; the row of one peer is always measured")
    if plan.steps < plan.publish_every_steps:
        raise Refused("bad-bench", f"--steps {plan.steps}: must be at least --publish-every-steps ({plan.publish_every_steps})")
    return plan


def _write(path: Path, facts: dict[str, Any], plan: Plan, runs: Sequence[Measured], unix_time: float) -> None:
    """The result file as far as the runs have come: a bench that is stopped keeps what it has."""
    import msgspec

    from tscale_fed.bench.learning_table import GOAL_CLOSED, goal_met, summary_values
    from tscale_fed.bench.machine import command_text, machine_facts, write_result

    values = {
        "bench": "learning",
        "command": command_text(),
        "machine": machine_facts(plan.device, unix_time),
        **facts,
        "plan": msgspec.to_builtins(plan),
        "goal": {"gap_closed": GOAL_CLOSED, "met": goal_met(runs)},
        "summary": summary_values(runs),
        "runs": msgspec.to_builtins(runs),
    }
    write_result(path, values)


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a rate: write a number between 0 and 1, such as 0.02")
    return value
