"""What the quality bench trains: the compiled baseline or the engine, behind one face.

Enters: a setting, sizes, the text's output bias. Leaves: a `Learner`, at step 0 with the seed's start weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tscale_fed.bench.compiled_layer import LocalWay
from tscale_fed.bench.options import formats_of
from tscale_fed.bench.quality_settings import COMPILED, Setting
from tscale_fed.bench.quality_text import Batch
from tscale_fed.model.init import initialise
from tscale_fed.model.labels import draw_token_keep
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused


@dataclass(frozen=True, slots=True)
class Place:
    """What all runs have in common."""

    dims: str
    vocab: int
    fragments: int
    tokens: int
    device: torch.device
    local: LocalWay

    def shape(self, noise_rows: int) -> ModelShape:
        return ModelShape.parse(self.dims, self.vocab, noise_rows)


class Learner(Protocol):
    """A model that is trained."""

    weights: Tensor
    """Flat fp32, live: only read."""
    batch_device: torch.device
    """Where it wants its batches."""

    def step(self, batch: Batch, index: int, rate: float) -> None: ...

    def losses(self, batches: Sequence[Batch], weights: Tensor | None = None) -> list[float]:
        """Loss sum of every batch, with `weights` in place of the live ones."""
        ...


def make_learner(setting: Setting, place: Place, bias2: Tensor) -> Learner:
    """Raises Refused for an arithmetic or a setting that does not exist."""
    return CompiledLearner(setting, place, bias2) if setting.is_compiled else EngineLearner(setting, place, bias2)


class _Noise:
    """Random draws of a run: dropped tokens and noise rows. On the processor, so that all learners of a seed have the same."""

    def __init__(self, setting: Setting) -> None:
        self._keep = setting.keep
        self._tokens = torch.Generator().manual_seed(setting.seed + 1_000_003)
        self.rows = torch.Generator().manual_seed(setting.seed + 2_000_003) if setting.noise else None

    def token_keep(self, text: Tensor) -> Tensor | None:
        return draw_token_keep(text, self._keep, self._tokens) if self._keep < 1 else None


class CompiledLearner:
    """See `compiled_baseline`."""

    def __init__(self, setting: Setting, place: Place, bias2: Tensor) -> None:
        from tscale_fed.bench.compiled_baseline import CompiledBaseline

        shape = place.shape(setting.noise)
        compute = torch.bfloat16 if setting.arithmetic == COMPILED else torch.float32
        self._model = CompiledBaseline(
            shape, initialise(shape, setting.seed), bias2, fragments=place.fragments, tokens=place.tokens, device=place.device,
            compute=compute, labels=3 if setting.noise else 1, local=place.local if setting.arithmetic == COMPILED else "blocks",
            rule=setting.rule,
        )  # fmt: skip
        self._noise = _Noise(setting)
        self.weights = self._model.weights
        self.batch_device = place.device

    def step(self, batch: Batch, index: int, rate: float) -> None:
        self._model.step(*batch, rate, token_keep=self._noise.token_keep(batch[0]), noise=self._noise.rows)

    def losses(self, batches: Sequence[Batch], weights: Tensor | None = None) -> list[float]:
        return list(self._model.losses(batches, weights).tolist())


class EngineLearner:
    """See `tscale_fed.engine`."""

    def __init__(self, setting: Setting, place: Place, bias2: Tensor) -> None:
        from tscale_fed.engine.build import build_engine
        from tscale_fed.engine.interface import StepBatch
        from tscale_fed.engine.precision import choose_precision
        from tscale_fed.engine.scorer import Scorer

        if setting.mix != Setting.mix or setting.gap != Setting.gap:
            raise Refused("bad-bench", f"run '{setting.name}': mix and gap can only be changed with '{COMPILED}'")
        name, attention = formats_of(setting.arithmetic)
        shape = self._shape = place.shape(setting.noise)
        precision, _ = choose_precision(place.device, name, attention)
        self._engine = build_engine(
            shape, initialise(shape, setting.seed), bias2, device=place.device, precision=name, attention=attention,
            fragments=place.fragments, tokens=place.tokens, settings=setting.optimizer,
        )  # fmt: skip
        self._scorer = Scorer(
            shape, bias2, precision, place.device, fragments=place.fragments, tokens=place.tokens, doc_start_token=None
        )  # fmt: skip
        self._make = StepBatch.make
        self._noise, self._seed = _Noise(setting), setting.seed
        self.weights = self._engine.weights
        self.batch_device = torch.device("cpu")

    def step(self, batch: Batch, index: int, rate: float) -> None:
        text, target = batch
        keep, seed = self._noise.token_keep(text), self._seed * 1_000_003 + index
        self._engine.step(self._make(self._shape, text, target, token_keep=keep, noise=self._noise.rows, step=index, seed=seed), rate)

    def losses(self, batches: Sequence[Batch], weights: Tensor | None = None) -> list[float]:
        self._scorer.load(self.weights if weights is None else weights)
        return [float(self._scorer.loss(*batch)) for batch in batches]
