"""`tscale bench kernels`: every kernel on this machine's GPU at real sizes: checked against its reference, timed beside torch's own.

Enters: which sizes and cases. Leaves: a table, docs/bench/kernels-CARD.json, exit code 0 if every case was right and timed, else 1.
First all cases run once against the reference in several processes, on fresh numbers and poisoned outputs; that also compiles the kernels
into triton's cache. Then one process times those that were right. A case that fails is reported, the others go on.
The cases are those of tests/kernels, so this bench needs the project's folder.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tscale_fed.bench.kernel_rows import Row

SIZES = ("small", "full")
"""Names of the sizes in tests/kernels/gpu_check.py: a byte model of 64 x 256 tokens, the 1.5B model of 24 x 1024 tokens."""
SECONDS = 88.0
CHECK_SHARE = 0.65
"""Of the time, at most, for the check and the compiles."""
MINOR = ("bf16", "odd")
"""Words in the names of variants that are only measured with --all."""
_CHECK_PROCESSES = 8


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    parser = subparsers.add_parser("kernels", help="time of every GPU kernel beside torch's own", allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="model and batch sizes (default: all)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name contains one of the words")
    parser.add_argument("--all", action="store_true", help="bf16 variants too")
    seconds_help = "cases not timed by then are reported as failed (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=SECONDS, help=seconds_help)
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/kernels-CARD.json)")


def run(arguments: argparse.Namespace) -> int:
    """Check, time, print, write. Raises Refused without a CUDA device or the project's folder, OSError for the file."""
    import torch

    from tscale_fed.bench.kernel_rows import table_lines
    from tscale_fed.bench.machine import result_path
    from tscale_net.errors import Refused
    from tscale_net.ports import SystemClock

    if not torch.cuda.is_available():
        raise Refused("no-cuda", "bench kernels needs a CUDA device; tests/kernels/interpreted.py checks the kernels without one")
    folder = cases_folder()
    clock, device = SystemClock(), torch.device("cuda")
    deadline = clock.now() + arguments.seconds
    sys.path.insert(0, str(folder))
    outcomes = check_cases(arguments)
    wrong = {outcome.name: outcome.text for outcome in outcomes if outcome.verdict == "FAIL"}
    right = [outcome.name for outcome in outcomes if outcome.verdict == "PASS"]
    print(f"{len(right)} cases right, {len(wrong)} wrong, {len(outcomes) - len(right) - len(wrong)} skipped", flush=True)
    copy_gb_s = copy_bandwidth(device)
    rows = timed_rows(arguments, right, device, lambda: clock.now() < deadline)
    rows += [failed_row(name, text) for name, text in wrong.items()]
    path = result_path(f"kernels-{card_name(torch.cuda.get_device_name(device))}", arguments.out)
    write(path, rows, copy_gb_s, clock.wall())
    print("\n".join([*table_lines(rows, copy_gb_s), "", f"copy {copy_gb_s:.0f} GB/s (read and write); written: {path}"]))
    return 1 if any(row.error for row in rows) or not rows else 0


def cases_folder() -> Path:
    """tests/kernels of the project this package lies in. Raises Refused if the package was installed without it."""
    from tscale_net.errors import Refused

    folder = Path(__file__).resolve().parents[2] / "tests" / "kernels"
    if not (folder / "case_protocol.py").exists():
        raise Refused("no-cases", f"{folder} is missing: run this bench in a clone of the project, which has the cases to measure")
    return folder


def check_cases(arguments: argparse.Namespace) -> list[Any]:
    """Outcomes of every case (tests/kernels/run_cases.py); failures are printed as they come."""
    gpu_check = importlib.import_module("gpu_check")
    words = ["--sizes", *arguments.sizes, "--seconds", str(arguments.seconds * CHECK_SHARE), "--processes", str(_CHECK_PROCESSES)]
    words += [*(["--only", *arguments.only] if arguments.only else []), *([] if arguments.all else ["--without", *MINOR])]
    options = gpu_check.options_of(words)
    gpu_check.complete(options)

    def tell(outcome: Any) -> None:
        if outcome.verdict == "FAIL":
            print(outcome.line(), flush=True)

    outcomes: list[Any] = gpu_check.run_all(options, tell)
    return outcomes


def timed_rows(arguments: argparse.Namespace, right: list[str], device: torch.device, in_time: Callable[[], bool]) -> list[Row]:
    """A row for each case that is right and meant to be timed, in the order of the cases."""
    import torch

    from tscale_fed.bench.kernel_rows import Row

    gpu_check, run_cases = importlib.import_module("gpu_check"), importlib.import_module("run_cases")
    rows: list[Row] = []
    baselines: dict[Any, dict[str, float]] = {}
    for size in arguments.sizes:
        without = [] if arguments.all else list(MINOR)
        for name, build in run_cases.load_cases(run_cases.found_modules(), arguments.only, without).items():
            if f"{name} @{size}" not in right:
                continue
            if not in_time():
                rows.append(Row(gpu_check.SIZES[size].name, name, error=f"not timed: {arguments.seconds:.0f} s were over"))
                continue
            try:
                row = timed_case(gpu_check.SIZES[size], name, build, device, baselines)
            except Exception as error:  # one broken case must not hide the others
                row = Row(gpu_check.SIZES[size].name, name, error=run_cases.short_traceback(error))
            rows += [row] if row else []
            torch.cuda.empty_cache()
    return rows


def timed_case(sizes: Any, name: str, build: Any, device: torch.device, baselines: dict[Any, dict[str, float]]) -> Row | None:
    """Figures of one case beside its baselines (each measured once per size); None for a case that is only checked."""
    from tscale_fed.bench.kernel_rows import Row
    from tscale_fed.bench.kernel_timing import rotations, time_calls

    protocol = importlib.import_module("case_protocol")
    first = build(protocol.Setting(sizes, device, 1))
    if not first.timed:
        return None
    sets = rotations(first.bytes_moved, device)
    cases = [first, *(build(protocol.Setting(sizes, device, seed)) for seed in range(2, sets + 1))]
    timing = time_calls([_call(case) for case in cases])
    operations, moved = first.operations, first.bytes_moved
    beside = _baseline(first, device, baselines)
    return Row(sizes.name, name, timing.ms, timing.launch_us, timing.spread, timing.graph, operations, moved, beside)


def _call(case: Any) -> Callable[[], None]:
    out = case.outputs()
    return lambda: case.run(out, "triton")


def _baseline(case: Any, device: torch.device, known: dict[Any, dict[str, float]]) -> dict[str, float]:
    """ms of torch's kernels for the same product or attention."""
    from tscale_fed.bench import kernel_baselines as torch_kernels

    found: dict[str, float] = {}
    if case.matmul is not None:
        if case.matmul not in known:
            known[case.matmul] = {"bf16 mm": _median_ms(lambda: torch_kernels.matmul_calls(case.matmul, device, 2))}
        found |= known[case.matmul]
    if case.attention is not None:
        a = case.attention
        key = (a.fragments, a.heads, a.tokens, a.part)
        if key not in known:
            names = {kind: f"{kind}{' all keys' if a.width < a.tokens else ''}" for kind in torch_kernels.SDPA}
            known[key] = {
                name: _median_ms(partial(torch_kernels.attention_calls, kind, *key, device, 2))
                for kind, name in names.items()
            }
        found |= known[key]
    return {name: ms for name, ms in found.items() if ms}


def _median_ms(make: Callable[[], Any]) -> float:
    """0 where torch has no such kernel for this card or size."""
    from tscale_fed.bench.kernel_timing import time_calls

    try:
        return time_calls(make()).ms
    except RuntimeError:
        return 0.0


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a plain copy, read and write counted."""
    from tscale_fed.bench.kernel_baselines import COPY_BYTES, copy_call
    from tscale_fed.bench.kernel_timing import time_calls

    return 2 * COPY_BYTES / time_calls([copy_call(device)]).ms / 1e6


def failed_row(title: str, text: str) -> Row:
    """A case that the check found wrong; its title is CASE @SIZE."""
    from tscale_fed.bench.kernel_rows import Row

    gpu_check = importlib.import_module("gpu_check")
    name, _, size = title.partition(" @")
    return Row(gpu_check.SIZES[size].name if size in gpu_check.SIZES else size, name, error=text[:300])


def card_name(device_name: str) -> str:
    """"NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().removeprefix("nvidia")).strip("-")


def write(path: Path, rows: list[Row], copy_gb_s: float, unix_time: float) -> None:
    """The result file."""
    import triton

    from tscale_fed.bench.machine import command_text, machine_facts, write_result

    machine = machine_facts("cuda", unix_time)
    machine["versions"]["triton"] = triton.__version__
    values = {"bench": "kernels", "command": command_text(), "machine": machine, "copy_gb_s": round(copy_gb_s, 1)}
    write_result(path, {**values, "rows": [row.values() for row in rows]})
