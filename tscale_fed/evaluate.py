"""Losses on fixed batches: of the basepoint, of a checkpoint, or of the live weights.

Enters: any flat weight vector of the model, and the name of a part of the data. Leaves: an `Evaluation`. The batches are the same for every
call and every peer with the same data and settings, so two losses can be compared; there is no token drop and no noise.

The evaluator has weights and a model of its own: the live weights, their gradients and the trainer's buffers are not touched, and it may
run on another thread than training. It computes in the precision of training, and holds 4 bytes per weight on the device from the first
evaluation on, or 1 to 2 where training is in 8 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tscale_fed.config import EvalSection
from tscale_fed.data.manifest import Split
from tscale_fed.data.token_data import Batch, TokenData
from tscale_fed.device import Device, out_of_memory
from tscale_fed.engine.scorer import Scorer
from tscale_fed.model.forward import Model
from tscale_fed.model.loss import NO_TARGET, unigram_bias
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.parallel.group import Group
from tscale_net.ports import Clock


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One measured loss."""

    split: Split
    loss: float
    """Mean over all positions with a target, nats per token."""
    tokens: int
    """Positions with a target."""
    bits_per_byte: float
    """The same loss per byte of text: comparable across tokenizers. NaN if the data does not say how many bytes there are."""
    seconds: float


class Evaluator:
    """Measures losses of flat weights. One caller at a time."""

    def __init__(
        self,
        shape: ModelShape,
        data: TokenData,
        settings: EvalSection,
        length: int,
        device: Device,
        clock: Clock,
        group: Group | None = None,
    ) -> None:
        """`length`: tokens per fragment, as in training. `group`: batches are dealt in turn over its ranks, which then all call `loss`."""
        self._shape = shape
        self._data = data
        self._settings = settings
        self._length = length
        self._device = device
        self._clock = clock
        self._group = group
        self._model: Model | None = None
        self._scorer: Scorer | None = None
        self._batches: dict[Split, list[Batch]] = {}

    def loss(self, weights: torch.Tensor, split: Split = "test") -> Evaluation:
        """Loss of `weights` (float [parameters], any device; only read) on the fixed batches of `split`.

        Raises Refused("small-data") if that part of the data is shorter than one fragment, Refused("out-of-memory") on a full GPU,
        ValueError if the weights are not of this model.
        """
        started = self._clock.now()
        every = self._fixed_batches(split)
        batches = every if self._group is None else every[self._group.world.rank :: self._group.world.size]
        try:
            total = self._score(weights, batches) if self._device.precision.kernels else self._sum(self._loaded(weights), batches)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self._device.torch_device, "an evaluation (halve fragments in [eval])") from error
        if self._group is not None:
            total = float(self._group.reduce(torch.tensor([total], dtype=torch.float64)))
        tokens = sum(int((target != NO_TARGET).sum()) for _, target in every)
        loss = total / tokens
        return Evaluation(split, loss, tokens, loss / math.log(2) / self._bytes_per_token(split), self._clock.now() - started)

    def _fixed_batches(self, split: Split) -> list[Batch]:
        if split not in self._batches:
            self._batches[split] = self._data.evaluation_batches(self._settings.fragments, self._length, self._settings.batches, split)
        return self._batches[split]

    def _loaded(self, weights: torch.Tensor) -> Model:
        if self._model is None:
            bias2 = unigram_bias(torch.from_numpy(self._data.unigram_counts))
            parameters = _read_only(self._shape, self._device.torch_device)
            self._model = Model(self._shape, parameters, bias2, compute_dtype=self._device.precision.compute)
        self._model.parameter_store.load(weights)
        return self._model

    @torch.no_grad()
    def _sum(self, model: Model, batches: list[Batch]) -> float:
        """Loss sum in nats. Sums of batches are added in double precision: their order cannot matter."""
        device, doc_start = self._device.torch_device, self._data.doc_start_token
        total = 0.0
        for text, target in batches:
            loss, _ = model.loss(text.to(device), target.to(device), doc_start_token=doc_start)
            total += float(loss)
        return total

    def _score(self, weights: torch.Tensor, batches: list[Batch]) -> float:
        """`_sum` by the engine's forward pass."""
        if self._scorer is None:
            bias2 = unigram_bias(torch.from_numpy(self._data.unigram_counts))
            self._scorer = Scorer(
                self._shape, bias2, self._device.precision, self._device.torch_device,
                fragments=self._settings.fragments, tokens=self._length, doc_start_token=self._data.doc_start_token,
            )  # fmt: skip
        self._scorer.load(weights)
        return sum(float(self._scorer.loss(text, target)) for text, target in batches)

    def _bytes_per_token(self, split: Split) -> float:
        part = self._data.manifest.split(split)
        return part.text_bytes / part.tokens if part.tokens and part.text_bytes else math.nan


def _read_only(shape: ModelShape, device: torch.device) -> Parameters:
    """Parameters that are only ever read: their gradient buffer is given back."""
    parameters = Parameters(shape, device)
    for view in parameters.views.values():
        view.grad = None
        view.requires_grad_(False)
    parameters.grads = {}
    parameters.flat_grad = torch.empty(0, device=device)
    return parameters
