"""What the loop of `tscale train` shares with the other processes of its run.

Enters: wishes of this process (stop, evaluate, save), a trainer. Leaves: decisions that are the same on all ranks, made between two steps:
anybody may stop the run, rank 0's clock says when to evaluate and save. Rank 0 alone reads and writes checkpoints; what it reads is copied
to the others, so a run goes on with any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tscale_fed.parallel.agreement import check_replicas
from tscale_fed.parallel.exchange import Exchanging
from tscale_fed.parallel.onebit import HELD_BACK
from tscale_fed.trainer import Trainer


class Decision(NamedTuple):
    """What happens after a step."""

    stop: bool
    evaluate: bool
    save: bool


class Team(Protocol):
    """The processes of one run."""

    leader: bool
    """Whether this process reads and writes checkpoints."""

    def agree(self, wish: Decision, trainer: Trainer) -> Decision:
        """What all do after this step. Raises Refused: "rank-lost", "replicas-differ"."""
        ...

    def spread(self, trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
        """Before the first step: give everybody the leader's state. `tensors`: its checkpoint, empty without one and on others."""
        ...

    def held_back(self) -> dict[str, Tensor]:
        """What belongs into a checkpoint beside the trainer's state. All call it before the leader saves."""
        ...

    def regroup(self) -> None:
        """Wait for all, after the leader has saved: a step that waits for a slow disk would look like a lost process."""
        ...


class Alone:
    """A `Team` of one process."""

    leader = True

    def agree(self, wish: Decision, trainer: Trainer) -> Decision:
        return wish

    def spread(self, trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
        """Nobody to give it to."""

    def held_back(self) -> dict[str, Tensor]:
        return {}

    def regroup(self) -> None:
        """Nobody to wait for."""


class GroupTeam:
    """A `Team` of the processes that exchange gradients."""

    def __init__(self, exchanging: Exchanging, check_every_steps: int) -> None:
        self._exchanging = exchanging
        self._group = exchanging.group
        self._check_every_steps = check_every_steps
        self.leader = self._group.world.leader

    def agree(self, wish: Decision, trainer: Trainer) -> Decision:
        own = wish if self.leader else Decision(wish.stop, False, False)
        stop, evaluate, save = self._group.reduce(torch.tensor(own, dtype=torch.int32), "max").tolist()
        if stop or save or trainer.steps % self._check_every_steps == 0:  # no checkpoint of replicas that differ
            check_replicas(self._group, trainer.steps, replica(trainer))
        return Decision(bool(stop), bool(evaluate), bool(save))

    def spread(self, trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
        optimizer, group = trainer.optimizer, self._group
        if self.leader:
            counts = {"own_steps": optimizer.own_steps, "moment_count": optimizer.moment_count, "held_back": _sizes(tensors)}
            group.tell("start", json.dumps({"facts": trainer.state_facts(), **counts}))
        told = json.loads(group.hear("start"))
        trainer.load_facts(told["facts"])
        optimizer.own_steps, optimizer.moment_count = told["own_steps"], told["moment_count"]
        with torch.no_grad():
            for tensor in replica(trainer):
                group.copy_leader(tensor)
        self._exchanging.exchange.take_back({name: self._spread_one(name, size, tensors) for name, size in told["held_back"].items()})

    def _spread_one(self, name: str, elements: int, tensors: Mapping[str, Tensor]) -> Tensor:
        everywhere = torch.zeros(elements, device=self._group.device)
        if self.leader:
            everywhere.copy_(tensors[name])
        return self._group.copy_leader(everywhere)

    def held_back(self) -> dict[str, Tensor]:
        held = self._exchanging.exchange.even_out()
        return {name: tensor.to("cpu", copy=True) for name, tensor in held.items()} if self.leader else {}

    def regroup(self) -> None:
        self._group.meet()


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Elements of what an exchange has held back, in a checkpoint."""
    return {name: tensor.numel() for name, tensor in tensors.items() if name.startswith(HELD_BACK)}


def replica(trainer: Trainer) -> tuple[Tensor, ...]:
    """What is equal on all ranks, bit for bit: weights, momentum, second moments."""
    return trainer.weights, trainer.optimizer.momentum, trainer.optimizer.moment_sums
