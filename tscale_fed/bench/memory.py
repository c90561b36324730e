"""`tscale bench memory`: does the engine take the memory that its plan says, and how little can it do with?

Enters: a preset and options. Leaves: a table, a JSON file, exit code 0 if every forecast holds and the limits of the preset are kept.

    tscale bench memory                                    1.5 billion weights; about 2 minutes on an H100
    tscale bench memory --rows int8/fp8@host --plans recompute --at-once 24 8 1

Each row is an engine (step_rows.py) with a memory plan and a number of fragments at once; two steps are made. GPU memory is the peak of
torch's tensors; what torch holds in reserve is printed beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tscale_fed.bench.step import PRESETS

if TYPE_CHECKING:
    from tscale_fed.bench.step_measure import Timed
    from tscale_fed.bench.step_rows import Sizes

ROWS = ("int8/fp8", "int8/fp8@host")
FORECAST_ERROR = 0.05
"""Share by which the GPU's memory may differ from the forecast."""
SMALLEST_CHECKED_BYTES = 1 << 30
"""Below it torch's rounding of tensors to blocks outweighs everything."""
HOST_BYTES_PER_WEIGHT = 12.0
HOST_GPU_BYTES = 12.8e9
"""Asked of the 1.5 B model with the optimizer in host memory; the original takes 12.8 GB and 12 bytes per weight."""


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count

    parser = subparsers.add_parser("memory", help="memory of the engine, forecast and taken", allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="big", help="model and batch (default: %(default)s)")
    parser.add_argument("--dims", help="TScale dims string instead of the preset's")
    for name in ("fragments", "tokens", "vocab"):
        parser.add_argument(f"--{name}", type=count, metavar="N", help="instead of the preset's")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=f"default: {' '.join(ROWS)}")
    plans = ("keep", "recompute")
    parser.add_argument("--plans", nargs="+", choices=plans, default=list(plans), metavar="PLAN", help="keep, recompute (default: both)")
    at_once_help = "fragments at once (default: all of a step, a third, a 12th)"
    parser.add_argument("--at-once", nargs="+", type=count, metavar="N", help=at_once_help)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/memory-PRESET.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure plan by plan, write, print. Raises Refused for shapes that cannot be built, OSError for files."""
    from tscale_fed.bench.machine import result_path
    from tscale_fed.bench.progress import Progress
    from tscale_fed.bench.step import sizes_of
    from tscale_fed.bench.step_measure import measure
    from tscale_fed.bench.step_rows import RowOptions, zipf_batches

    progress = Progress()
    sizes = sizes_of(arguments)
    batches = zipf_batches(sizes, 1, seed=1)
    at_once = arguments.at_once or sorted({max(1, sizes.fragments // part) for part in (1, 3, 12)}, reverse=True)
    found: list[tuple[str, int, Timed]] = []

    def keep(row: Timed, plan: str, fragments: int) -> None:
        found.append((plan, fragments, row))

    for name in dict.fromkeys(arguments.rows):
        for plan in dict.fromkeys(arguments.plans):
            for fragments in at_once:
                options = RowOptions(-(-sizes.fragments // fragments), plan)
                measure(name, sizes, batches, options, progress.say, steps=1, warm_up=1, seconds=60.0, top=0,
                        keep=partial(keep, plan=plan, fragments=fragments))  # fmt: skip
    path = result_path(f"memory-{arguments.preset}", arguments.out)
    _write(path, arguments, sizes, found)
    over = complaints(sizes, arguments.preset, found)
    print("\n".join(["", *table_lines(sizes, found), *over, f"written: {path}"]))
    return 0 if not over and any(not row.failure for _, _, row in found) else 1


def complaints(sizes: Sizes, preset: str, found: Sequence[tuple[str, int, Timed]]) -> list[str]:
    """Forecasts that do not hold; limits that are not kept. Rows that do not fit the card are none: that is what plans are for."""
    told = []
    for plan, fragments, row in found:
        if row.failure:
            continue
        title = f"{row.name} {plan} {fragments}"
        if row.peak_bytes > SMALLEST_CHECKED_BYTES and abs(row.peak_bytes / row.facts["gpu_bytes"] - 1) > FORECAST_ERROR:
            told.append(f"{title}: takes {row.peak_bytes / 1e9:.2f} GB of the GPU, forecast {row.facts['gpu_bytes'] / 1e9:.2f}")
        if preset == "big" and row.host_bytes / sizes.shape.parameters > HOST_BYTES_PER_WEIGHT:
            told.append(f"{title}: {row.host_bytes / sizes.shape.parameters:.2f} bytes of host memory per weight")
    hosts = [max(row.peak_bytes, row.reserved_bytes) for _, _, row in found if row.name.endswith("@host") and not row.failure]
    if preset == "big" and hosts and min(hosts) > HOST_GPU_BYTES:
        told.append(f"no plan with the optimizer in host memory takes less than {min(hosts) / 1e9:.1f} GB of the GPU")
    return told


def table_lines(sizes: Sizes, found: Sequence[tuple[str, int, Timed]]) -> list[str]:
    """What the bench prints."""
    weights = sizes.shape.parameters
    lines = [
        f"{sizes.shape.dims}, {weights / 1e6:.2f} M weights, steps of {sizes.fragments} x {sizes.tokens} tokens",
        f"{'row':<16}{'plan':<11}{'at once':>8}{'GPU GB':>9}{'forecast':>9}{'off by':>8}{'held GB':>9}{'host GB':>9}{'B/weight':>9}"
        f"{'forecast':>9}{'ms/step':>9}",
    ]
    for plan, fragments, row in found:
        start = f"{row.name:<16}{plan:<11}{fragments:>8}"
        if row.failure:
            lines.append(f"{start}  {row.failure}")
            continue
        forecast = row.facts["gpu_bytes"]
        off = f"{row.peak_bytes / forecast - 1:+.1%}" if row.peak_bytes else "-"
        lines.append(
            f"{start}{row.peak_bytes / 1e9:>9.2f}{forecast / 1e9:>9.2f}{off:>8}{row.reserved_bytes / 1e9:>9.2f}"
            f"{row.host_bytes / 1e9:>9.2f}{row.host_bytes / weights:>9.2f}{row.facts['host_bytes_forecast'] / weights:>9.2f}"
            f"{row.median_ms:>9.1f}"
        )
    return lines


def _write(path: Path, arguments: argparse.Namespace, sizes: Sizes, found: Sequence[tuple[str, int, Timed]]) -> None:
    import dataclasses
    import time

    from tscale_fed.bench.machine import command_text, machine_facts, write_result

    values = {
        "bench": "memory",
        "command": command_text(),
        "machine": machine_facts(str(sizes.device), time.time()),
        "sizes": {"dims": sizes.shape.dims, "fragments": sizes.fragments, "tokens": sizes.tokens, "vocab": sizes.shape.vocab},
        "complaints": complaints(sizes, arguments.preset, found),
        "rows": [{"plan": plan, "at_once": fragments, **dataclasses.asdict(row)} for plan, fragments, row in found],
    }
    write_result(path, values)
