"""`tscale train CONFIG` trains alone on one device: no peers, no sockets, the same trainer as a peer of a swarm.

Prints progress, evaluates and saves now and then, and goes on where it stopped. Ctrl+C once finishes the step, saves and ends; twice stops.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tscale_fed.config import RunConfig
    from tscale_fed.console import Console
    from tscale_fed.home import Home
    from tscale_fed.lone_run import LoneRun
    from tscale_net.ports import Clock

LONE_FOLDER = "alone"
"""Inside the home: runs of `tscale train`, one folder each, apart from the swarm run of the same home."""

EPILOG = """examples:
  tscale train configs/demo-cpu.toml                  minutes on a laptop
  tscale train configs/gpt2-124m.toml --device cuda:0

Without --home the run is kept under the user's data directory and goes on where it stopped.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe `tscale train` to argparse."""
    parser = subparsers.add_parser(
        "train",
        help="train alone on one device, from a run file",
        description="Train alone on one device. Ctrl+C once finishes the step, saves and ends; twice stops at once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file, such as configs/demo-cpu.toml")
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--home", type=Path, metavar="DIR", help="where data and checkpoints are kept")
    parser.add_argument("--steps", type=_steps, metavar="N", help="stop at step N (default: budget_batches of the run file)")


def _steps(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Train until the budget, `--steps` or Ctrl+C. Raises Refused, whose sentence `tscale` prints."""
    from tscale_fed.config import load_config
    from tscale_fed.console import standard_console
    from tscale_fed.home import HomeLock
    from tscale_fed.interrupts import Interrupts
    from tscale_net.ports import SystemClock

    config = load_config(args.config)
    clock = SystemClock()
    console = standard_console(clock)
    interrupts = Interrupts("finishing the step and saving; Ctrl+C again stops now")
    with HomeLock(_home(args.home, config)) as home, interrupts as asked:
        lone = _prepare(config, args, home, console, clock)
        lone.run(lambda: asked.stop)
    console.close()
    return 0


def _home(chosen: Path | None, config: RunConfig) -> Home:
    """A home of its own per run name, so that a peer and several runs of `tscale train` do not get in each other's way."""
    from tscale_fed.home import Home, default_home

    root = default_home(os.environ) if chosen is None else chosen
    name = "".join(letter if letter.isalnum() else "-" for letter in config.run.name)
    return Home(root / LONE_FOLDER / name)


def _prepare(config: RunConfig, args: argparse.Namespace, home: Home, console: Console, clock: Clock) -> LoneRun:
    """Import what the run needs (torch among it) and put it together, saying what was chosen and why."""
    import torch

    from tscale_fed.assembly import build_evaluator, build_trainer, model_shape, prepare_data, start_weights
    from tscale_fed.checkpoint import CheckpointStore
    from tscale_fed.device import choose_device
    from tscale_fed.lone_run import LoneRun
    from tscale_fed.training_thread import default_threads

    device = choose_device(args.device, config.device)
    threads = config.device.threads or default_threads(device.torch_device, beside_event_loop=False)
    torch.set_num_threads(threads)
    console.say(f"device {device.reason}, {threads} processor thread{'s' if threads > 1 else ''}")
    data = prepare_data(config.data, home.data, lambda done, total, _rate: console.progress("reading text", done, total))
    console.say(f"data {data.train_tokens:,} tokens to train on, {data.test_tokens:,} held out, vocabulary {data.vocab:,}")
    recipe = config.recipe()
    shape = model_shape(recipe, data.vocab)
    console.say(f"model {shape.dims}: {shape.trained_parameters:,} weights in {len(shape.layers())} layers")
    weights = start_weights(recipe, shape)
    budget = config.swarm.budget_batches
    trainer = build_trainer(recipe, data, device, weights, peer_id=LONE_FOLDER, budget_batches=budget, clock=clock, say=console.say)
    evaluator = build_evaluator(recipe, data, config.eval, device, clock)
    store = CheckpointStore(home.checkpoints, config.checkpoint.keep)
    return LoneRun(config, trainer, evaluator, store, console, clock, until_step=args.steps or budget)
