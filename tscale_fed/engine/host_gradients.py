"""Gradients on their way to host memory: fp32 scratch for one layer at a time, bf16 copies that leave while the next layer is computed.

The backward pass goes through stages, "final", the layers from the top, "embedding". A stage writes its fp32 gradient into scratch that
all stages of its kind share, then `finish_stage` rounds it to bf16 (nearest even) into one of two slots, so that one may be on its way
while the other is filled; the ends of the model have a slot of their own. Relative error of gradients of a small model: bf16 0.17 %, int8
with a scale per 128 values, which would halve the bytes on the bus, 0.61 to 0.89 %.

`guard` is the largest magnitude of the step so far, loss included, and not finite once anything was not: codes are always finite, so a
gradient that looks fine may come from numbers that overflowed above it. It leaves with every gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.engine.buffers import Buffers
from tscale_fed.engine.gradients import LayerGradients, MatrixGradient, square_sums_needed, workspace_needed
from tscale_fed.engine.kernel_order import joined_rows
from tscale_fed.model.shape import ModelShape
from tscale_kernels.matmul_wgrad import square_sum_count

Stage = int | str
"""A layer's number, "final" or "embedding"."""
SLOTS = 2


@dataclass(frozen=True, slots=True)
class StageSpan:
    """Where a stage's gradient is in the flat gradient, and its sums of squares in `square_sums` (empty for the ends)."""

    start: int
    stop: int
    first_sum: int
    last_sum: int


class HostGradients:
    """Device side of the gradients in host mode; has what `backward` needs of `gradients.Gradients`. Raises torch.OutOfMemoryError."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self.spans = stage_spans(shape)
        self.square_sums = torch.zeros(square_sums_needed(shape), device=device)
        self.workspace = torch.zeros(workspace_needed(shape), dtype=torch.int32, device=device)
        self.guard = torch.zeros(1, device=device)
        self._layer = torch.zeros(_elements(self.spans[0]), device=device)
        ends = max(_elements(self.spans["embedding"]), _elements(self.spans["final"]))
        self._ends = torch.zeros(ends, device=device)
        self._slots = torch.zeros(SLOTS, self._layer.numel(), dtype=torch.bfloat16, device=device)
        self._ends_slot = torch.zeros(ends, dtype=torch.bfloat16, device=device)
        self.embedding = self._end("embedding", shape.embedding_rows, shape.width)
        self.final = self._end("final", shape.vocab, shape.width)
        rows = joined_rows(shape.heads).to(device, torch.int32)
        self.layers = [self._views(shape, layer, rows) for layer in range(len(shape.layers()))]

    def sent(self, stage: Stage) -> Tensor:
        """bf16, flat: what leaves for the host after `finish_stage`."""
        buffer = self._slots[stage % SLOTS] if isinstance(stage, int) else self._ends_slot
        return buffer[: _elements(self.spans[stage])]

    def sums(self, stage: Stage) -> Tensor:
        """fp32: sums of squares of the stage's fp32 gradient, by tile."""
        span = self.spans[stage]
        return self.square_sums[span.first_sum : span.last_sum]

    def finish_stage(self, stage: Stage, buffers: Buffers) -> None:
        """Round to bf16, and join the stage's largest row maxima into the guard. Part of a captured graph."""
        source = self._layer if isinstance(stage, int) else self._ends
        self.sent(stage).copy_(source[: _elements(self.spans[stage])])
        if stage == "final":
            self._begin_guard(buffers)
        line = buffers.sizes.depth if stage == "final" else stage + 1 if isinstance(stage, int) else 0
        peak = buffers.stats[line, : 4 * buffers.sizes.rows].amax().view(1)
        torch.maximum(self.guard, peak, out=self.guard)

    def _begin_guard(self, b: Buffers) -> None:
        """Loss and states of the forward pass; joined, since an earlier micro-batch of the step may have overflowed."""
        peaks = (b.attention_input_rms.amax(), b.ffn_input_rms.amax(), b.final_input_rms.amax(), b.loss_sum[0].float())
        torch.maximum(self.guard, torch.stack(peaks).amax().view(1), out=self.guard)

    def _end(self, stage: Stage, rows: int, columns: int) -> Tensor:
        return self._ends[: _elements(self.spans[stage])].view(rows, columns)

    def _views(self, shape: ModelShape, layer: int, joined: Tensor) -> LayerGradients:
        sums_at, at = self.spans[layer].first_sum, 0
        matrices: list[MatrixGradient] = []
        for rows, columns in joined_shapes(shape):
            count, size = square_sum_count(rows, columns), rows * columns
            grad = self._layer[at : at + size].view(rows, columns)
            matrices.append(MatrixGradient(grad, self.square_sums[sums_at : sums_at + count], joined if not matrices else None))
            sums_at, at = sums_at + count, at + size
        return LayerGradients(*matrices)


def stages(shape: ModelShape) -> list[Stage]:
    """In the order of the backward pass."""
    return ["final", *reversed(range(len(shape.layers()))), "embedding"]


def stage_spans(shape: ModelShape) -> dict[Stage, StageSpan]:
    """Every stage's place; a layer's matrices lie side by side in the flat order."""
    embedding, final = (rows * columns for _, rows, columns in shape.tensors()[:2])
    spans: dict[Stage, StageSpan] = {"embedding": StageSpan(0, embedding, 0, 0), "final": StageSpan(embedding, embedding + final, 0, 0)}
    size, sums = (sum(each) for each in zip(*((r * c, square_sum_count(r, c)) for r, c in joined_shapes(shape)), strict=True))
    for layer in range(len(shape.layers())):
        start = embedding + final + layer * size
        spans[layer] = StageSpan(start, start + size, layer * sums, (layer + 1) * sums)
    return spans


def joined_shapes(shape: ModelShape) -> list[tuple[int, int]]:
    """Of a layer: joined projections, combiner, ffn_up, ffn_down; the flat order."""
    heads_width, width, ffn_width = shape.heads_width, shape.width, shape.ffn_width
    return [(4 * heads_width, width), (width, 4 * heads_width), (ffn_width, width), (width, ffn_width)]


def host_gradient_bytes(shape: ModelShape) -> int:
    """Device bytes of `HostGradients` (its row map apart)."""
    spans = stage_spans(shape)
    layer, ends = _elements(spans[0]), max(_elements(spans["embedding"]), _elements(spans["final"]))
    return 4 * (square_sums_needed(shape) + workspace_needed(shape) + 1 + layer + ends) + 2 * (SLOTS * layer + ends)


def _elements(span: StageSpan) -> int:
    return span.stop - span.start
