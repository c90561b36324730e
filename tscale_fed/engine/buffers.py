"""Buffers: everything that a micro-batch reads and writes, allocated once; the kernels and the CUDA graphs know their addresses.

Which there are, and why so large, is in `layout.py`. Two of them are used for several things, one after the other: `wide_codes` (the
combiner's input, then transposed inputs of weight gradients) and `wide_gradient` (gradients of the head, the hidden layer, the combiner's
input).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.kernel_order import rotation
from tscale_fed.engine.layout import Sizes, buffer_specs
from tscale_fed.engine.small_work import on_one_thread
from tscale_fed.model.loss import NO_TARGET
from tscale_kernels.dither import ref_hash
from tscale_kernels.head import HeadScratch

NO_LABEL = -1
_SEED_STEP = 0x85EBCA6B
"""Odd: spreads the numbers of micro-batches and layers over 32 bits."""
_MASK32 = 0xFFFFFFFF


class GradientStats(NamedTuple):
    """Largest magnitudes of one gradient [M, N], found while it is written."""

    row_max: Tensor
    """fp32 [M]"""
    column_max: Tensor
    """fp32 [N]"""


class LayerStats(NamedTuple):
    """The four gradients of a layer that are quantised, in the order of the backward pass; then the largest codes of each channel, times
    inverse token weights, of the three inputs that are quantised anew for a weight gradient."""

    into_down: GradientStats
    """dx as it comes from above."""
    hidden: GradientStats
    into_combiner: GradientStats
    """dx with the feed-forward step's part."""
    projected: GradientStats
    active: Tensor
    """fp32 [F]: ffn_down's input."""
    ffn_input: Tensor
    """fp32 [E]"""
    attention_input: Tensor
    """fp32 [E]"""


class Buffers:
    """The tensors of `layout.buffer_specs` as attributes, zeros at first. Raises torch.OutOfMemoryError."""

    labels: Tensor
    signs: Tensor
    target: Tensor
    document_start: Tensor
    seeds: Tensor
    cosine: Tensor
    sine: Tensor
    x: Tensor
    attention_input: Tensor
    attention_input_rms: Tensor
    ffn_input: Tensor
    ffn_input_rms: Tensor
    final_input: Tensor
    final_input_rms: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    projected_rms: Tensor
    attended: Tensor
    log_sum: Tensor
    hidden: Tensor
    hidden_rms: Tensor
    active: Tensor
    wide_codes: Tensor
    losses: Tensor
    loss_sum: Tensor
    dx: Tensor
    wide_gradient: Tensor
    d_attended: Tensor
    delta: Tensor
    d_projected: Tensor
    gradient_codes: Tensor
    gradient_codes_t: Tensor
    row_unit: Tensor
    column_unit: Tensor
    state_column_unit: Tensor
    token_weight: Tensor
    token_weight_inverse: Tensor
    ones: Tensor
    stats: Tensor
    embedding_partial: Tensor

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes = sizes
        specs = buffer_specs(sizes)
        for name, spec in specs.items():
            memory = torch.zeros(spec.bytes, dtype=torch.uint8, device=device)
            setattr(self, name, memory.view(spec.dtype).view(spec.shape))
        self.names = tuple(specs)
        self.head = HeadScratch(**{name: getattr(self, "head_" + name) for name in HeadScratch.__dataclass_fields__})
        cosine, sine = rotation(sizes.tokens, device)
        self.cosine.copy_(cosine)
        self.sine.copy_(sine)
        if sizes.kind != "evaluate":
            self.ones.fill_(1.0)

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (getattr(self, name) for name in self.names))

    def codes(self, scratch: Tensor, rows: int, columns: int) -> Tensor:
        """The first rows * columns codes of a flat scratch buffer as a matrix."""
        return scratch[: rows * columns].view(rows, columns)

    def gradient(self, columns: int) -> Tensor:
        """`wide_gradient` as bf16 [M, columns]."""
        elements = self.sizes.rows * columns
        return self.wide_gradient[: 2 * elements].view(torch.bfloat16).view(self.sizes.rows, columns)

    def products_gradient(self) -> tuple[Tensor, Tensor | None]:
        """`wide_gradient` as the gradient of the combiner's input [M, 4A]: bf16 and None, or int8 codes and their units fp32 [4H, M]."""
        rows, heads = self.sizes.rows, self.sizes.shape.heads
        columns = 4 * self.sizes.shape.heads_width
        if not self.sizes.coded_products:
            return self.gradient(columns), None
        codes, units = self.wide_gradient[: rows * columns], self.wide_gradient[rows * columns :][: 16 * heads * rows]
        return codes.view(torch.int8).view(rows, columns), units.view(torch.float32).view(4 * heads, rows)

    def layer_stats(self, layer: int) -> LayerStats:
        """Statistics of a layer's gradients; layer -1: of dx below the first layer, which nobody reads but kernels write."""
        rows, shape, line = self.sizes.rows, self.sizes.shape, self.stats[layer + 1]
        widths = [shape.width, shape.ffn_width, shape.width, 4 * shape.heads_width, shape.ffn_width, shape.width, shape.width]
        row_max, columns = line[: 4 * rows].split(rows), line[4 * rows :].split(widths)
        down, hidden, combiner, projected = (GradientStats(*pair) for pair in zip(row_max, columns[:4], strict=True))
        return LayerStats(down, hidden, combiner, projected, *columns[4:])

    # -- inputs ------------------------------------------------------------------------------------------------------

    def load(self, part: StepBatch, index: int, doc_start_token: int | None) -> None:
        """Copy a micro-batch of at most `sizes.fragments` fragments in; the rest is filled up with rows that add nothing.

        `index`: number of the micro-batch in its step; it and the batch's seed decide the rounding noise.
        """
        with on_one_thread(beside_gpu=self.labels.is_cuda):
            self._load(part, index, doc_start_token)

    def _load(self, part: StepBatch, index: int, doc_start_token: int | None) -> None:
        rows = part.text.numel()
        self._fill(self.labels, part.labels.flatten(0, 1), rows, NO_LABEL)
        self._fill(self.signs, part.signs.expand(rows, -1), rows, 0)
        self._fill(self.target, part.target.flatten(), rows, NO_TARGET)
        if doc_start_token is not None:
            self._fill(self.document_start, document_starts(part.text, doc_start_token).flatten(), rows, 0)
        self._send(self.seeds, layer_seeds(part.seed, index, self.sizes.depth))

    def _fill(self, buffer: Tensor, values: Tensor, rows: int, rest: int) -> None:
        whole = torch.full(buffer.shape, rest, dtype=buffer.dtype)
        if values.dim() > 1:
            whole[:rows, : values.shape[1]] = values  # a batch without noise has one label per position
        else:
            whole[:rows] = values
        self._send(buffer, whole)

    @staticmethod
    def _send(buffer: Tensor, values: Tensor) -> None:
        """Without waiting: pinned memory is not reused before the copy is done (torch's host allocator sees to it)."""
        buffer.copy_(values.pin_memory() if buffer.is_cuda else values, non_blocking=True)


def document_starts(text: Tensor, doc_start_token: int) -> Tensor:
    """int32 [B, T]: position in the fragment where each token's document starts; text [B, T]."""
    position = torch.arange(text.shape[1]).expand(text.shape)
    return torch.where(text == doc_start_token, position, 0).cummax(1).values.to(torch.int32)


def layer_seeds(seed: int, micro_batch: int, layers: int) -> Tensor:
    """int32 [layers]: seeds of the rounding noise of one micro-batch, all different."""
    index = torch.arange(1 + micro_batch * layers, 1 + (micro_batch + 1) * layers, dtype=torch.int64)
    hashed = ref_hash((ref_hash(torch.tensor(seed & _MASK32)) + index * _SEED_STEP) & _MASK32)
    return torch.where(hashed >= 1 << 31, hashed - (1 << 32), hashed).to(torch.int32)
