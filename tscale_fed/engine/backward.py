"""The backward pass by hand: enters the buffers that `forward` filled, leaves the gradient of all weights and the loss sum.

    head -> through the last normalisation -> per layer from the top: ffn_down, ffn_up, combiner, attention, projection -> embedding
Each of these makes two products from codes of its gradient: the data gradient, whose epilogue goes on through what stood before the
matrix, and the weight gradient. Codes of a gradient need its largest magnitudes per token and per channel; the kernel that writes a
gradient finds them (`buffers.LayerStats`, zeroed all at once), and the kernel of the data gradient those of the weight gradient's input.
The channel maxima are of the gradient times the token weights known then (`balance.py`), so both sides of a weight gradient use that same
set: `old` for the gradient that comes from the layer above, `new` for the others of a layer. The combiner's has no weights (ones): its
inputs differ in size from token to token, which makes the plain split better there (at width 1280 an error of 0.8 % instead of 1.2 %), and
the codes of the forward pass serve as its inputs' codes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tscale_fed.engine.buffers import GradientStats
from tscale_fed.engine.forward import Work, attention_states, ffn_states
from tscale_fed.engine.gradients import MatrixGradient, WeightGradients
from tscale_fed.model.constants import PREVIOUS_WIDTH
from tscale_kernels.attention_backward import attend_backward
from tscale_kernels.attention_backward_width1 import attend_backward_width1
from tscale_kernels.balance import token_weights
from tscale_kernels.embedding import embedding_gradient
from tscale_kernels.head import loss_and_gradient
from tscale_kernels.kv_product import products_backward
from tscale_kernels.matmul_dgrad import through_norm_add, through_relu_norm, to_input
from tscale_kernels.matmul_wgrad import weight_gradient
from tscale_kernels.norm_backward import through_norm_add_rows
from tscale_kernels.quantize import column_max, rows_and_transpose
from tscale_kernels.transpose import transpose_products, transpose_scaled

DOWN_SALT, UP_SALT, COMBINER_SALT, PROJECTION_SALT = range(4)
"""Noise fields of a layer's four gradients; the seed differs from layer to layer."""


@dataclass(frozen=True, slots=True)
class BackwardWork:
    """What the backward pass works on."""

    forward: Work
    gradients: WeightGradients
    accumulate: bool
    """Add to the gradient (a further micro-batch of a step) instead of overwriting it."""


def backward(work: BackwardWork) -> None:
    """Everything after `forward`."""
    head_stage(work)
    for layer in reversed(range(work.forward.sizes.depth)):
        layer_stage(work, layer)
    embedding_stage(work)


def embedding_stage(work: BackwardWork) -> None:
    """Gradient of the embedding, from dx below the first layer."""
    b, gradients = work.forward.buffers, work.gradients
    if not work.accumulate:
        gradients.embedding.zero_()
    embedding_gradient(b.dx, b.labels, b.signs, grad=gradients.embedding, partial=b.embedding_partial, backend=work.forward.backend)


def head_stage(work: BackwardWork) -> None:
    """Loss, gradient of the final layer, and dx with its statistics for the topmost layer."""
    forward, b = work.forward, work.forward.buffers
    b.stats.zero_()
    b.dx.zero_()
    if not work.accumulate:
        work.gradients.final.zero_()
    depth, backend, final = forward.sizes.depth, forward.backend, forward.weights.final
    d_n = b.gradient(forward.sizes.shape.width)
    loss_and_gradient(
        b.final_input, final.codes, final.units, forward.bias, b.target, losses=b.losses, loss_sum=b.loss_sum, d_n=d_n,
        grad=work.gradients.final, scratch=b.head, backend=backend,
    )  # fmt: skip
    stats = b.layer_stats(depth - 1).into_down
    through_norm_add_rows(d_n, n=b.final_input, rms=b.final_input_rms, dx=b.dx, row_max=stats.row_max, backend=backend)
    weight, inverse = b.token_weight[depth % 2], b.token_weight_inverse[depth % 2]
    token_weights(stats.row_max, weight=weight, inverse=inverse, backend=backend)
    column_max(b.dx, token_weight=weight, out=stats.column_max, backend=backend)


def layer_stage(work: BackwardWork, layer: int) -> None:
    """Everything of one layer, the topmost first: gradients of its matrices, and dx below it."""
    forward, b = work.forward, work.forward.buffers
    new = layer % 2
    stats = b.layer_stats(layer)
    token_weights(stats.into_down.row_max, weight=b.token_weight[new], inverse=b.token_weight_inverse[new], backend=forward.backend)
    if forward.sizes.kind == "recompute":
        attention_states(forward, layer)
        ffn_states(forward, layer)
    _feed_forward(work, layer)
    _combiner(work, layer)
    _attention(work, layer)
    _projection(work, layer)


def _feed_forward(work: BackwardWork, layer: int) -> None:
    """Through ffn_down, relu and normalise to `d_hidden`; through ffn_up and normalise into dx."""
    forward, b, stats = work.forward, work.forward.buffers, work.forward.buffers.layer_stats(layer)
    new, old, slot, backend = layer % 2, (layer + 1) % 2, forward.state_slot(layer), forward.backend
    matrices, gradients = forward.weights.layers[layer], work.gradients.layers[layer]
    d_hidden, ffn_input = b.gradient(forward.sizes.shape.ffn_width), b.ffn_input[layer]

    codes, codes_t = _quantise(work, layer, b.dx, stats.into_down, b.token_weight[old], DOWN_SALT)
    through_relu_norm(
        codes, b.row_unit, matrices.ffn_down.transposed, matrices.ffn_down.units, hidden=b.hidden[slot], rms=b.hidden_rms[slot],
        token_weight=b.token_weight[new], out=d_hidden, row_max=stats.hidden.row_max, column_max=stats.hidden.column_max,
        input_scale=_input_scale(work, old), input_max=stats.active, backend=backend,
    )  # fmt: skip
    _weight_gradient(work, codes_t, _transpose(work, b.hidden[slot], old, stats.active, relu=True), gradients.ffn_down)

    codes, codes_t = _quantise(work, layer, d_hidden, stats.hidden, b.token_weight[new], UP_SALT)
    through_norm_add(
        codes, b.row_unit, matrices.ffn_up.transposed, matrices.ffn_up.units, n=ffn_input, rms=b.ffn_input_rms[layer],
        token_weight=b.ones, dx=b.dx, row_max=stats.into_combiner.row_max, column_max=stats.into_combiner.column_max,
        input_scale=_input_scale(work, new), input_max=stats.ffn_input, backend=backend,
    )  # fmt: skip
    _weight_gradient(work, codes_t, _transpose(work, ffn_input, new, stats.ffn_input), gradients.ffn_up)


def _combiner(work: BackwardWork, layer: int) -> None:
    """Through the combiner and its products to `d_attended` and the gate's part of `d_projected`."""
    forward, b, stats = work.forward, work.forward.buffers, work.forward.buffers.layer_stats(layer)
    new, slot, backend = layer % 2, forward.state_slot(layer), forward.backend
    matrix = forward.weights.layers[layer].combiner
    columns = 4 * forward.sizes.shape.heads_width
    products_t = b.codes(b.wide_codes, columns, forward.sizes.rows)
    d_products, d_unit = b.products_gradient()

    codes, codes_t = _quantise(work, layer, b.dx, stats.into_combiner, b.ones, COMBINER_SALT)
    to_input(codes, b.row_unit, matrix.transposed, matrix.units, out=d_products, out_unit=d_unit, backend=backend)
    transpose_products(
        b.gate[slot], b.attended[slot], codes_t=products_t, column_unit=b.state_column_unit[:columns],
        product_scale=forward.product_scale(layer), backend=backend,
    )  # fmt: skip
    _weight_gradient(work, codes_t, products_t, work.gradients.layers[layer].combiner)

    width, _ = forward.sizes.shape.layers()[layer]
    products_backward(
        d_products, b.gate[slot], b.attended[slot], b.projected_rms[slot], d_unit=d_unit,
        units=forward.weights.layers[layer].projection.units, token_weight=b.token_weight[new], d_out=b.d_attended,
        delta=None if width == PREVIOUS_WIDTH else b.delta, d_projected=b.d_projected, row_max=stats.projected.row_max,
        column_max=stats.projected.column_max, backend=backend,
    )  # fmt: skip


def _attention(work: BackwardWork, layer: int) -> None:
    """Through attention to the query, key and value parts of `d_projected`."""
    forward, b, stats = work.forward, work.forward.buffers, work.forward.buffers.layer_stats(layer)
    slot, (width, slope), tokens = forward.state_slot(layer), forward.sizes.shape.layers()[layer], forward.sizes.tokens
    units, token_weight = forward.weights.layers[layer].projection.units, b.token_weight[layer % 2]
    if width == PREVIOUS_WIDTH:
        attend_backward_width1(
            b.query[slot], b.key[slot], b.value[slot], b.projected_rms[slot], d_out=b.d_attended, cosine=b.cosine, sine=b.sine,
            tokens=tokens, slope=slope, document_start=forward.document_start, units=units, token_weight=token_weight,
            d_projected=b.d_projected, row_max=stats.projected.row_max, column_max=stats.projected.column_max, backend=forward.backend,
        )  # fmt: skip
    else:
        attend_backward(
            b.query[slot], b.key[slot], b.value[slot], b.projected_rms[slot], d_out=b.d_attended, log_sum=b.log_sum[slot], delta=b.delta,
            cosine=b.cosine, sine=b.sine, tokens=tokens, width=width, slope=slope, document_start=forward.document_start, units=units,
            token_weight=token_weight, d_projected=b.d_projected, row_max=stats.projected.row_max, column_max=stats.projected.column_max,
            backend=forward.backend,
        )  # fmt: skip


def _projection(work: BackwardWork, layer: int) -> None:
    """Through the joined projection and normalise into dx, with the statistics that the layer below starts from."""
    forward, b, stats = work.forward, work.forward.buffers, work.forward.buffers.layer_stats(layer)
    below, new, matrix = b.layer_stats(layer - 1).into_down, layer % 2, forward.weights.layers[layer].projection
    codes, codes_t = _quantise(work, layer, b.d_projected, stats.projected, b.token_weight[new], PROJECTION_SALT, matrix.units)
    through_norm_add(
        codes, b.row_unit, matrix.transposed, b.ones[:1], n=b.attention_input[layer], rms=b.attention_input_rms[layer],
        token_weight=b.token_weight[new], dx=b.dx, row_max=below.row_max, column_max=below.column_max,
        input_scale=_input_scale(work, new), input_max=stats.attention_input, backend=forward.backend,
    )  # fmt: skip
    inputs = _transpose(work, b.attention_input[layer], new, stats.attention_input)
    _weight_gradient(work, codes_t, inputs, work.gradients.layers[layer].projection)


# -- pieces ------------------------------------------------------------------------------------------------------------


def _quantise(
    work: BackwardWork, layer: int, g: Tensor, stats: GradientStats, token_weight: Tensor, salt: int, units: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of a gradient [M, N] by rows, and transposed by columns; their units are in `row_unit` and `column_unit`."""
    b, (rows, columns) = work.forward.buffers, g.shape
    codes, codes_t = b.codes(b.gradient_codes, rows, columns), b.codes(b.gradient_codes_t, columns, rows)
    rows_and_transpose(
        g, row_max=stats.row_max, column_max=stats.column_max, token_weight=token_weight, segment_units=units,
        seed=b.seeds[layer : layer + 1], salt=salt, codes=codes, row_unit=b.row_unit, codes_t=codes_t,
        column_unit=b.column_unit[:columns], backend=work.forward.backend,
    )  # fmt: skip
    return codes, codes_t


def _input_scale(work: BackwardWork, weights: int) -> Tensor | None:
    """What inputs of a weight gradient are multiplied by before their maxima are taken; None for bf16 codes, which need no maxima."""
    sizes = work.forward.sizes
    return None if sizes.precision.name == "bfloat16" else work.forward.buffers.token_weight_inverse[weights]


def _transpose(work: BackwardWork, x: Tensor, weights: int, column_max: Tensor, relu: bool = False) -> Tensor:
    """The input side of a weight gradient, [K, M] in `wide_codes`; its units are in `state_column_unit`."""
    b, (rows, columns) = work.forward.buffers, x.shape
    codes_t = b.codes(b.wide_codes, columns, rows)
    transpose_scaled(
        x, token_scale=b.token_weight_inverse[weights], relu=relu, column_max=column_max, codes_t=codes_t,
        column_unit=b.state_column_unit[:columns], backend=work.forward.backend,
    )  # fmt: skip
    return codes_t


def _weight_gradient(work: BackwardWork, g_t: Tensor, x_t: Tensor, matrix: MatrixGradient) -> None:
    b = work.forward.buffers
    weight_gradient(
        g_t, x_t, b.column_unit[: g_t.shape[0]], b.state_column_unit[: x_t.shape[0]], factor=x_t.shape[0] ** -0.5, row_map=matrix.row_map,
        grad=matrix.grad, accumulate=work.accumulate, square_sums=matrix.square_sums, workspace=work.gradients.workspace,
        backend=work.forward.backend,
    )  # fmt: skip
