"""`tscale bench parallel`: several GPUs of one host, against one of them.

Enters: a preset, how many GPUs, rows. Leaves: a table, a JSON file that is written anew after every row, exit code 0.

    tscale bench parallel --gpus 2                                     1.5 billion weights, 24 x 1024 tokens per GPU and step
    tscale bench parallel --gpus 2 --preset 125m --steps 300 --text medium.txt.xz --rows one exact onebit swarm
    tscale bench parallel --gpus 2 --preset tiny --device cpu --steps 20

Rows: `one` GPU alone; `exact` and `onebit` gradients over all of them, each with a batch of its own; `swarm`: a peer per GPU, exchanging
through proxies that limit rate and delay. All but `one` see equally many tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.parallel_rows import Job

PRESETS: dict[str, dict[str, Any]] = {
    "big": dict(dims="e1280h20d42w1024", fragments=24, accumulate=1, tokens=1024, tokenizer="gpt2"),
    "125m": dict(dims="e512h3d50w1024", fragments=16, accumulate=1, tokens=1024, tokenizer="gpt2"),
    "tiny": dict(dims="e128h1d2w16", fragments=2, accumulate=1, tokens=16, tokenizer="bytes"),
}
ROWS = ("one", "exact", "onebit")
"""Measured unless others are named."""
ALL_ROWS = (*ROWS, "swarm")
STEPS = 40
LOOK_S = 0.5
LAST_ROW_S = 30.0
"""What a row may take after --seconds: rows that hang end the bench."""
TEXT_BYTES = 20_000_000
"""Of a text, at most: what a few hundred steps read, and tokenized in seconds."""


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count, positive

    parser = subparsers.add_parser("parallel", help="several GPUs of one host against one of them", allow_abbrev=False)
    parser.add_argument("--gpus", type=count, default=2, metavar="N", help="processes, one per GPU (default: %(default)s)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="big", help="model and batch (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ALL_ROWS, default=list(ROWS), help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--steps", type=count, default=STEPS, metavar="N", help="steps of every row (default: %(default)s)")
    parser.add_argument("--evaluate-every", type=int, default=0, metavar="N", help="steps between held-out losses (default: at the end)")
    parser.add_argument("--rate", type=positive, default=0.01, help="step size (default: %(default)s)")
    parser.add_argument("--warm-up", type=count, default=50, metavar="N", help="steps over which it rises (default: %(default)s)")
    parser.add_argument("--dims", help="TScale dims string instead of the preset's")
    for name in ("fragments", "accumulate", "tokens"):
        parser.add_argument(f"--{name}", type=count, metavar="N", help="instead of the preset's, per GPU")
    parser.add_argument("--text", type=Path, metavar="FILE", help="plain text, .xz or .gz (default: the demo's)")
    parser.add_argument("--text-bytes", type=count, default=TEXT_BYTES, metavar="N", help="of it, at most (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="of the engine (default: %(default)s)")
    parser.add_argument("--attention", default="auto", help="of the engine (default: %(default)s)")
    parser.add_argument("--micro-batch", type=count, default=0, metavar="N", help="fragments at once (default: from free memory)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: processes with gloo, for trying it out")
    parser.add_argument("--publish-every", type=count, default=5, metavar="N", help="the swarm's steps between two deltas (default: 5)")
    parser.add_argument("--megabits", type=positive, default=100.0, metavar="R", help="of every peer's connection (default: 100)")
    parser.add_argument("--delay-ms", type=positive, default=100.0, metavar="D", help="of a round trip between two peers (default: 100)")
    parser.add_argument("--seconds", type=positive, default=540.0, metavar="S", help="the whole bench: rows end then (default: 540)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/parallel-PRESET.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print. Raises Refused, OSError for files."""
    from tscale_fed.bench.machine import result_path
    from tscale_fed.bench.parallel_table import table_lines
    from tscale_fed.bench.progress import Progress

    progress = Progress()
    path = result_path(f"parallel-{arguments.preset}", arguments.out)
    with tempfile.TemporaryDirectory(prefix="tscale-parallel-") as name:
        folder = Path(name)
        job = job_of(arguments, folder)
        found: dict[str, Any] = {"machine": _machine(arguments), "rows": []}
        processes = [row for row in arguments.rows if row != "swarm"]
        if processes:

            def keep() -> None:
                found["machine"].update(_read(folder / "machine.json", {}))
                found["rows"] = _read(folder / "rows.json", [])
                _write(path, arguments, job, found)

            complete = _run_processes(job, folder, processes, arguments.gpus, keep)
            if not complete:
                found["rows"].append(
                    {
                        "row": processes[min(len(found["rows"]), len(processes) - 1)],
                        "ranks": arguments.gpus,
                        "failure": "a process ended or hung",
                    }
                )
        if "swarm" in arguments.rows:
            from tscale_fed.bench.parallel_swarm import measure_swarm

            left = arguments.seconds - progress.seconds
            found["rows"].append(measure_swarm(job, folder, arguments, left, progress.say))
            _write(path, arguments, job, found)
    print("\n".join(["", *table_lines(found["rows"]), f"written: {path}"]))
    return 0 if all("failure" not in row for row in found["rows"]) and found["rows"] else 1


def job_of(arguments: argparse.Namespace, folder: Path) -> Job:
    """What all rows have in common; the text is unpacked into `folder`. Raises Refused("no-text", "bad-bench")."""
    from tscale_fed.bench.options import shape_of
    from tscale_fed.bench.parallel_rows import Job
    from tscale_fed.bench.quality_text import read_bytes
    from tscale_fed.config import DEMO_SOURCE

    source = DEMO_SOURCE
    if arguments.text is not None:
        (folder / "text.txt").write_bytes(read_bytes(arguments.text)[: arguments.text_bytes])
        source = str(folder / "text.txt")
    given = {name: getattr(arguments, name) for name in ("dims", "fragments", "accumulate", "tokens")}
    chosen = {**PRESETS[arguments.preset], **{name: value for name, value in given.items() if value is not None}}
    shape_of(chosen["dims"], 256)
    return Job(
        source=source, steps=arguments.steps, evaluate_every=arguments.evaluate_every, rate=arguments.rate, warm_up=arguments.warm_up,
        precision=arguments.precision, attention=arguments.attention, micro_batch=arguments.micro_batch, device=arguments.device,
        folder=str(folder), seconds=arguments.seconds, **chosen,
    )  # fmt: skip


def _run_processes(job: Job, folder: Path, rows: list[str], ranks: int, keep: Callable[[], None]) -> bool:
    """All rows but the swarm, in one set of processes that meet on this machine; `keep` is called after every row. Whether all ended well
    in time: if one does not, the others are killed."""
    from tscale_fed.parallel.launch import free_port, rank_environments

    (folder / "job.json").write_text(json.dumps({**job.as_json(), "rows": rows}))
    command = [sys.executable, "-m", "tscale_fed.bench.parallel_rows", str(folder)]
    started = [subprocess.Popen(command, env=each) for each in rank_environments(os.environ, ranks, free_port())]
    began, known = time.monotonic(), 0
    try:
        while any(process.poll() is None for process in started):
            time.sleep(LOOK_S)
            rows_now = len(_read(folder / "rows.json", []))
            if rows_now > known:
                known = rows_now
                keep()
            if any(process.poll() for process in started) or time.monotonic() - began > job.seconds + LAST_ROW_S:
                break
    finally:
        for process in started:
            process.kill()
    keep()
    return [process.wait() for process in started] == [0] * ranks


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Without touching a GPU: the processes tell which cards they had."""
    from tscale_fed.bench.machine import machine_facts

    return machine_facts("cpu", time.time())


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


def _write(path: Path, arguments: argparse.Namespace, job: Job, found: dict[str, Any]) -> None:
    from tscale_fed.bench.machine import command_text, write_result

    sizes = {name: value for name, value in job.as_json().items() if name not in ("source", "folder", "seconds")}
    text = "the demo's" if arguments.text is None else arguments.text.name
    write_result(path, {"bench": "parallel", "command": command_text(), **found, "gpus": arguments.gpus, "text": text, "sizes": sizes})
