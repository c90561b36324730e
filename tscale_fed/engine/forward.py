"""The forward pass by hand: enters labels in the buffers, leaves the codes of the final state and all that the backward pass reads.

    embed_normalise -> per layer: project, attend, add_normalise (combiner), expand, add_normalise (ffn_down)
`attention_states` and `ffn_states` write what a plan that keeps everything saves; with a plan that recomputes, backward calls them again.
Nothing here looks at values, allocates or waits: the pass can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tscale_fed.engine.buffers import Buffers
from tscale_fed.engine.layout import Sizes
from tscale_fed.engine.packed import Matrix, PackedWeights
from tscale_fed.model.constants import PREVIOUS_WIDTH
from tscale_kernels.attention import attend
from tscale_kernels.attention_width1 import attend_width1
from tscale_kernels.codes import product_scale, vector_scale
from tscale_kernels.dispatch import BackendName
from tscale_kernels.embedding import embed_normalise
from tscale_kernels.matmul_addnorm import add_normalise
from tscale_kernels.matmul_norm import expand, project


@dataclass(frozen=True, slots=True)
class Work:
    """What both passes work on."""

    weights: PackedWeights
    table: Tensor
    """fp32 [rows, E]: the embedding."""
    bias: Tensor
    """fp32 [VP]: output bias, natural units."""
    buffers: Buffers
    documents: bool
    """Whether attention stops at document starts."""
    backend: BackendName | None = None

    @property
    def sizes(self) -> Sizes:
        return self.buffers.sizes

    def input_slot(self, layer: int) -> int:
        """Where a layer's inputs are."""
        return 0 if self.sizes.kind == "evaluate" else layer

    def state_slot(self, layer: int) -> int:
        """Where the states between a layer's products are."""
        return layer if self.sizes.kind == "keep" else 0

    def product_scale(self, layer: int) -> float:
        """Code of a product of gate and attention result that is 1."""
        return product_scale(self.sizes.precision.code, *self.sizes.shape.layers()[layer])

    @property
    def document_start(self) -> Tensor | None:
        return self.buffers.document_start if self.documents else None


def forward(work: Work) -> None:
    """Labels to `final_input`."""
    b = work.buffers
    first = work.input_slot(0)
    embed_normalise(
        b.labels, b.signs, work.table, x=b.x, n=b.attention_input[first], rms=b.attention_input_rms[first], backend=work.backend
    )
    for layer in range(work.sizes.depth):
        attention_states(work, layer)
        _add_attention(work, layer)
        ffn_states(work, layer)
        _add_ffn(work, layer)


def attention_states(work: Work, layer: int) -> None:
    """The layer's input to queries, keys, values, gates, the attention result and (in `wide_codes`) the combiner's input."""
    b, matrix, slot, source = work.buffers, work.weights.layers[layer].projection, work.state_slot(layer), work.input_slot(layer)
    query, key, value, gate, rms = b.query[slot], b.key[slot], b.value[slot], b.gate[slot], b.projected_rms[slot]
    project(
        b.attention_input[source], matrix.codes, matrix.units, cosine=b.cosine, sine=b.sine,
        query=query, key=key, gate=gate, value=value, rms=rms, backend=work.backend,
    )  # fmt: skip
    width, slope = work.sizes.shape.layers()[layer]
    out, products, scale, tokens = b.attended[slot], _products(work), work.product_scale(layer), work.sizes.tokens
    if width == PREVIOUS_WIDTH:
        attend_width1(
            query, key, value, rms, gate, tokens=tokens, slope=slope, document_start=work.document_start,
            out=out, products=products, product_scale=scale, backend=work.backend,
        )  # fmt: skip
    else:
        attend(
            query, key, value, rms, gate, tokens=tokens, width=width, slope=slope, document_start=work.document_start,
            out=out, log_sum=b.log_sum[slot], products=products, product_scale=scale, backend=work.backend,
        )  # fmt: skip


def ffn_states(work: Work, layer: int) -> None:
    """The feed-forward step's input to its hidden layer, before and after relu."""
    b, matrix, slot = work.buffers, work.weights.layers[layer].ffn_up, work.state_slot(layer)
    expand(
        b.ffn_input[work.input_slot(layer)], matrix.codes, matrix.units,
        hidden=b.hidden[slot], active=b.active, rms=b.hidden_rms[slot], backend=work.backend,
    )  # fmt: skip


def _products(work: Work) -> Tensor:
    return work.buffers.codes(work.buffers.wide_codes, work.sizes.rows, 4 * work.sizes.shape.heads_width)


def _add_attention(work: Work, layer: int) -> None:
    b, target = work.buffers, work.input_slot(layer)
    scale, matrix = work.product_scale(layer), work.weights.layers[layer].combiner
    _add(work, _products(work), scale, matrix, b.ffn_input[target], b.ffn_input_rms[target])


def _add_ffn(work: Work, layer: int) -> None:
    b = work.buffers
    last = layer + 1 == work.sizes.depth
    target = work.input_slot(layer + 1)
    n, rms = (b.final_input, b.final_input_rms) if last else (b.attention_input[target], b.attention_input_rms[target])
    _add(work, b.active, vector_scale(b.active.dtype), work.weights.layers[layer].ffn_down, n, rms)


def _add(work: Work, a: Tensor, a_scale: float, matrix: Matrix, n: Tensor, rms: Tensor) -> None:
    """x += lin(a, matrix), codes `a` of values times a_scale, and the codes of the new state."""
    add_normalise(a, matrix.codes, matrix.units, a_scale=a_scale, x=work.buffers.x, n=n, rms=rms, backend=work.backend)
