"""`tscale train CONFIG` trains on the devices of one owner: no peers, no swarm, the same trainer as a peer.

Prints progress, evaluates and saves now and then, and goes on where it stopped. Ctrl+C once finishes the step, saves and ends; twice stops.
With `--gpus N` it starts N processes (parallel/launch.py), each of which is this command again, told by its environment which one it is;
torchrun does the same on several hosts.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tscale_fed.config import RunConfig
    from tscale_fed.home import Home

MOST_PROCESSES = 64
"""More GPUs than any host has."""
LONE_FOLDER = "alone"
"""Inside the home: runs of `tscale train`, one folder each, apart from the swarm run of the same home."""

EPILOG = """examples:
  tscale train configs/demo-cpu.toml                  minutes on a laptop
  tscale train configs/gpt2-124m.toml --device cuda:0
  tscale train configs/gpt2-124m.toml --gpus 4        four GPUs of this host, each with the run file's batch
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m tscale_fed train RUN.toml

Without --home the run is kept under the user's data directory and goes on where it stopped.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe `tscale train` to argparse."""
    parser = subparsers.add_parser(
        "train",
        help="train without a swarm, on one or more devices, from a run file",
        description="Train without a swarm. Ctrl+C once finishes the step, saves and ends; twice stops at once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file, such as configs/demo-cpu.toml")
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--gpus", type=_gpus, metavar="N", help="processes on this host, one per GPU (with --device cpu: on the processor)")
    parser.add_argument("--home", type=Path, metavar="DIR", help="where data and checkpoints are kept")
    parser.add_argument("--steps", type=_steps, metavar="N", help="stop at step N (default: budget_batches of the run file)")


def _steps(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _gpus(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_PROCESSES:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 to {MOST_PROCESSES}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Train until the budget, `--steps` or Ctrl+C. Raises Refused, whose sentence `tscale` prints."""
    from tscale_fed.config import load_config
    from tscale_fed.parallel.world import world_from

    config = load_config(args.config)
    world = world_from(os.environ)
    if world is not None:
        from tscale_fed.parallel.member import run_member

        return run_member(args, config, world)
    return _launch(args) if (args.gpus or 1) > 1 else _run_alone(args, config)


def _launch(args: argparse.Namespace) -> int:
    """This command once more in every process."""
    from tscale_fed.parallel.launch import Launcher
    from tscale_net.errors import Refused

    if args.device not in ("auto", "cpu", "cuda"):
        raise Refused("no-device", f"--device {args.device} names one GPU, --gpus {args.gpus} takes the first {args.gpus}: leave one out")
    words = ["train", str(args.config), "--device", args.device, "--gpus", str(args.gpus)]
    words += ["--home", str(args.home)] if args.home is not None else []
    words += ["--steps", str(args.steps)] if args.steps is not None else []
    code, sentence = Launcher(
        [sys.executable, "-m", "tscale_fed", *(["--debug"] if args.debug else []), *words], args.gpus, os.environ
    ).run()
    if sentence is not None:
        print(f"tscale: {sentence}", file=sys.stderr)
    return code


def _run_alone(args: argparse.Namespace, config: RunConfig) -> int:
    from tscale_fed.console import standard_console
    from tscale_fed.home import HomeLock
    from tscale_fed.interrupts import Interrupts
    from tscale_net.ports import SystemClock

    clock = SystemClock()
    console = standard_console(clock)
    interrupts = Interrupts("finishing the step and saving; Ctrl+C again stops now")
    with HomeLock(lone_home(args.home, config)) as home, interrupts as asked:
        from tscale_fed.prepare_run import prepare_run

        lone = prepare_run(config, args.device, home, console, clock, args.steps)
        lone.run(lambda: asked.stop)
    console.close()
    return 0


def lone_home(chosen: Path | None, config: RunConfig) -> Home:
    """A home of its own per run name, so that a peer and several runs of `tscale train` do not get in each other's way."""
    from tscale_fed.home import Home, default_home

    root = default_home(os.environ) if chosen is None else chosen
    name = "".join(letter if letter.isalnum() else "-" for letter in config.run.name)
    return Home(root / LONE_FOLDER / name)
