"""One call of the rules bench: its text, its machine, what was seen of its speed.

Enters: the command line's arguments. Leaves: rows that were run, a forecast of what a row needs, the facts that belong to its figures. The
machine is built at the first row and serves all others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tscale_fed.bench.machine import command_text, machine_facts
from tscale_fed.bench.options import formats_of, shape_of
from tscale_fed.bench.rules_engine import EngineMachine
from tscale_fed.bench.rules_peers import Machine, PlainMachine
from tscale_fed.bench.rules_rows import Row
from tscale_fed.bench.rules_run import Plan, Ran, RowRun, grid_start
from tscale_fed.bench.rules_sizes import PLAIN, SIZES
from tscale_fed.bench.rules_text import VOCAB, RulesText
from tscale_fed.bench.step_measure import forget
from tscale_fed.data.sources import demo_folder, find_sources
from tscale_fed.device import torch_device
from tscale_fed.engine.precision import choose_precision

CURVE_PART = 4
"""Curves are taken over this part of the fragments: comparable with each other, not with the losses at the end."""
LANES_PROBED = (1, 2, 4)
PROBE_WARM_UP, PROBE_TICKS = 3, 20
PROBE_RATE = 0.01


class Call:
    """Text, sizes and the machine of one call; what was seen of its speed."""

    def __init__(self, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:

        size = SIZES[arguments.size]
        self._say, self._lanes = say, arguments.lanes or size.lanes
        self._device = torch_device(arguments.device or ("cpu" if arguments.size == "tiny" else "cuda"))
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
        self._compiled: set[bool] = set()
        say(f"{shape.trained_parameters:,} weights, {arguments.peers} peers, {ticks} ticks of {tick_bytes:,} bytes; {self._arithmetic}")

    @property
    def settings(self) -> dict[str, Any]:
        """What a row is known by beside its name and seed."""
        plan = self.plan
        return {
            "peers": plan.peers, "batch": plan.fragments * plan.tokens, "ticks": plan.ticks, "dims": plan.shape.dims,
            "held_out": plan.final_fragments, "arithmetic": self._arithmetic, "text": self._text.sha256[:16],
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What a figure never travels without."""
        text = {"sha256": self._text.sha256, "bytes": len(self._text.ids), "train_bytes": self._text.train_bytes}
        machine = machine_facts(str(self._device), time.time())
        return {"command": command_text(), "machine": machine, "text": text, "lanes": self._lanes}

    def measure(self, row: Row, seed: int) -> Ran:
        """Run one row."""
        machine = self._ready(row.kind == "sync")
        if seed not in self._starts:
            self._starts = {seed: grid_start(self.plan.shape, seed, self._device)}
        ran = RowRun(row, seed, self.plan, machine, self._text, self._starts[seed]).run(self._say)
        if ran.peer_steps and not ran.failure:
            seen = ran.seconds / ran.peer_steps
            self._step_seconds[row.kind == "sync"] = min(seen, self._step_seconds.get(row.kind == "sync", seen))
        return ran

    def _ready(self, joint: bool) -> Machine:
        """The machine, with everything compiled that a row needs, so that rows are only training."""
        plan, started = self.plan, time.perf_counter()
        if self._machine is None:
            self._machine = make_machine(plan, self._text, self._arithmetic, self._lanes)
        places = self._text.positions(0, plan.peers, 1, plan.fragments, plan.tokens, False)[:, 0]
        if joint not in self._compiled:
            self._compiled.add(joint)
            if joint:
                self._machine.joint_step(places, PROBE_RATE)
            else:
                self._machine.step(range(plan.peers), places, PROBE_RATE)
            self._machine.loss(self._machine.state.weights[0], plan.curve_fragments)
            self._say(f"built for {'joint' if joint else 'own'} steps in {time.perf_counter() - started:.1f} s")
        return self._machine

    def seconds_of(self, row: Row) -> float:
        """Forecast from the rows so far; 0 before the first."""
        known = self._step_seconds.get(row.kind == "sync", max(self._step_seconds.values(), default=0.0))
        peers = 1 if row.kind == "one" else self.plan.peers
        steps = sum(row.speed_of(peer) for peer in range(peers)) * self.plan.ticks * row.times
        return known * steps

    def probe(self) -> int:
        """Time some ticks with every number of lanes."""
        for lanes in LANES_PROBED:
            self._say(f"{self._arithmetic}, {lanes} lanes: {self._probed(lanes)}")
            forget()
        return 0

    def _probed(self, lanes: int) -> str:
        plan, started = self.plan, time.perf_counter()
        places = self._text.positions(1, plan.peers, 1, plan.fragments, plan.tokens, False)[:, 0]
        machine = make_machine(plan, self._text, self._arithmetic, lanes)
        machine.reset(grid_start(plan.shape, 1, self._device), 1)
        apart = self._milliseconds(lambda: machine.step(range(plan.peers), places, PROBE_RATE))
        joint = self._milliseconds(lambda: machine.joint_step(places, PROBE_RATE))
        memory = torch.cuda.max_memory_allocated(self._device) / 1e9 if self._device.type == "cuda" else 0.0
        took = time.perf_counter() - started
        return f"{apart:.3f} ms per peer and step, synchronous {joint:.3f}; {memory:.1f} GB; {took:.0f} s with building"

    def _milliseconds(self, tick: Callable[[], None]) -> float:
        """Per peer and step, after some ticks that compile."""
        started = 0.0
        for done in range(PROBE_WARM_UP + PROBE_TICKS):
            if done == PROBE_WARM_UP:
                self._wait()
                started = time.perf_counter()
            tick()
        self._wait()
        return (time.perf_counter() - started) / PROBE_TICKS / self.plan.peers * 1e3

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def make_machine(plan: Plan, text: RulesText, arithmetic: str, lanes: int) -> Machine:
    """What steps the peers. Raises Refused for an arithmetic that does not exist or that the device lacks."""

    if arithmetic == PLAIN:
        return PlainMachine(plan.shape, text, plan.peers, plan.fragments, plan.tokens)

    precision, _ = choose_precision(text.ids.device, *formats_of(arithmetic))
    return EngineMachine(plan.shape, text, plan.peers, plan.fragments, plan.tokens, precision, lanes=lanes)


def _text_of(path: Path | None) -> RulesText:

    return RulesText.open([file.path for file in find_sources([demo_folder()])] if path is None else [path])
