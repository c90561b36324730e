"""`tscale bench rules`: which way to meet makes many peers learn like one big machine? Simulated peers on one device.

Enters: rows in words (rules_rows.py), a size, a text. Leaves: a table, a JSON file to which calls add up, a CSV file of curves, a plot.

    tscale bench rules --size 5m --text FILE --rows "one lr=.02" "sync lr=.02,.04" "avg topk-64 H=5 lr=.02,.04 decay" "sum sign H=5"
    tscale bench rules --size tiny --rows "one" "sync" "owners avg sign/topk-256"          minutes on a processor
    tscale bench rules --size 5m --text FILE --probe                                       steps per second of every way to compute them

Every peer has weights, momentum and second moments of its own; packets are not made, but each value is the one that a packet would add
(rules_codecs.py, rules_meeting.py). All rows of a seed start from the same weights and read the same text: batch t of peer k is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.bench.rules_peers import Machine
    from tscale_fed.bench.rules_rows import Row
    from tscale_fed.bench.rules_run import Plan
    from tscale_fed.bench.rules_text import RulesText

PLAIN = "plain"
ROWS = ("one lr=.02,.04 decay", "sync lr=.02,.04 decay", "sum sign H=5 lr=.02,.04 decay", "avg topk-64 H=5 lr=.02,.04 decay")
"""Unless others are named."""
CURVE_PART = 4
"""Curves are taken over this part of the fragments: comparable with each other, not with the losses at the end."""
_PROBE_TICKS = 20


@dataclass(frozen=True)
class Size:
    """A preset."""

    dims: str
    fragments: int
    tokens: int
    text_bytes: float
    held_out: int
    """Fragments that losses at the end are taken over."""
    arithmetic: str
    lanes: int


SIZES = {
    "tiny": Size("e128h1d4w64", 4, 64, 200e3, 256, PLAIN, 1),
    "5m": Size("e256h2d8w256", 32, 256, 50e6, 1024, "int8", 2),
    "24m": Size("e256h2d36w256", 32, 256, 200e6, 1024, "int8", 2),
}
"""tiny: 0.7 M weights, for a processor. 5m and 24m: 5.4 and 23.7 M weights, for a GPU."""


def add_parser(subparsers: Any) -> None:
    """Describe the bench."""
    from tscale_fed.bench.options import count, positive

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
    parser.add_argument("--probe", action="store_true", help="only time arithmetics and lanes, for some seconds each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (default: docs/bench/rules-SIZE.json)")


def run(arguments: argparse.Namespace) -> int:
    """Run what the result file lacks, row by row; print. Raises Refused for words, texts and devices that cannot be used."""
    from tscale_fed.bench.machine import result_path
    from tscale_fed.bench.progress import Progress
    from tscale_fed.bench.rules_results import Results, plot
    from tscale_fed.bench.rules_rows import parse_rows
    from tscale_net.errors import Refused

    progress = Progress()
    rows = parse_rows(arguments.rows)
    bench = _Bench(arguments, progress.say)
    if arguments.probe:
        return bench.probe()
    results = Results.open(result_path(f"rules-{arguments.size}", arguments.out), arguments.size)
    call = bench.call()
    skipped = 0
    for seed in range(1, arguments.seeds + 1):
        for row in rows:
            if results.has(row.name, seed, bench.settings):
                continue
            needed = bench.seconds_of(row)
            if arguments.seconds is not None and progress.seconds + needed > arguments.seconds:
                progress.say(f"{row.name}, seed {seed}: left out, it needs about {needed:.0f} s")
                skipped += 1
                continue
            results.add(bench.measure(row, seed), bench.settings, call)
    if not results.runs:
        raise Refused("bad-bench", "no row was run: allow more --seconds")
    print("\n".join(["", *results.table(bench.settings), f"written: {results.path}, {results.path.with_suffix('.csv').name}"]))
    if plot(results.runs, results.path.with_suffix(".png")):
        print(f"plotted: {results.path.with_suffix('.png')}")
    return 1 if skipped else 0


class _Bench:
    """Text, sizes and the machine of one call; what was seen of its speed."""

    def __init__(self, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
        import torch

        from tscale_fed.bench.options import shape_of
        from tscale_fed.bench.rules_run import Plan
        from tscale_fed.bench.rules_text import VOCAB

        size = SIZES[arguments.size]
        self._say, self._lanes = say, arguments.lanes or size.lanes
        self._device = torch.device(arguments.device or ("cpu" if arguments.size == "tiny" else "cuda"))
        self._arithmetic = arguments.arithmetic or size.arithmetic
        fragments = arguments.fragments or size.fragments
        tick_bytes = arguments.peers * fragments * size.tokens
        ticks = max(1, round((arguments.bytes or size.text_bytes) / tick_bytes))
        shape = shape_of(size.dims, VOCAB)
        held_out = arguments.held_out or size.held_out
        self.plan: Plan = Plan(shape, arguments.peers, fragments, size.tokens, ticks, held_out, max(1, held_out // CURVE_PART))
        self._text = _text_of(arguments.text).to(self._device)
        self._machine: Machine | None = None
        self._step_seconds: dict[bool, float] = {}
        self._starts: dict[int, torch.Tensor] = {}
        say(f"{shape.trained_parameters:,} weights, {arguments.peers} peers, {ticks} ticks of {tick_bytes:,} bytes; {self._arithmetic}")

    @property
    def settings(self) -> dict[str, Any]:
        """What a row is known by beside its name and seed."""
        plan = self.plan
        return {
            "peers": plan.peers, "batch": plan.fragments * plan.tokens, "ticks": plan.ticks, "dims": plan.shape.dims,
            "held_out": plan.final_fragments, "arithmetic": self._arithmetic, "text": self._text.sha256[:16],
        }  # fmt: skip

    def call(self) -> dict[str, Any]:
        """What a figure never travels without."""
        import time

        from tscale_fed.bench.machine import command_text, machine_facts

        text = {"sha256": self._text.sha256, "bytes": len(self._text.ids), "train_bytes": self._text.train_bytes}
        machine = machine_facts(str(self._device), time.time())
        return {"command": command_text(), "machine": machine, "text": text, "lanes": self._lanes}

    def measure(self, row: Row, seed: int) -> Any:
        from tscale_fed.bench.rules_run import RowRun, grid_start

        if self._machine is None:
            self._machine = make_machine(self.plan, self._text, self._arithmetic, self._lanes)
        if seed not in self._starts:
            self._starts = {seed: grid_start(self.plan.shape, seed, self._device)}
        ran = RowRun(row, seed, self.plan, self._machine, self._text, self._starts[seed]).run(self._say)
        if ran.peer_steps and not ran.failure:
            # The first row also compiled kernels; the fastest one tells what a row needs.
            seen = ran.seconds / ran.peer_steps
            self._step_seconds[row.kind == "sync"] = min(seen, self._step_seconds.get(row.kind == "sync", seen))
        return ran

    def seconds_of(self, row: Row) -> float:
        """Forecast from the rows so far; 0 before the first."""
        known = self._step_seconds.get(row.kind == "sync", max(self._step_seconds.values(), default=0.0))
        peers = 1 if row.kind == "one" else self.plan.peers
        steps = sum(row.speed_of(peer) for peer in range(peers)) * self.plan.ticks * row.times
        return known * steps

    def probe(self) -> int:
        """Time some ticks of every arithmetic and number of lanes."""
        import time

        import torch

        from tscale_fed.bench.rules_run import grid_start
        from tscale_fed.bench.step_measure import forget

        plan, start = self.plan, grid_start(self.plan.shape, 1, self._device)
        places = self._text.positions(1, plan.peers, 1, plan.fragments, plan.tokens, False)[:, 0]
        for arithmetic in dict.fromkeys((self._arithmetic, "int8", "bfloat16")):
            for lanes in (1, 2, 4):
                began = time.perf_counter()
                machine = make_machine(plan, self._text, arithmetic, lanes)
                machine.reset(start, 1)
                times = {}
                for name in ("peers", "joint"):
                    for tick in range(_PROBE_TICKS + 3):
                        if tick == 3:
                            self._wait()
                            mark = time.perf_counter()
                        if name == "peers":
                            machine.step(range(plan.peers), places, 0.01)
                        else:
                            machine.joint_step(places, 0.01)
                    self._wait()
                    times[name] = (time.perf_counter() - mark) / _PROBE_TICKS / plan.peers * 1e3
                memory = torch.cuda.max_memory_allocated() / 1e9 if self._device.type == "cuda" else 0.0
                took = time.perf_counter() - began
                figures = f"{times['peers']:.3f} ms per peer step, synchronous {times['joint']:.3f}"
                self._say(f"{arithmetic}, {lanes} lanes: {figures}; {memory:.1f} GB, {took:.1f} s")
                del machine
                forget()
        return 0

    def _wait(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()


def make_machine(plan: Plan, text: RulesText, arithmetic: str, lanes: int) -> Machine:
    """What steps the peers. Raises Refused for an arithmetic that does not exist or that the device lacks."""
    from tscale_fed.bench.options import formats_of
    from tscale_fed.bench.rules_peers import PlainMachine

    if arithmetic == PLAIN:
        return PlainMachine(plan.shape, text, plan.peers, plan.fragments, plan.tokens)
    from tscale_fed.bench.rules_engine import EngineMachine
    from tscale_fed.engine.precision import choose_precision

    precision, _ = choose_precision(text.ids.device, *formats_of(arithmetic))
    return EngineMachine(plan.shape, text, plan.peers, plan.fragments, plan.tokens, precision, lanes=lanes)


def _text_of(path: Path | None) -> RulesText:
    from tscale_fed.bench.rules_text import RulesText
    from tscale_fed.data.sources import demo_folder, find_sources

    return RulesText.open([file.path for file in find_sources([demo_folder()])] if path is None else [path])
