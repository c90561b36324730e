"""Which buffers a micro-batch needs: names, shapes and number formats as a pure function of the sizes.

The memory plan adds their bytes up, `buffers.py` allocates them: one list, so the plan cannot err. Letters: M rows (fragments * tokens,
rounded up to a multiple of 128), T tokens, E width, A = 128 heads, F feed-forward width, L layers, C the code dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from tscale_fed.engine.precision import Precision
from tscale_fed.model.constants import GROUP_CHANNELS
from tscale_fed.model.shape import ModelShape
from tscale_kernels.embedding import partial_shape
from tscale_kernels.head import scratch_shapes

Kind = Literal["keep", "recompute", "evaluate"]
"""keep: backward reads all saved states; recompute: only layer inputs are saved, the rest is made again; evaluate: forward alone."""

ROW_MULTIPLE = 128
"""Rows of a micro-batch: tiles of all kernels are full."""
MAX_ROWS = 1 << 17
"""131 072 products of two int8 codes sum up to less than 2**31: the weight gradient stays exact. Codes of a row that all are -128 would
need more, but gradients are scaled to +-127."""


class BufferSpec(NamedTuple):
    """One tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Sizes:
    """Everything that decides the buffers of a micro-batch."""

    shape: ModelShape
    fragments: int
    tokens: int
    precision: Precision
    kind: Kind = "keep"
    stream: torch.dtype = torch.float32
    """Of the state between layers and of its gradient."""

    @property
    def rows(self) -> int:
        """M."""
        return round_up(self.fragments * self.tokens, ROW_MULTIPLE)

    @property
    def depth(self) -> int:
        """L."""
        return len(self.shape.layers())

    @property
    def label_columns(self) -> int:
        """Embedding rows per position: the token's own, and in training the two noise rows."""
        return 3 if self.shape.noise_rows and self.kind != "evaluate" else 1

    @property
    def padded_vocab(self) -> int:
        """VP."""
        return round_up(self.shape.vocab, ROW_MULTIPLE)

    @property
    def widest(self) -> int:
        """The longest row of codes that any matrix product reads."""
        return max(self.shape.width, 4 * self.shape.heads_width, self.shape.ffn_width)

    @property
    def coded_products(self) -> bool:
        """Whether the gradient of the combiner's input is kept in int8 codes, with a unit for 128 channels, and not in bf16."""
        return self.precision.code.itemsize == 1

    @property
    def stat_columns(self) -> int:
        """Per layer: row maxima of four gradients, then their column maxima, then those of three inputs (`buffers.LayerStats`)."""
        return 4 * self.rows + 4 * self.shape.width + 2 * self.shape.ffn_width + 4 * self.shape.heads_width


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def buffer_specs(sizes: Sizes) -> dict[str, BufferSpec]:
    """All buffers of a micro-batch of this kind, packed weights apart."""
    specs = _inputs(sizes) | _states(sizes) | _head(sizes)
    return specs if sizes.kind == "evaluate" else specs | _backward(sizes)


def _inputs(sizes: Sizes) -> dict[str, BufferSpec]:
    rows, columns = sizes.rows, sizes.label_columns
    return {
        "labels": BufferSpec((rows, columns), torch.int64),
        "signs": BufferSpec((rows, columns), torch.float32),
        "target": BufferSpec((rows,), torch.int64),
        "document_start": BufferSpec((rows,), torch.int32),
        "seeds": BufferSpec((sizes.depth,), torch.int32),
        "cosine": BufferSpec((sizes.tokens, GROUP_CHANNELS // 2), torch.float32),
        "sine": BufferSpec((sizes.tokens, GROUP_CHANNELS // 2), torch.float32),
    }


def _states(sizes: Sizes) -> dict[str, BufferSpec]:
    """What the forward pass writes."""
    shape, rows, precision = sizes.shape, sizes.rows, sizes.precision
    width, heads_width, ffn_width, groups = shape.width, shape.heads_width, shape.ffn_width, shape.width // GROUP_CHANNELS
    kept = sizes.depth if sizes.kind == "keep" else 1
    inputs = 1 if sizes.kind == "evaluate" else sizes.depth
    code = precision.code
    return {
        "x": BufferSpec((rows, width), sizes.stream),
        "attention_input": BufferSpec((inputs, rows, width), code),
        "attention_input_rms": BufferSpec((inputs, groups, rows), torch.float32),
        "ffn_input": BufferSpec((inputs, rows, width), code),
        "ffn_input_rms": BufferSpec((inputs, groups, rows), torch.float32),
        "final_input": BufferSpec((rows, width), code),
        "final_input_rms": BufferSpec((groups, rows), torch.float32),
        "query": BufferSpec((kept, rows, heads_width), precision.score_code),
        "key": BufferSpec((kept, rows, heads_width), precision.score_code),
        "value": BufferSpec((kept, rows, heads_width), precision.value_code),
        "gate": BufferSpec((kept, rows, heads_width), code),
        "projected_rms": BufferSpec((kept, 4 * shape.heads, rows), torch.float32),
        "attended": BufferSpec((kept, rows, heads_width), torch.bfloat16),
        "log_sum": BufferSpec((kept, shape.heads, rows), torch.float32),
        "hidden": BufferSpec((kept, rows, ffn_width), code),
        "hidden_rms": BufferSpec((kept, ffn_width // GROUP_CHANNELS, rows), torch.float32),
        "active": BufferSpec((rows, ffn_width), code),
        "wide_codes": BufferSpec((rows * sizes.widest,), code),
        "losses": BufferSpec((rows,), torch.float32),
        "loss_sum": BufferSpec((1,), torch.float64),
    }


def _backward(sizes: Sizes) -> dict[str, BufferSpec]:
    """What the backward pass adds. `wide_gradient` holds, one after the other: the head's gradient, the hidden layer's, the products'."""
    shape, rows, widest = sizes.shape, sizes.rows, sizes.widest
    heads_width, code = shape.heads_width, sizes.precision.code
    products_bytes = 4 * heads_width + 16 * shape.heads if sizes.coded_products else 8 * heads_width
    wide_bytes = rows * max(2 * shape.width, 2 * shape.ffn_width, products_bytes)
    return {
        "dx": BufferSpec((rows, shape.width), sizes.stream),
        "wide_gradient": BufferSpec((wide_bytes,), torch.uint8),
        "d_attended": BufferSpec((rows, heads_width), torch.bfloat16),
        "delta": BufferSpec((shape.heads, rows), torch.float32),
        "d_projected": BufferSpec((rows, 4 * heads_width), torch.bfloat16),
        "gradient_codes": BufferSpec((rows * widest,), code),
        "gradient_codes_t": BufferSpec((rows * widest,), code),
        "row_unit": BufferSpec((rows,), torch.float32),
        "column_unit": BufferSpec((widest,), torch.float32),
        "state_column_unit": BufferSpec((widest,), torch.float32),
        "token_weight": BufferSpec((2, rows), torch.float32),
        "token_weight_inverse": BufferSpec((2, rows), torch.float32),
        "ones": BufferSpec((rows,), torch.float32),
        "stats": BufferSpec((sizes.depth + 1, sizes.stat_columns), torch.float32),
        "embedding_partial": BufferSpec(partial_shape(rows, sizes.label_columns, shape.width), torch.float32),
    }


def _head(sizes: Sizes) -> dict[str, BufferSpec]:
    """Scratch of the final layer and loss."""
    shapes = scratch_shapes(sizes.rows, sizes.padded_vocab, sizes.shape.width, gradient=sizes.kind != "evaluate")
    return {"head_" + name: BufferSpec(*each) for name, each in shapes.items()}
