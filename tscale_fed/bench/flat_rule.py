"""The optimizer's rule (`optimizer/rule.py`) for benches: one fused pass per matrix, numbers that change per step in a device tensor.

Enters: gradients, flat fp32 weights and momentum. Leaves: updated weights, and their copy divided by sqrt(inputs) in the dtype of the
products. Nothing here waits for the device, so a whole step can be one CUDA graph. Unlike the trainer's optimizer it lets a bench change
the share of momentum in a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.optimizer.rule import BETA_GAP, GRADIENT_WEIGHT, MOMENTUM_WEIGHT


@dataclass(frozen=True, slots=True)
class RuleNumbers:
    """What the published rule fixes and benches may vary."""

    momentum_weight: float = MOMENTUM_WEIGHT
    gradient_weight: float = GRADIENT_WEIGHT
    beta_gap: float = BETA_GAP
    l2: float = 0.0


@dataclass(frozen=True, slots=True)
class FlatMatrix:
    """One tensor [parts, rows, columns] of the flat buffers: `parts` matrices with a second moment each, or with `per_row` one per row."""

    weight: Tensor
    momentum: Tensor
    gradient: Tensor
    shadow: Tensor | None
    """What products read: weight / sqrt(columns). None for the embedding."""
    per_row: bool

    @property
    def moments(self) -> int:
        return self.weight.shape[0] * (self.weight.shape[1] if self.per_row else 1)


def update_matrix(
    weight: Tensor, momentum: Tensor, gradient: Tensor, shadow: Tensor | None, multiplier: Tensor, numbers: Tensor, scale: float
) -> None:
    """`numbers` fp32 [5]: beta, decay, rate, momentum weight, gradient weight. multiplier [parts, 1 or rows, 1]."""
    beta, decay, rate, momentum_weight, gradient_weight = numbers.unbind(0)
    direction = gradient * multiplier
    new_momentum = momentum * beta + direction * (1.0 - beta)
    new_weight = weight * decay + rate * (momentum_weight * new_momentum + gradient_weight * direction)
    momentum.copy_(new_momentum)
    weight.copy_(new_weight)
    if shadow is not None:
        shadow.copy_(new_weight * scale)


class FlatRule:
    """State and step. `set_numbers` before a step, `run` is what a CUDA graph may hold."""

    def __init__(self, matrices: Sequence[FlatMatrix], numbers: RuleNumbers, *, compiled: bool) -> None:
        self.matrices = matrices
        self.rule = numbers
        self.own_steps = 0
        device = matrices[0].weight.device
        self._sums = torch.zeros(sum(matrix.moments for matrix in matrices), device=device)
        self._numbers = torch.zeros(5, device=device)
        self._count = torch.zeros(1, device=device)
        self._moment_count = 0.0
        self._update: Callable[..., None] = torch.compile(update_matrix, dynamic=False) if compiled else update_matrix

    def reset(self) -> None:
        """Forget everything but the weights."""
        self.own_steps, self._moment_count = 0, 0.0
        self._sums.zero_()
        for matrix in self.matrices:
            matrix.momentum.zero_()

    def set_numbers(self, rate: float) -> None:
        """Numbers of the next step, onto the device."""
        beta = 1.0 - self.rule.beta_gap / math.sqrt(1.0 + self.own_steps)
        self._moment_count = beta * self._moment_count + 1.0
        mix = (self.rule.momentum_weight, self.rule.gradient_weight)
        self._numbers.copy_(torch.tensor([beta, 1.0 - rate * self.rule.l2, rate, *mix]), non_blocking=True)
        self._count.fill_(self._moment_count)
        self.own_steps += 1

    @torch.no_grad()
    def run(self) -> None:
        """One step with the gradients at hand."""
        self._sums.mul_(self._numbers[0]).add_(self._mean_squares())
        multipliers = torch.where(self._sums > 0, -torch.rsqrt(self._sums / self._count), 0.0)
        parts = multipliers.split([matrix.moments for matrix in self.matrices])
        for matrix, multiplier in zip(self.matrices, parts, strict=True):
            shaped = multiplier.view(matrix.weight.shape[0], -1, 1)
            scale = matrix.weight.shape[-1] ** -0.5
            self._update(matrix.weight, matrix.momentum, matrix.gradient, matrix.shadow, shaped, self._numbers, scale)

    def refresh_shadows(self, weights: Sequence[Tensor] | None = None) -> None:
        """Write the shadows anew, from `weights` [parts, rows, columns] of every matrix instead of the live ones if given."""
        with torch.no_grad():
            for at, matrix in enumerate(self.matrices):
                source = matrix.weight if weights is None else weights[at]
                if matrix.shadow is not None:
                    matrix.shadow.copy_(source * source.shape[-1] ** -0.5)

    def _mean_squares(self) -> Tensor:
        """One per moment, in the order of `_sums`."""
        wholes = [part for matrix in self.matrices if not matrix.per_row for part in matrix.gradient.unbind(0)]
        norms = iter(torch._foreach_norm(wholes) if wholes else ())
        found = []
        for matrix in self.matrices:
            size = matrix.weight.shape[-1] * (1 if matrix.per_row else matrix.weight.shape[-2])
            if matrix.per_row:
                found.append(torch.linalg.vector_norm(matrix.gradient, dim=-1).flatten().square() / size)
            else:
                found.append(torch.stack([next(norms) for _ in range(matrix.weight.shape[0])]).square() / size)
        return torch.cat(found)
