"""Optimizers of the ablation over flat fp32 buffers: AdamW, Muon, the TScale rule. All can be part of a CUDA graph.

Enters: stacks of weights and gradients (of the mean loss). Leaves: updated weights. Numbers that change per step are in a device tensor,
set before the step.

    adamw    betas 0.9 and 0.95, decay 0.1 on hidden matrices (none with the tscale block, whose weights have an absolute scale), gradient
             norm limited to 1
    muon     hidden matrices: momentum 0.95 (Nesterov), orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), times
             0.2 sqrt(longer side), so that rate and decay are AdamW's (Liu et al. 2025); everything else by AdamW
    rule     `flat_rule.py`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tscale_fed.bench.ablation_models import Stack
from tscale_fed.bench.flat_rule import FlatMatrix, FlatRule, RuleNumbers

BETAS = (0.9, 0.95)
EPSILON = 1e-10
DECAY = 0.1
LARGEST_NORM = 1.0
MUON_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Stepper(Protocol):
    """An optimizer."""

    def set_numbers(self, rate: float) -> None: ...

    def run(self) -> None: ...

    def reset(self) -> None: ...


def make_stepper(name: str, stacks: Sequence[Stack], weights: Tensor, gradient: Tensor, *, decay: bool, compiled: bool) -> Stepper:
    """`name` adamw, muon or rule; weights and gradient flat, in the order of the stacks."""
    if name == "rule":
        momentum = torch.zeros_like(weights)
        parts = [[piece.view(s.parts, s.rows, s.columns) for piece, s in zip(each.split([s.size for s in stacks]), stacks, strict=True)]
                 for each in (weights, momentum, gradient)]  # fmt: skip
        matrices = [FlatMatrix(w, m, g, None, stack.kind == "rows") for stack, w, m, g in zip(stacks, *parts, strict=True)]
        return FlatRule(matrices, RuleNumbers(), compiled=compiled)
    return Adam(stacks, weights, gradient, decay=DECAY if decay else 0.0, muon=name == "muon", compiled=compiled)


def adam_update(weight: Tensor, first: Tensor, second: Tensor, gradient: Tensor, numbers: Tensor, decay: float) -> None:
    """`numbers` fp32 [4]: rate, 1 - beta1^t, 1 - beta2^t, factor of the gradient."""
    rate, correction1, correction2, factor = numbers.unbind(0)
    g = gradient * factor
    new_first = first * BETAS[0] + g * (1 - BETAS[0])
    new_second = second * BETAS[1] + g * g * (1 - BETAS[1])
    step = (new_first / correction1) / ((new_second / correction2).sqrt() + EPSILON)
    first.copy_(new_first)
    second.copy_(new_second)
    weight.copy_(weight * (1 - rate * decay) - rate * step)


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> bf16 of the same shape, singular values near 1."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True).clamp_min(1e-20)).to(x.dtype)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Adam:
    """AdamW, and with `muon` Muon for the hidden matrices, which stand first in the flat buffers."""

    def __init__(self, stacks: Sequence[Stack], weights: Tensor, gradient: Tensor, *, decay: float, muon: bool, compiled: bool) -> None:
        hidden = [stack for stack in stacks if stack.kind == "matrix"]
        self._split = sum(stack.size for stack in hidden)
        assert [stack.kind for stack in stacks[: len(hidden)]] == ["matrix"] * len(hidden), "hidden matrices come first"
        self._hidden, self._muon, self._decay = hidden, muon, decay
        self._weights, self._gradient = weights, gradient
        self._first, self._second = torch.zeros_like(weights), torch.zeros_like(weights)
        self._numbers = torch.zeros(4, device=weights.device)
        self._steps = 0
        self._update = torch.compile(adam_update, dynamic=False) if compiled else adam_update
        self._orthogonalised = torch.compile(orthogonalised, dynamic=False) if compiled else orthogonalised

    def reset(self) -> None:
        self._steps = 0
        self._first.zero_()
        self._second.zero_()

    def set_numbers(self, rate: float) -> None:
        self._steps += 1
        corrections = [1 - beta**self._steps for beta in BETAS]
        self._numbers.copy_(torch.tensor([rate, *corrections, 1.0]), non_blocking=True)

    @torch.no_grad()
    def run(self) -> None:
        norm = torch.linalg.vector_norm(self._gradient)
        self._numbers[3] = (LARGEST_NORM / norm).clamp_max(1.0)
        at = self._split
        self._adam(slice(at, None), 0.0)
        if not self._muon:
            self._adam(slice(0, at), self._decay)
            return
        start = 0
        for stack in self._hidden:
            self._orthogonal_step(slice(start, start + stack.size), stack)
            start += stack.size

    def _adam(self, span: slice, decay: float) -> None:
        self._update(self._weights[span], self._first[span], self._second[span], self._gradient[span], self._numbers, decay)

    def _orthogonal_step(self, span: slice, stack: Stack) -> None:
        shape = (stack.parts, stack.rows, stack.columns)
        gradient, momentum, weight = (each[span].view(shape) for each in (self._gradient, self._first, self._weights))
        momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
        step = self._orthogonalised(gradient.lerp(momentum, MUON_MOMENTUM))
        rate = self._numbers[0]
        weight.mul_(1 - rate * self._decay).sub_(step.float() * (rate * 0.2 * math.sqrt(max(stack.rows, stack.columns))))
