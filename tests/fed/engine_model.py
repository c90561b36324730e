"""What the engine's gradients are checked against: the model in fp64 autograd with the engine's roundings in its forward pass.

Every rounding is straight-through (its value is rounded, its derivative is 1), as in the engine, so a comparison with the engine shows the
error of the backward arithmetic alone. Against the model without roundings, forward rounding adds to it: by far most of it in ffn_up, where
a value beside zero can be taken to be on the wrong side of relu.
"""

from __future__ import annotations

import math

import torch
from model_cases import rope_by_definition
from torch import Tensor

from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.precision import Precision
from tscale_fed.model.attention import attention_ref, document_numbers
from tscale_fed.model.combiner import combine_ref
from tscale_fed.model.forward import Model
from tscale_fed.model.normalise import normalise_ref
from tscale_kernels.codes import encode, product_scale, vector_scale, weight_scale
from tscale_kernels.matmul_norm import ref_keep_sign


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def coded(x: Tensor, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """x as codes hold it; `scale` (of unit-RMS vectors) is the code of 1."""
    scale = vector_scale(dtype) if scale is None else scale
    return straight_through(x, encode((x * scale).float(), dtype).to(x.dtype) / scale)


def coded_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    unit = weight.detach().square().mean().sqrt() / weight_scale(dtype)
    return straight_through(weight, encode((weight / unit).float(), dtype).to(weight.dtype) * unit)


def rounded_loss(model: Model, batch: StepBatch, doc_start_token: int | None, precision: Precision) -> Tensor:
    """Loss sum of the batch; call backward() on it. `model` is in fp64."""
    shape, weights, code = model.shape, model.parameter_store.views, precision.code

    def linear(x: Tensor, name: str) -> Tensor:
        return (x @ coded_weight(weights[name], code).T) / math.sqrt(x.shape[-1])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (shape.heads, 128))

    def coded_key(key: Tensor) -> Tensor:
        """Unit-RMS codes times the RMS."""
        rms = key.square().mean(-1, keepdim=True).sqrt()
        unit = encode((key / rms * vector_scale(precision.score_code)).float(), precision.score_code).to(key.dtype)
        return straight_through(key, unit / vector_scale(precision.score_code) * rms)

    document = None if doc_start_token is None else document_numbers(batch.text, doc_start_token)
    x = (weights["embedding"][batch.labels] * batch.signs.to(torch.float64).unsqueeze(-1)).sum(-2)
    for index, (width, slope) in enumerate(shape.layers()):
        layer = f"layers.{index}."
        n = coded(normalise_ref(x), code)
        query = coded(rope_by_definition(heads(normalise_ref(linear(n, layer + "query")))), precision.score_code)
        key = coded_key(rope_by_definition(heads(linear(n, layer + "key"))))
        gate = coded(heads(normalise_ref(linear(n, layer + "gate"))), code)
        value = coded(heads(normalise_ref(linear(n, layer + "value"))), precision.value_code)
        attended = coded(attention_ref(query, key, value, width, slope, document), torch.bfloat16)
        x = x + linear(coded(combine_ref(gate, attended), code, product_scale(code, width, slope)), layer + "combiner")
        wide = normalise_ref(linear(coded(normalise_ref(x), code), layer + "ffn_up"))
        if code == torch.int8:
            wide = wide + (ref_keep_sign(wide * vector_scale(code)) / vector_scale(code) - wide).detach()
        hidden = coded(wide, code)
        x = x + linear(torch.where(hidden >= 0, hidden, 0.0), layer + "ffn_down")
    logits = linear(coded(normalise_ref(x), code), "final") + math.log(2.0) * model.bias2
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=-1, reduction="sum")


def cosines(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Cosine of every matrix's gradient."""
    result = {}
    for name, gradient in want.items():
        a, b = got[name].double().flatten(), gradient.double().flatten()
        result[name] = float(a @ b / (a.norm() * b.norm()))
    return result
