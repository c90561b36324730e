"""One optimizer step: enters the summed gradient of `Parameters`, leaves updated weights and a cleared gradient.

Rule (TScale), t = own steps done before, g = minus the summed loss gradient, all per matrix:
    beta = 1 - 0.5 / sqrt(1 + t)                       both moving averages share it; it grows, so the memory is about 2 sqrt(t) steps
    s    = mean(g^2) of the whole matrix, or of each row for the embedding and the final layer
    N    = beta N + 1;  S = beta S + s;  h = g / sqrt(S / N)       (0 where S is 0)
    m    = beta m + (1 - beta) h                       momentum of the normalised gradient, from 0, without correction
    W    = W (1 - rate * l2) + rate (0.8 m + 0.2 h)
Normalising comes before momentum, as in LaProp (Ziyin et al. 2020). A step moves a matrix by 0.2 to 1 times the rate (RMS), whatever its
scale or the scale of the loss. Rows without a gradient keep moving by momentum, and their S decays while N goes on counting.
Memory: one fp32 momentum per weight; second moments are one number per matrix or row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from tscale_fed.optimizer.kernel_step import KernelStep
from tscale_kernels.dispatch import choose

BETA_GAP = 0.5
"""beta = 1 - BETA_GAP / sqrt(1 + t)."""

MOMENTUM_WEIGHT, GRADIENT_WEIGHT = 0.8, 0.2
"""Parts of the step taken along the momentum and along the current normalised gradient."""

ROW_NORMALISED = ("embedding", "final")
"""Matrices with one second moment per row: their rows are tokens, which appear at very different rates."""


class GradientNotFinite(ArithmeticError):
    """A step was not taken since the gradient of `matrix` holds infinities or NaN, or its squares overflow."""

    def __init__(self, matrix: str) -> None:
        super().__init__(f"the gradient of {matrix} is not finite")
        self.matrix = matrix


class TrainedParameters(Protocol):
    """What the optimizer needs to know of a model's parameters (`tscale_fed.model.parameters.Parameters`)."""

    flat: torch.Tensor
    flat_grad: torch.Tensor
    grads: dict[str, torch.Tensor]


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the rule and of its schedule. Raises ValueError for values that make no sense.

    rate               learning rate: RMS of a step that momentum and gradient agree on (published models: 0.01)
    warmup_batches     batches of the swarm over which the rate rises from 0 ("slow")
    tail               None, or NN >= 1: the rate is multiplied by min(1, NN * fraction of the budget that is left), so it falls to 0 over
                       the last 1/NN
    l2                 decay of weights per step and unit of rate ("reg RR" is l2 = 1/RR)
    join_warmup_steps  own steps over which a peer that joined a running swarm raises its rate; 0 = none
    """

    rate: float = 0.01
    warmup_batches: int = 1000
    tail: float | None = None
    l2: float = 0.0
    join_warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"optimizer rate {self.rate} must be a positive number; 0.01 is a good start")
        if self.warmup_batches < 0 or self.join_warmup_steps < 0:
            raise ValueError("optimizer warm-up counts must not be negative; use 0 for none")
        if self.tail is not None and not (math.isfinite(self.tail) and self.tail >= 1):
            raise ValueError(f"optimizer tail {self.tail} must be at least 1 (5 = the last fifth of the budget), or left out")
        if not 0 <= self.l2 * self.rate < 1:
            raise ValueError(f"optimizer l2 {self.l2} with rate {self.rate} must give a decay per step between 0 and 1")


class Optimizer:
    """State and step of the rule over the flat buffers of `parameters`.

    momentum        [P] fp32 like the weights, in canonical order
    moment_sums     [M] S of every matrix and row, in canonical order
    moment_count    N, the same for all of them
    own_steps       t; beta follows it. A joiner starts at its donor's count (`adopt`)
    """

    def __init__(self, parameters: TrainedParameters, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.own_steps = 0
        self.moment_count = 0.0
        self.momentum = torch.zeros_like(parameters.flat)
        self._weights = parameters.flat
        self._gradient = parameters.flat_grad
        self._grads = parameters.grads
        self._matrices = list(parameters.grads.values())
        self._per_row = [name in ROW_NORMALISED for name in parameters.grads]
        sizes = [g.shape[0] if rows else 1 for g, rows in zip(self._matrices, self._per_row, strict=True)]
        self.moment_sums = torch.zeros(sum(sizes), device=parameters.flat.device, dtype=parameters.flat.dtype)
        self._sizes = sizes
        self._kernel_step: KernelStep | None = None

    @property
    def beta(self) -> float:
        """The averaging constant of the next step."""
        return 1.0 - BETA_GAP / math.sqrt(1.0 + self.own_steps)

    @property
    def next_count(self) -> float:
        """N of the next step."""
        return self.beta * self.moment_count + 1.0

    def count_step(self) -> None:
        """A step was taken: N and t move on. (`step` does so by itself; an engine that updates the tensors on its own calls this.)"""
        self.moment_count = self.next_count
        self.own_steps += 1

    def mean_squares(self) -> torch.Tensor:
        """[M] mean square gradient of every matrix, or row for those in ROW_NORMALISED."""
        parts = [
            torch.linalg.vector_norm(g, dim=1 if rows else None).square() / (g.shape[1] if rows else g.numel())
            for g, rows in zip(self._matrices, self._per_row, strict=True)
        ]
        return torch.cat([part.reshape(-1) for part in parts])

    @torch.no_grad()
    def step(self, rate: float, mean_squares: torch.Tensor | None = None) -> None:
        """Update the weights with the gradient at hand and clear the gradient. `rate` comes from `schedule.rate`.

        mean_squares [M]: s of every matrix or row, instead of one's own sums over the gradient; not on a GPU.
        Raises GradientNotFinite, and then nothing is changed.
        """
        use_kernels = self._weights.dtype == torch.float32 and choose(self._weights.device).name == "triton"
        bad = self._step_by_kernels(rate) if use_kernels else self._step_by_torch(rate, mean_squares)
        if bad is not None:
            raise GradientNotFinite(bad)
        self.count_step()

    def _step_by_kernels(self, rate: float) -> str | None:
        """The name of the matrix whose gradient is not finite, if any."""
        if self._kernel_step is None:
            self._kernel_step = KernelStep(self._grads, ROW_NORMALISED, self._weights.device)
        return self._kernel_step.update(
            self._weights, self.momentum, self._gradient, self.moment_sums, rate=rate, beta=self.beta, count=self.next_count,
            l2=self.settings.l2,
        )  # fmt: skip

    def _step_by_torch(self, rate: float, given: torch.Tensor | None) -> str | None:
        """As `_step_by_kernels`."""
        beta, count = self.beta, self.next_count
        mean_squares = self.mean_squares() if given is None else given
        if not bool(mean_squares.isfinite().all()):
            parts = mean_squares.split(self._sizes)
            return next(name for name, part in zip(self._grads, parts, strict=True) if not bool(part.isfinite().all()))
        self.moment_sums.mul_(beta).add_(mean_squares)
        sums = self.moment_sums
        # The gradient buffer points downhill, the rule uphill: the minus sign is here.
        multipliers = torch.where(sums > 0, -torch.rsqrt(sums / count), 0.0).split(self._sizes)
        for gradient, multiplier, rows in zip(self._matrices, multipliers, self._per_row, strict=True):
            gradient.mul_(multiplier.unsqueeze(1) if rows else multiplier)
        self.momentum.lerp_(self._gradient, 1.0 - beta)
        self._weights.mul_(1.0 - rate * self.settings.l2)
        self._weights.add_(self.momentum, alpha=rate * MOMENTUM_WEIGHT).add_(self._gradient, alpha=rate * GRADIENT_WEIGHT)
        self._gradient.zero_()
        return None

    @torch.no_grad()
    def scale_momentum(self, keep: float) -> None:
        """Multiply the momentum by `keep` in 0..1, as the swarm's publish rule asks."""
        self.momentum.mul_(keep)

    def second_moments(self) -> dict[str, torch.Tensor]:
        """The small part of the state that a joiner needs: {"moment_sums": [M], "moment_count": 0-dim fp64}, copies on the CPU."""
        return {"moment_sums": self.moment_sums.cpu().clone(), "moment_count": torch.tensor(self.moment_count, dtype=torch.float64)}

    def adopt(self, second_moments: Mapping[str, torch.Tensor], own_steps: int) -> None:
        """Take a donor's second moments and step count; the momentum (zero for a joiner) stays. Raises ValueError on bad values."""
        sums, count = second_moments["moment_sums"], float(second_moments["moment_count"])
        if sums.shape != self.moment_sums.shape:
            raise ValueError(f"second moments of {sums.numel()} numbers do not fit this model, which has {self.moment_sums.numel()}")
        if own_steps < 0 or not math.isfinite(count) or count < 0 or not bool(torch.isfinite(sums).all()) or bool((sums < 0).any()):
            raise ValueError("second moments from the donor are not finite and non-negative; join through another peer")
        with torch.no_grad():
            self.moment_sums.copy_(sums)
        self.moment_count = count
        self.own_steps = own_steps

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything a bit-exact restore needs, as named CPU tensors (safetensors takes them as they are)."""
        return {"momentum": self.momentum.to("cpu", copy=True), **self.small_state()}

    def small_state(self) -> dict[str, torch.Tensor]:
        """`state_dict` without the momentum."""
        return {**self.second_moments(), "own_steps": torch.tensor(self.own_steps, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a `state_dict`. Raises ValueError when it belongs to another model, KeyError on a missing name."""
        momentum = state["momentum"]
        if momentum.shape != self.momentum.shape:
            raise ValueError(f"momentum of {momentum.numel()} numbers does not fit this model, which has {self.momentum.numel()}")
        self.adopt({name: state[name] for name in ("moment_sums", "moment_count")}, int(state["own_steps"]))
        with torch.no_grad():
            self.momentum.copy_(momentum)
