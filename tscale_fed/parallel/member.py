"""One process of `tscale train` among several: everything that a lone process does, in step with the others.

Enters: the command line, the run file, its `World`. Leaves: an exit code. Rank 0 speaks, holds the home and saves; on every other host the
first process brings the text, after rank 0 has (hosts may share a file system). What stops all ranks alike is told by rank 0 alone.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from blake3 import blake3
from msgspec import to_builtins

from tscale_fed import __version__
from tscale_fed.assembly import prepare_data
from tscale_fed.commands.train import lone_home
from tscale_fed.config import RunConfig
from tscale_fed.console import Console, standard_console
from tscale_fed.data.token_data import TokenData
from tscale_fed.device import Device, choose_device
from tscale_fed.home import Home, HomeLock, make_private
from tscale_fed.interrupts import Interrupts
from tscale_fed.parallel.agreement import agree
from tscale_fed.parallel.group import Group
from tscale_fed.parallel.launch import EXIT_LOST, LAUNCHER, STOP_ANSWER
from tscale_fed.parallel.limits import DATA_WAIT_S
from tscale_fed.parallel.world import World
from tscale_fed.prepare_run import prepare_member, use_threads
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock

TOLD_BY_RANK_0 = ("parallel-differs", "replicas-differ", "loss-not-finite", "rank-lost")
"""Refusals that all ranks meet at once."""
OWN_SECTIONS = ("device", "eval", "checkpoint")
"""Of the run file: what hosts may differ in."""


def run_member(args: argparse.Namespace, config: RunConfig, world: World) -> int:
    """Train as one of `world.size` processes. Raises Refused."""
    if args.gpus not in (None, world.local_size):
        raise Refused("bad-world", f"--gpus {args.gpus} beside {world.local_size} processes that are started already: leave --gpus out")
    launcher = int(os.environ.get(LAUNCHER, "0"))
    clock = SystemClock()
    console = standard_console(clock) if world.leader else Console(io.StringIO(), clock, terminal=False)
    with Interrupts("" if launcher or not world.leader else STOP_ANSWER) as asked:

        def stop() -> bool:
            """A launcher that was killed cannot ask any more: then these processes have another parent."""
            return asked.stop or bool(launcher and os.getppid() != launcher)

        try:
            code = _train(args, config, world, console, clock, stop)
        except Refused as refused:
            console.close()
            code = _end(refused, world, launcher)
    console.close()
    return code


def _train(
    args: argparse.Namespace, config: RunConfig, world: World, console: Console, clock: SystemClock, stop: Callable[[], bool]
) -> int:
    device = _device(args.device, config, world)
    home = lone_home(args.home, config)
    with _held(home, world):
        group = Group.open(world, device.torch_device, stop)
        use_threads(config, device, console, world.local_size)
        console.say(f"{world.size} processes, {config.parallel.gradients} gradients, a step is {world.size} times [batch]")
        agree(group, _facts(config, args.steps), "run")
        data = _data(config, home, group, console)
        agree(group, {"text": data.hash}, "text")
        prepare_member(config, device, home, data, group, console, clock, args.steps).run(stop)
        group.close()
    return 0


def _device(request: str, config: RunConfig, world: World) -> Device:
    """This rank's GPU, or the processor. Raises Refused("no-device") if this host shows fewer GPUs than it has processes."""
    if request not in ("auto", "cpu", "cuda"):
        raise Refused("no-device", f"--device {request} names one GPU, but {world.local_size} processes run here: leave it out")
    shown = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if request == "cpu" or (request == "auto" and shown == 0):
        return choose_device(request, config.device)
    if shown < world.local_size:
        raise Refused("no-device", f"{world.local_size} processes, but this host shows {shown} GPU(s): use --gpus {max(shown, 1)}")
    torch.cuda.set_device(world.local_rank)
    return choose_device(f"cuda:{world.local_rank}", config.device)


@contextmanager
def _held(home: Home, world: World) -> Iterator[None]:
    """Rank 0 holds the home; elsewhere it is a place for text, which several processes may read."""
    if world.leader:
        with HomeLock(home):
            yield
    else:
        if world.local_rank == 0:
            make_private(home.path)
        yield


def _facts(config: RunConfig, steps: int | None) -> dict[str, Any]:
    """What all hosts must have alike: sources by their content (the text is compared itself), everything else literally."""
    sections = {name: value for name, value in to_builtins(config).items() if name not in OWN_SECTIONS}
    sections["data"] = {**sections["data"], "sources": None, "tokenizer": None}
    facts: dict[str, Any] = {f"[{name}]": _digest(value) for name, value in sections.items()}
    return {**facts, "--steps": steps, "program version": __version__, "PyTorch": torch.__version__.partition("+")[0]}


def _digest(value: Any) -> str:
    return blake3(repr(value).encode()).hexdigest()[:12]


def _data(config: RunConfig, home: Home, group: Group, console: Console) -> TokenData:
    """Rank 0 brings the text to its home, then the first process of every other host to its own, then all open it."""
    world = group.world

    def prepare() -> TokenData:
        return prepare_data(config.data, home.data, lambda done, total, _rate: console.progress("reading text", done, total))

    data = None
    if world.leader:
        data = prepare()
        group.tell("text/0", data.hash)
    group.hear("text/0", DATA_WAIT_S)
    host = world.rank - world.local_rank
    if world.local_rank == 0 and not world.leader:
        data = prepare()
        group.tell(f"text/{host}", data.hash)
    group.hear(f"text/{host}", DATA_WAIT_S)
    return data or prepare()


def _end(refused: Refused, world: World, launcher: int) -> int:
    """How a refused process ends: with its sentence, or silently where another one tells."""
    if refused.code not in TOLD_BY_RANK_0:
        raise refused
    lost = refused.code == "rank-lost"
    if world.leader and not (lost and launcher):  # the launcher knows better who was lost, and how
        print(f"tscale: {refused.detail}", file=sys.stderr, flush=True)
    if lost and torch.cuda.is_initialized():
        sys.stdout.flush()
        os._exit(EXIT_LOST)  # an exchange that never ends is still on the GPU: an orderly exit would wait for it
    return EXIT_LOST if lost or not world.leader else 1
