"""Micro-batches of the engine with an exchange: the last one of a step runs in stages; each part of the gradient leaves when it is there.

The stages of a part are captured as one CUDA graph: forward and final layer, then the layers of every part, the embedding. Between two of
them the exchange of the part that is complete is enqueued on another stream, so it runs while lower layers are computed. All other
micro-batches of a step are one graph each, as without a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tscale_fed.engine.backward import BackwardWork, embedding_stage, head_stage, layer_stage
from tscale_fed.engine.finite import FiniteCheck
from tscale_fed.engine.forward import Work, forward
from tscale_fed.engine.gradients import WeightGradients
from tscale_fed.engine.passes import Passes, capture
from tscale_fed.parallel.buckets import Stage
from tscale_fed.parallel.exact import GradientExchange


class GroupPasses(Passes):
    """A `passes.Runner` whose last micro-batch is run by `run_last`."""

    def __init__(
        self,
        work: Work,
        gradients: WeightGradients,
        flat: Tensor,
        check: FiniteCheck,
        exchange: GradientExchange,
        *,
        graphs: bool,
        squares_known: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(work, gradients, flat, check, graphs=graphs, squares_known=squares_known)
        self._exchange = exchange
        self._staged = {several: BackwardWork(work, gradients, accumulate=several) for several in (False, True)}
        self._stage_graphs: dict[bool, list[torch.cuda.CUDAGraph]] = {}

    def prepared(self, several: bool) -> bool:
        return self._graphs is None or (several in self._stage_graphs and (not several or super().prepared(True)))

    def prepare(self, several: bool) -> None:
        super().prepare(several)
        if self._graphs is not None and several not in self._stage_graphs:
            parts = range(len(self._exchange.buckets))
            self._stage_graphs[several] = [capture(lambda part=part: self._part(several, part)) for part in parts]  # type: ignore[misc]

    def run_last(self, accumulate: bool) -> None:
        """The last micro-batch of a step, which is also the first unless `accumulate`; the exchange is under way when this returns."""
        if not accumulate:
            self._do("pack known" if self._squares_known() else "pack")
        for part in range(len(self._exchange.buckets)):
            if self._graphs is None:
                self._part(accumulate, part)
            else:
                self._stage_graphs[accumulate][part].replay()
            self._exchange.ready(part)

    def _part(self, accumulate: bool, part: int) -> None:
        work, buckets = self._staged[accumulate], self._exchange.buckets
        if part == 0:
            if not accumulate:
                self._check.peaks.zero_()
                self._work.buffers.loss_sum.zero_()
            forward(self._work)
        for stage in buckets[part].stages:
            _run_stage(work, stage)
        if part == len(buckets) - 1:
            self._check.note(self._work)


def _run_stage(work: BackwardWork, stage: Stage) -> None:
    if stage == "final":
        head_stage(work)
    elif isinstance(stage, int):
        layer_stage(work, stage)
    else:
        embedding_stage(work)
