"""Memory of the swarm's part of a peer: where the basepoint goes, and room for the exchange before the memory plan takes the rest.

Enters: run, device, its free memory. Leaves: a device for the replica, one line for people; a block that is held while the engine plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tscale_fed.assembly import model_shape
from tscale_fed.device import Device
from tscale_fed.engine.engine import free_bytes
from tscale_fed.engine.swarm_place import choose_swarm_place, swarm_bytes, workspace_bytes
from tscale_fed.find_run import FoundRun


def basepoint_device(found: FoundRun, device: Device, say: Callable[[str], None]) -> torch.device:
    """Where the replica of this run belongs on this machine. Raises Refused("bad-config") as `choose_swarm_place`."""
    shape = model_shape(found.recipe, found.data.vocab)
    batch, settings = found.recipe.batch, device.settings
    place = choose_swarm_place(
        settings.swarm_memory, shape, fragments=batch.fragments * batch.accumulate, tokens=batch.length, precision=device.precision,
        free=free_bytes(device.torch_device), optimizer_memory=settings.optimizer_memory, micro_batch=settings.micro_batch,
    )  # fmt: skip
    if device.torch_device.type == "cpu":
        return device.torch_device
    if place == "host":
        say("swarm memory: basepoint in the machine's memory; each exchange copies the model over the bus")
        return torch.device("cpu")
    say(f"swarm memory: basepoint on {device.torch_device}, {swarm_bytes(shape.trained_parameters) / 1e9:.1f} GB with room for exchanges")
    return device.torch_device


@contextmanager
def room_held(device: torch.device, parameters: int) -> Iterator[None]:
    """Inside, what exchanges will need is taken, so that whoever plans with free memory leaves it to them."""
    block = torch.empty(workspace_bytes(parameters) if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    yield
    del block
