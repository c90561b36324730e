"""`tscale bench step`: how fast is a whole training step, optimizer included, beside the same model in bf16 with torch.compile?

Enters: a preset and options. Leaves: a table, a JSON file, exit code 0 if the preset's goal is met, else 1.

    tscale bench step                                        1.5 billion weights, 24 x 1024 tokens; about 6 minutes on an H100
    tscale bench step --preset small                         24 million weights, 64 x 256 tokens
    tscale bench step --rows baseline int8/fp8 --profile int8/fp8

A row is `baseline` or PRECISION[/ATTENTION][@host] (see step_rows.py). Text is random, with a Zipf distribution.
TParams/s are weights times tokens per second, with the embedding (as the original counts) and without it (as spec/kernels.md counts).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.step_measure import Timed
    from tscale_fed.bench.step_rows import RowOptions, Sizes

PRESETS: dict[str, dict[str, Any]] = {
    "big": dict(dims="e1280h20d42w1024", fragments=24, tokens=1024, vocab=50257),
    "small": dict(dims="e256h2d36w256", fragments=64, tokens=256, vocab=257),
}
ROWS = ("baseline", "bfloat16", "int8", "int8/fp8", "fp8/fp8", "int8/fp8@host")
"""Measured unless others are named. The first is what the others are compared with."""
STEPS = 100
WARM_UP_STEPS = 5


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count, positive

    parser = subparsers.add_parser("step", help="speed of a training step beside bf16 torch.compile", allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="big", help="model and batch (default: %(default)s)")
    parser.add_argument("--dims", help="TScale dims string instead of the preset's")
    for name in ("fragments", "tokens", "vocab"):
        parser.add_argument(f"--{name}", type=count, metavar="N", help="instead of the preset's")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--steps", type=count, default=STEPS, metavar="N", help="timed steps of every row (default: %(default)s)")
    parser.add_argument("--seconds", type=positive, default=90.0, metavar="S", help="of timed steps per row at most (default: 90)")
    parser.add_argument("--micro-batches", type=count, default=0, metavar="N", help="parts of a step (default: as few as fit)")
    parser.add_argument("--plan", choices=("auto", "keep", "recompute"), default="auto", help="saved states of the engine")
    parser.add_argument("--stream", choices=("float32", "bfloat16"), default="float32", help="the engine's state between layers")
    parser.add_argument("--local", choices=("auto", "flex", "blocks"), default="auto", help="the baseline's local attention")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--profile", nargs="*", default=[], metavar="ROW", help="print where the time of these rows goes")
    parser.add_argument("--top", type=count, default=40, metavar="N", help="kernels that --profile prints (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/step-PRESET.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure row by row, write after every row, print. Raises Refused for shapes that cannot be built, OSError for files."""
    from tscale_fed.bench.machine import result_path
    from tscale_fed.bench.progress import Progress
    from tscale_fed.bench.step_measure import measure
    from tscale_fed.bench.step_rows import zipf_batches
    from tscale_fed.bench.step_table import goal_met, table_lines

    progress = Progress()
    sizes = sizes_of(arguments)
    options = row_options(arguments, sizes, progress.say)
    batches = zipf_batches(sizes, 4, seed=1)
    path = result_path(f"step-{arguments.preset}", arguments.out)
    rows: list[Timed] = []

    def keep(row: Timed) -> None:
        rows.append(row)
        _write(path, arguments, sizes, rows)

    for name in dict.fromkeys(arguments.rows):
        top = arguments.top if name in arguments.profile else 0
        measure(name, sizes, batches, options, progress.say, steps=arguments.steps, warm_up=WARM_UP_STEPS,
                seconds=arguments.seconds, top=top, keep=keep)  # fmt: skip
    print("\n".join(["", *table_lines(sizes, rows), f"written: {path}"]))
    return 0 if goal_met(arguments.preset, sizes, rows) else 1


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """The preset with the options over it. Raises Refused("bad-bench") for dims that cannot be built."""
    import torch

    from tscale_fed.bench.options import shape_of
    from tscale_fed.bench.step_rows import Sizes

    given = {name: getattr(arguments, name) for name in ("dims", "fragments", "tokens", "vocab")}
    chosen = {**PRESETS[arguments.preset], **{name: value for name, value in given.items() if value is not None}}
    shape = shape_of(chosen["dims"], chosen["vocab"])
    return Sizes(shape, chosen["fragments"], chosen["tokens"], torch.device(arguments.device))


def row_options(arguments: argparse.Namespace, sizes: Sizes, say: Any) -> RowOptions:
    """Options of all rows; the baseline's local attention is timed here unless it is given."""
    import torch

    from tscale_fed.bench.local_way import choose_local_way
    from tscale_fed.bench.step_rows import BASELINE, RowOptions

    local = arguments.local
    if local == "auto" and BASELINE in arguments.rows:
        local, sentence = choose_local_way(sizes.shape, sizes.fragments, sizes.tokens, sizes.device, torch.bfloat16)
        say(sentence)
    stream = getattr(torch, arguments.stream)
    return RowOptions(arguments.micro_batches, arguments.plan, stream, "flex" if local == "auto" else local, not arguments.no_graphs)


def _write(path: Path, arguments: argparse.Namespace, sizes: Sizes, rows: list[Timed]) -> None:
    """The result file as far as the rows have come."""
    import dataclasses
    import time

    from tscale_fed.bench.machine import command_text, machine_facts, write_result
    from tscale_fed.bench.step_table import figures, goal_met

    values = {
        "bench": "step",
        "command": command_text(),
        "machine": machine_facts(str(sizes.device), time.time()),
        "sizes": {"dims": sizes.shape.dims, "fragments": sizes.fragments, "tokens": sizes.tokens, "vocab": sizes.shape.vocab},
        "goal_met": goal_met(arguments.preset, sizes, rows),
        "rows": [{**dataclasses.asdict(row), **figures(sizes, row, rows)} for row in rows],
    }
    write_result(path, values)
