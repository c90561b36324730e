"""The model in fp64 with every stored state rounded as the engine rounds it: separates the errors of the backward pass from the forward's.

Enters: weights as fp64 leaves, a precision, text. Leaves: the loss sum. Rounding passes the gradient straight through, so the gradient is
the exact one at the engine's own forward states: the same side of every relu, the same codes. What remains between it and the engine's
gradient is what 8-bit gradients cost. (Weights of attention are not rounded here; the engine's are bf16, or float8 with fp8 attention.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tscale_fed.engine.precision import Precision
from tscale_fed.model.attention import attention_ref
from tscale_fed.model.combiner import combine_ref
from tscale_fed.model.constants import HEAD_CHANNELS
from tscale_fed.model.normalise import normalise_ref
from tscale_fed.model.rotary import rotary_table, rotate
from tscale_fed.model.shape import ModelShape
from tscale_kernels.codes import encode, product_scale, vector_scale
from tscale_kernels.matmul_norm import ref_keep_sign


def rounded(x: Tensor, code: torch.dtype, scale: float | None = None) -> Tensor:
    """Values that the codes of x stand for, `scale` (of vectors) the code of 1; the gradient passes."""
    scale = vector_scale(code) if scale is None else scale
    with torch.no_grad():
        values = encode(x.float() * scale, code).to(x.dtype) / scale
    return x + (values - x).detach()


def rounded_loss(shape: ModelShape, weights: Mapping[str, Tensor], precision: Precision, text: Tensor, target: Tensor) -> Tensor:
    """Loss sum in nats; weights fp64 [rows, columns] by name; text, target int64 [B, T], a target everywhere; no output bias."""
    x = weights["embedding"][shape.noise_rows + 1 + text]
    table = rotary_table(text.shape[1], text.device, torch.float64)
    for index, kind in enumerate(shape.layers()):
        x = _layer(x, {name: weights[f"layers.{index}.{name}"] for name in _LAYER}, kind, table, precision)
    logits = _linear(rounded(normalise_ref(x), precision.code), weights["final"])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")


_LAYER = ("query", "key", "gate", "value", "combiner", "ffn_up", "ffn_down")


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T * weight.shape[1] ** -0.5


def _layer(x: Tensor, weights: Mapping[str, Tensor], kind: tuple[int, float], table: tuple[Tensor, Tensor], precision: Precision) -> Tensor:
    code, score = precision.code, precision.score_code
    n = rounded(normalise_ref(x), code)
    query, key, gate, value = (_linear(n, weights[name]).unflatten(-1, (-1, HEAD_CHANNELS)) for name in _LAYER[:4])
    query = rounded(rotate(normalise_ref(query), *table), score)
    key = rounded(rotate(normalise_ref(key), *table), score) * key.square().mean(-1, keepdim=True).sqrt()
    attended = rounded(attention_ref(query, key, rounded(normalise_ref(value), precision.value_code), *kind), torch.bfloat16)
    products = combine_ref(rounded(normalise_ref(gate), code), attended)
    x = x + _linear(rounded(products, code, product_scale(code, *kind)), weights["combiner"])
    wide = normalise_ref(_linear(rounded(normalise_ref(x), code), weights["ffn_up"]))
    if code == torch.int8:
        wide = wide + (ref_keep_sign(wide * vector_scale(code)) / vector_scale(code) - wide).detach()
    hidden = rounded(wide, code)
    return x + _linear(hidden * (hidden >= 0), weights["ffn_down"])  # unlike relu's, this derivative is 1 at 0: the engine's rule
