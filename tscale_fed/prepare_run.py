"""Puts a run of `tscale train` together, saying what was chosen and why: for a lone process, or for one of a group.

Enters: the run file, the device's name, the home; for a process of a group, its group. Leaves: a `LoneRun`, ready to run.
"""

from __future__ import annotations

import torch

from tscale_fed.assembly import build_evaluator, build_trainer, model_shape, prepare_data, start_weights
from tscale_fed.checkpoint import CheckpointStore
from tscale_fed.config import RunConfig
from tscale_fed.console import Console
from tscale_fed.data.token_data import TokenData
from tscale_fed.device import Device, choose_device
from tscale_fed.home import Home
from tscale_fed.lone_run import KIND, LoneRun
from tscale_fed.parallel.exchange import Exchanging
from tscale_fed.parallel.group import Group
from tscale_fed.parallel.team import GroupTeam
from tscale_fed.training_thread import default_threads
from tscale_net.ports import Clock


def prepare_run(config: RunConfig, device_name: str, home: Home, console: Console, clock: Clock, steps: int | None) -> LoneRun:
    """Of a lone process. Raises Refused."""
    device = choose_device(device_name, config.device)
    use_threads(config, device, console)
    return _run(config, device, home, _data(config, home, console), console, clock, steps, None)


def prepare_member(
    config: RunConfig, device: Device, home: Home, data: TokenData, group: Group, console: Console, clock: Clock, steps: int | None
) -> LoneRun:
    """Of a process of `group`, which has its device and data already. Raises Refused."""
    return _run(config, device, home, data, console, clock, steps, Exchanging(config.parallel.gradients, group))


def use_threads(config: RunConfig, device: Device, console: Console, processes: int = 1) -> None:
    """The processor threads of this process, one of so many on this host."""
    threads = config.device.threads or max(1, default_threads(device.torch_device, beside_event_loop=False) // processes)
    torch.set_num_threads(threads)
    console.say(f"device {device.reason}, {threads} processor thread{'s' if threads > 1 else ''}")


def _data(config: RunConfig, home: Home, console: Console) -> TokenData:
    return prepare_data(config.data, home.data, lambda done, total, _rate: console.progress("reading text", done, total))


def _run(
    config: RunConfig,
    device: Device,
    home: Home,
    data: TokenData,
    console: Console,
    clock: Clock,
    steps: int | None,
    exchanging: Exchanging | None,
) -> LoneRun:
    console.say(f"data {data.train_tokens:,} tokens to train on, {data.test_tokens:,} held out, vocabulary {data.vocab:,}")
    recipe = config.recipe()
    shape = model_shape(recipe, data.vocab)
    console.say(f"model {shape.dims}: {shape.trained_parameters:,} weights in {len(shape.layers())} layers")
    weights = start_weights(recipe, shape)
    group = None if exchanging is None else exchanging.group
    key = KIND if group is None else group.world.data_key(KIND)
    budget = config.swarm.budget_batches
    trainer = build_trainer(
        recipe, data, device, weights, peer_id=key, budget_batches=budget, clock=clock, say=console.say, exchanging=exchanging
    )
    evaluator = build_evaluator(recipe, data, config.eval, device, clock, group)
    store = CheckpointStore(home.checkpoints, config.checkpoint.keep)
    team = None if exchanging is None else GroupTeam(exchanging, config.parallel.check_every_steps)
    return LoneRun(config, trainer, evaluator, store, console, clock, until_step=steps or budget, team=team)
