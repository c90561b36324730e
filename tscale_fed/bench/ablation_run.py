"""One training run of the ablation.

Enters: a row (architecture and optimizer), a rate, a seed, the text. Leaves: the held-out loss at the end and what the run cost. All runs
of a seed read the same fragments with the same shape of schedule: warm-up, then constant, then linearly to 0 over the second half.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tscale_fed.bench.ablation_models import Stack, make_architecture, scaled_to
from tscale_fed.bench.ablation_optimizers import make_stepper
from tscale_fed.bench.compiled_baseline import MASKED_BIAS, RECOMPILE_LIMIT, VOCAB_MULTIPLE
from tscale_fed.bench.quality_text import QualityText
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import OptimizerSettings
from tscale_fed.optimizer.schedule import rate as scheduled

CHECK_STEPS = 200
"""Losses are looked at this often, to stop runs that diverged."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all runs have in common."""

    shape: ModelShape
    fragments: int
    tokens: int
    steps: int
    warmup: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class AblationRun:
    """One run. Losses in nats per byte; infinite if it diverged."""

    row: str
    rate: float
    seed: int
    test: float
    train: float
    """Mean over the last tenth of the steps."""
    weights: int
    layer_weights: int
    step_ms: float
    seconds: float


def measure(row: str, rate: float, seed: int, plan: Plan, text: QualityText) -> AblationRun:
    """Train once. `row`: ARCHITECTURE/OPTIMIZER."""
    started = time.perf_counter()
    model = Model(row, seed, plan, text.bias2())
    positions = text.positions("random", seed, plan.steps, plan.fragments, plan.tokens)
    settings = OptimizerSettings(rate=rate, warmup_batches=plan.warmup, tail=2.0)
    model.prepare(*text.batch(positions[0], plan.tokens))
    training = time.perf_counter()
    losses: list[Tensor] = []
    diverged = False
    for step in range(plan.steps):
        losses.append(model.step(*text.batch(positions[step], plan.tokens), scheduled(settings, step, plan.steps)))
        if step % CHECK_STEPS == CHECK_STEPS - 1 and not math.isfinite(float(losses[-1])):
            diverged = True
            break
    train = float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean())
    step_ms = (time.perf_counter() - training) / len(losses) * 1e3
    test = math.inf
    if not diverged and math.isfinite(train):
        test = statistics.fmean(model.loss(*batch) for batch in text.whole_test(plan.fragments, plan.tokens))
    layers = sum(stack.size for stack in model.stacks if stack.kind != "rows")
    whole = layers + 2 * plan.shape.vocab * model.width
    return AblationRun(row, rate, seed, test, train, whole, layers, step_ms, round(time.perf_counter() - started, 1))


class Model:
    """An architecture, its weights, its optimizer; on CUDA compiled, each step one CUDA graph."""

    def __init__(self, row: str, seed: int, plan: Plan, bias2: Tensor) -> None:
        architecture, _, optimizer = row.partition("/")
        device, vocab = plan.device, plan.shape.vocab
        padded = -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self._model = make_architecture(architecture, plan.shape, plan.tokens, padded, device, scaled=optimizer == "rule")
        self.stacks = self._model.stacks
        self.width = self.stacks[-1].columns
        compiled = self._compiled = device.type == "cuda"
        if compiled:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        self._weights = torch.cat([_start(stack, seed, index) for index, stack in enumerate(self.stacks)]).to(device)
        self._gradient = torch.zeros_like(self._weights)
        self._leaves = self._make_leaves()
        self._bias = torch.full((padded,), MASKED_BIAS, device=device)
        self._bias[:vocab] = bias2.to(device) * math.log(2.0)
        self._layer = torch.compile(self._model.layer, dynamic=False) if compiled else self._model.layer
        self._loss = torch.compile(mean_loss, dynamic=False) if compiled else mean_loss
        decay = architecture != "tscale"
        self._optimizer = make_stepper(optimizer, self.stacks, self._weights, self._gradient, decay=decay, compiled=compiled)
        self._text = torch.zeros(plan.fragments, plan.tokens, dtype=torch.int64, device=device)
        self._target = torch.zeros_like(self._text)
        self._last_loss = torch.zeros((), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, text: Tensor, target: Tensor) -> None:
        """On CUDA: compile with one batch at rate 0, forget it, record the graph."""
        if not self._compiled:
            return
        self._text.copy_(text)
        self._target.copy_(target)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._optimizer.set_numbers(0.0)
                self._whole_step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self._whole_step()
        self._optimizer.reset()
        self._graph = graph

    def step(self, text: Tensor, target: Tensor, rate: float) -> Tensor:
        """One step; the mean loss before it, on the device."""
        self._text.copy_(text)
        self._target.copy_(target)
        self._optimizer.set_numbers(rate)
        if self._graph is None:
            self._whole_step()
        else:
            self._graph.replay()
        return self._last_loss.clone()

    def loss(self, text: Tensor, target: Tensor) -> float:
        """Mean loss. (With gradients on, so that nothing is compiled a second time.)"""
        return float(self._forward(text, target).detach())

    def _whole_step(self) -> None:
        self._gradient.zero_()
        loss = self._forward(self._text, self._target)
        loss.backward()
        self._last_loss.copy_(loss.detach())
        self._optimizer.run()

    def _forward(self, text: Tensor, target: Tensor) -> Tensor:
        state = self._model.state(self._leaves, text, self._layer)
        return self._loss(state, self._leaves[-1][0], self._bias, target, self._model.scaled)

    def _make_leaves(self) -> list[list[Tensor]]:
        """Per stack its tensors, leaves over the flat weights whose gradients are views of the flat gradient."""
        leaves: list[list[Tensor]] = []
        at = 0
        for stack in self.stacks:
            each = stack.rows * stack.columns
            found = []
            for start in range(at, at + stack.size, each):
                leaf = self._weights[start : start + each].view(stack.rows, stack.columns).detach().requires_grad_()
                leaf.grad = self._gradient[start : start + each].view(stack.rows, stack.columns)
                found.append(leaf)
            leaves.append(found)
            at += stack.size
        return leaves


def mean_loss(state: Tensor, final: Tensor, bias: Tensor, target: Tensor, scaled: bool) -> Tensor:
    """Mean cross-entropy over positions with a target."""
    logits = (state @ scaled_to(final, scaled).T).float() + bias
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1)


def _start(stack: Stack, seed: int, index: int) -> Tensor:
    """Flat start weights of a stack."""
    generator = torch.Generator().manual_seed(seed * 1000 + index)
    return torch.randn(stack.size, generator=generator) * stack.deviation + stack.mean
