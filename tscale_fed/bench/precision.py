"""`tscale bench precision`: how much do 8 bits change predictions and gradients, in basis points?

Enters: precisions, seeds. Leaves: a table beside the limits, a JSON file, exit code 0 if every row is within its limits, else 1.

    tscale bench precision                       on the GPU if there is one, else with the operations' references on the processor
    tscale bench precision --rows int8/fp8 --seeds 32

What is measured stands in precision_cases.py. A row is PRECISION/ATTENTION; limits hold for the mean over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.precision_cases import Difference


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one row, in basis points. `gradient`: of each matrix, at the engine's own states; with it goes a cosine above 0.999."""

    forward: float
    step: float
    gradient: float
    original: str
    """What the original printed on an H100 (forward / after a step; other data, one fragment)."""


LEAST_COSINE = 0.999
ROWS = {
    "bfloat16": Limits(0.25, 1.7, 100, "fp16: 0.15 / 0.22"),
    "int8/bfloat16": Limits(1.4, 31.2, 300, "-"),
    "int8/int8": Limits(1.5, 31.2, 300, "-"),
    "int8/fp8": Limits(1.55, 23.9, 300, "1.76 / 7.61"),
    "fp8/bfloat16": Limits(2.6, 24.1, 450, "-"),
    "fp8/fp8": Limits(2.7, 26.0, 450, "3.07 / 8.79"),
}
"""spec/kernels.md 5.3: forward limits from an emulation, limits after a step from the original's documents. Those of bfloat16 are ours:
the original has fp16 there, with 3 bits more."""
SEEDS = 8


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count

    parser = subparsers.add_parser("precision", help="what 8 bits change in predictions and gradients", allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"of {' '.join(ROWS)}")
    parser.add_argument("--seeds", type=count, default=SEEDS, metavar="N", help="weights and texts 1..N (default: %(default)s)")
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/precision-DEVICE.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print. A row that the device cannot compute is told and left out. Raises OSError for files."""
    import torch

    from tscale_fed.bench.machine import result_path
    from tscale_fed.bench.precision_cases import compare
    from tscale_fed.bench.progress import Progress
    from tscale_net.errors import Refused

    progress = Progress()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, list[Difference]] = {}
    for row in dict.fromkeys(arguments.rows):
        try:
            found[row] = [compare(row, seed, device) for seed in range(1, arguments.seeds + 1)]
        except Refused as error:
            progress.say(f"{row}: {error}")
            continue
        progress.say(f"{row}: forward {_mean([each.forward for each in found[row]]):.2f} bp over {arguments.seeds} seeds")
    path = result_path(f"precision-{device.type}", arguments.out)
    _write(path, str(device), found)
    print("\n".join(["", *table_lines(found), f"written: {path}"]))
    return 0 if found and all(not excesses(row, seeds) for row, seeds in found.items()) else 1


def excesses(row: str, seeds: list[Difference]) -> list[str]:
    """What of a row is over its limit."""
    limits, over = ROWS[row], []
    for name, value, limit in (
        ("forward", _mean([each.forward for each in seeds]), limits.forward),
        ("step", _mean([each.step for each in seeds]), limits.step),
        *((f"gradient of {matrix}", _mean([each.gradients[matrix] for each in seeds]), limits.gradient) for matrix in seeds[0].gradients),
    ):
        if not value <= limit:
            over.append(f"{name} {value:.3g} > {limit:g}")
    for matrix in seeds[0].cosines:
        cosine = _mean([each.cosines[matrix] for each in seeds])
        if not cosine > LEAST_COSINE:
            over.append(f"cosine of {matrix} {cosine:.5f}")
    return over


def table_lines(found: dict[str, list[Difference]]) -> list[str]:
    """What the bench prints."""
    lines = [
        "basis points, mean over seeds (greatest seed); gradients at the engine's states: mean and worst matrix; then against exact ones",
        f"{'row':<15}{'forward':>15}{'limit':>7}{'after a step':>16}{'limit':>7}{'gradient':>10}{'worst':>7}{'limit':>7}{'cosine':>9}"
        f"{'exact':>8}  the original",
    ]
    for row, seeds in found.items():
        limits = ROWS[row]
        per_matrix = [_mean([each.gradients[matrix] for each in seeds]) for matrix in seeds[0].gradients]
        exact = [_mean([each.exact_gradients[matrix] for each in seeds]) for matrix in seeds[0].gradients]
        cosine = min(_mean([each.cosines[matrix] for each in seeds]) for matrix in seeds[0].cosines)
        lines.append(
            f"{row:<15}{_spread([each.forward for each in seeds]):>15}{limits.forward:>7}{_spread([each.step for each in seeds]):>16}"
            f"{limits.step:>7}{_mean(per_matrix):>10.0f}{max(per_matrix):>7.0f}{limits.gradient:>7.0f}{cosine:>9.5f}{_mean(exact):>8.0f}"
            f"  {limits.original}"
        )
    for row, seeds in found.items():
        if over := excesses(row, seeds):
            lines.append(f"{row} over its limits: {'; '.join(over)}")
    return lines


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _spread(values: list[float]) -> str:
    return f"{_mean(values):.2f} ({max(values):.2f})"


def _write(path: Path, device: str, found: dict[str, list[Difference]]) -> None:
    import dataclasses
    import time

    from tscale_fed.bench.machine import command_text, machine_facts, write_result
    from tscale_fed.bench.precision_cases import DIMS, STEP_RATE, TOKENS, VOCAB

    values = {
        "bench": "precision",
        "command": command_text(),
        "machine": machine_facts(device, time.time()),
        "sizes": {"dims": DIMS, "tokens": TOKENS, "vocab": VOCAB, "step_rate": STEP_RATE},
        "limits": {row: dataclasses.asdict(limits) for row, limits in ROWS.items()},
        "over_limits": {row: excesses(row, seeds) for row, seeds in found.items()},
        "rows": {row: [dataclasses.asdict(each) for each in seeds] for row, seeds in found.items()},
    }
    write_result(path, values)
