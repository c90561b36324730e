"""Many peers of one model on one device: weights, momentum and second moments as stacked tensors, and what steps them.

Enters: per tick, who steps, where its fragments start in the text, its rate. Leaves: changed weights [P, n]; losses of any weights.
Two machines do the same: `PlainMachine` here, the autograd model in float32, for processors and for checking; `EngineMachine`
(rules_engine.py), the kernels in CUDA graphs. Both are built once; `reset` starts another row with the same buffers and graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tscale_fed.bench.rules_text import RulesText
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import BETA_GAP, ROW_NORMALISED
from tscale_kernels.optimizer_step import ALL_FINITE, UpdateMatrix, UpdatePlan, optimizer_step, step_scalars


@dataclass
class Counts:
    """A peer's own steps t (the horizon of both moving averages follows it) and the weight N of its second moments."""

    own_steps: float = 0.0
    moment_count: float = 0.0

    def next_scalars(self, rate: float) -> list[float]:
        """What the next step reads; counts it."""
        beta = 1.0 - BETA_GAP / math.sqrt(1.0 + self.own_steps)
        self.moment_count = beta * self.moment_count + 1.0
        self.own_steps += 1.0
        return step_scalars(rate, beta, self.moment_count)


@dataclass
class PeerState:
    """Stacked state of P peers on one device."""

    weights: Tensor
    """fp32 [P, n]."""
    momentum: Tensor
    moment_sums: Tensor
    """fp32 [P, m], rows padded to 16 bytes."""
    counts: list[Counts] = field(default_factory=list)

    @staticmethod
    def zeros(peers: int, parameters: int, moments: int, device: torch.device) -> PeerState:
        padded = -(-moments // 4) * 4
        weights, momentum = (torch.zeros(peers, parameters, device=device) for _ in range(2))
        return PeerState(weights, momentum, torch.zeros(peers, padded, device=device), [Counts() for _ in range(peers)])

    def reset(self, start: Tensor) -> None:
        """Every peer at the start weights [n], with nothing remembered."""
        self.weights.copy_(start.expand_as(self.weights))
        self.momentum.zero_()
        self.moment_sums.zero_()
        self.counts[:] = [Counts() for _ in self.counts]


class Machine(Protocol):
    """What the runner needs."""

    @property
    def state(self) -> PeerState: ...

    def reset(self, start: Tensor, seed: int) -> None: ...

    def step(self, peers: Sequence[int], positions: Tensor, rate: float) -> None:
        """One step of each of `peers`; positions int64 [len(peers), fragments] on the CPU. Need not wait for the device."""
        ...

    def joint_step(self, positions: Tensor, rate: float) -> None:
        """One step of peer 0 with the gradient of all fragments of positions [P, fragments]."""
        ...

    def loss(self, weights: Tensor, fragments: int) -> float:
        """Mean held-out loss in nats per byte of weights fp32 [n] on the device, over the first `fragments` fixed fragments."""
        ...

    def failed(self) -> bool:
        """Whether a gradient was not finite since `reset`; that peer has not moved since."""
        ...


def moments_of(shape: ModelShape) -> int:
    """Second moments of a model: one per row of embedding and final layer, one per matrix."""
    return sum(rows if name in ROW_NORMALISED else 1 for name, rows, _ in shape.tensors())


class PlainMachine:
    """See the module. `text` is on the device."""

    def __init__(self, shape: ModelShape, text: RulesText, peers: int, fragments: int, tokens: int) -> None:
        device = text.ids.device
        self.state = PeerState.zeros(peers, shape.trained_parameters, moments_of(shape), device)
        self._text, self._tokens, self._shape = text, tokens, shape
        self._parameters = Parameters(shape, device)
        self._model = Model(shape, self._parameters, text.bias2())
        self._plan = UpdatePlan(_plain_matrices(shape), device)
        self._bad = torch.full((1,), ALL_FINITE, dtype=torch.int32, device=device)

    def reset(self, start: Tensor, seed: int) -> None:
        self.state.reset(start)
        self._bad.fill_(ALL_FINITE)

    def step(self, peers: Sequence[int], positions: Tensor, rate: float) -> None:
        for peer, places in zip(peers, positions, strict=True):
            self._gradient(peer, places)
            self._update(peer, rate)

    def joint_step(self, positions: Tensor, rate: float) -> None:
        for places in positions:
            self._gradient(0, places)
        self._update(0, rate)

    def loss(self, weights: Tensor, fragments: int) -> float:
        self._parameters.load(weights)
        total, targets = 0.0, 0
        with torch.no_grad():
            for text, target in self._text.held_out(fragments, self._tokens):
                total += float(self._model.loss(text, target)[0])
                targets += int((target >= 0).sum())
        return total / targets

    def failed(self) -> bool:
        return int(self._bad) != ALL_FINITE

    def _gradient(self, peer: int, places: Tensor) -> None:
        """Added to what is there."""
        self._parameters.load(self.state.weights[peer])
        text, target = self._text.batch(places.to(self._text.ids.device), self._tokens)
        self._model.loss(text, target)[0].backward()

    def _update(self, peer: int, rate: float) -> None:
        state = self.state
        optimizer_step(
            state.weights[peer], state.momentum[peer], self._parameters.flat_grad, self._plan,
            scalars=torch.tensor(state.counts[peer].next_scalars(rate), device=state.weights.device),
            moment_sums=state.moment_sums[peer, : self._plan.moments], bad_matrix=self._bad, clear=True,
        )  # fmt: skip
        if self.failed():
            self._parameters.zero_grad()


def _plain_matrices(shape: ModelShape) -> list[UpdateMatrix]:
    matrices, start = [], 0
    for name, rows, columns in shape.tensors():
        matrices.append(UpdateMatrix(start, rows, columns, per_row=name in ROW_NORMALISED))
        start += rows * columns
    return matrices
