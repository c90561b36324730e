"""References of attention and the combiner's products against autograd of the plain model, in fp64."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tscale_fed.model.attention import attention_ref
from tscale_fed.model.combiner import pair_products
from tscale_fed.model.normalise import normalise_ref
from tscale_fed.model.rotary import rotary_table, rotate
from tscale_kernels.attention import attend
from tscale_kernels.attention_backward import attend_backward
from tscale_kernels.attention_backward_width1 import attend_backward_width1
from tscale_kernels.attention_width1 import attend_width1
from tscale_kernels.kv_product import products_backward
from tscale_kernels.testing import assert_close

HEADS, FRAGMENTS = 2, 2
CODE = 24.0  # scale of fp64 "codes"


def kernel_order(x: Tensor) -> Tensor:
    """[..., 128] natural channels -> rotary pairs side by side."""
    return x.unflatten(-1, (2, 2, 32)).transpose(-1, -2).flatten(-3)


@dataclass
class Truth:
    """A batch through the model's own functions: inputs as the kernels take them, results and gradients as they should leave them."""

    inputs: dict[str, Tensor]
    rms: Tensor
    out: Tensor
    products: Tensor
    d_products: Tensor
    d_projected: Tensor
    document_start: Tensor | None
    cosine: Tensor
    sine: Tensor


def truth(tokens: int, width: int, slope: float, documents: bool, zero_query: bool = False) -> Truth:
    generator = torch.Generator().manual_seed(tokens * 1000 + width)
    shape = (FRAGMENTS, tokens, HEADS, 128)
    lin = [torch.randn(shape, generator=generator, dtype=torch.float64) * size for size in (0.7, 2.0, 1.3, 0.4)]
    if zero_query:
        lin[0][0, 1, 0] = 0
    lin = [x.requires_grad_() for x in lin]
    cosine, sine = rotary_table(tokens, torch.device("cpu"), torch.float64)
    number = (torch.rand(FRAGMENTS, tokens, generator=generator) < 0.3).cumsum(1) if documents else None
    query, key = rotate(normalise_ref(lin[0]), cosine, sine), rotate(lin[1], cosine, sine)
    gate, value = normalise_ref(lin[2]), normalise_ref(lin[3])
    out = attention_ref(query, key, value, width, slope, number)
    products = pair_products(gate, out)
    d_products = torch.randn(products.shape, generator=generator, dtype=torch.float64)
    (products * d_products).sum().backward()
    grads = [x.grad for x in lin]
    grads = [kernel_order(grads[0]), kernel_order(grads[1]), grads[2], grads[3]]
    rms = torch.stack([x.detach().square().mean(-1).sqrt() for x in lin])  # [4, B, T, H]
    rows = FRAGMENTS * tokens
    key_unit = kernel_order(key) / rms[1][..., None]
    inputs = {"query": kernel_order(query), "key": key_unit, "gate": gate, "value": value}
    start = None
    if number is not None:
        index = torch.arange(tokens)
        start = torch.where(number[:, :, None] == number[:, None, :], index, tokens).amin(2).reshape(-1).to(torch.int32)
    return Truth(
        inputs={name: x.detach().reshape(rows, -1) * CODE for name, x in inputs.items()},
        rms=rms.permute(0, 3, 1, 2).reshape(4 * HEADS, rows).contiguous(),
        out=out.detach().reshape(rows, -1),
        products=products.detach().reshape(rows, -1),
        d_products=d_products.reshape(rows, -1),
        d_projected=torch.cat([g.reshape(rows, -1) for g in grads], 1),
        document_start=start,
        cosine=cosine.reshape(tokens, 64),
        sine=sine.reshape(tokens, 64),
    )


def backward(t: Truth, tokens: int, width: int, slope: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d_projected, row_max, column_max, units, token_weight) of the whole chain."""
    i, rows = t.inputs, t.out.shape[0]
    log_sum, out, products = torch.empty(HEADS, rows).double(), torch.empty_like(t.out), torch.empty_like(t.products)
    shared = {"tokens": tokens, "slope": slope, "document_start": t.document_start}
    forward = (i["query"], i["key"], i["value"], t.rms, i["gate"])
    if width == 1:
        attend_width1(*forward, **shared, out=out, products=products)
    else:
        attend(*forward, **shared, width=width, out=out, log_sum=log_sum, products=products)
    assert_close("out", out, t.out, 1e-12)
    assert_close("products", products, t.products * CODE, 1e-12)
    units, weight = torch.tensor([0.5, 2.0, 3.0, 0.7]).double(), torch.rand(rows).double() + 0.5
    d_projected, row_max, column_max = (torch.zeros(shape).double() for shape in ((rows, 512 * HEADS), (rows,), (512 * HEADS,)))
    d_projected += math.nan
    stored = {"units": units, "token_weight": weight, "d_projected": d_projected, "row_max": row_max, "column_max": column_max}
    d_out, delta = torch.empty_like(out), torch.empty_like(log_sum)
    products_backward(t.d_products, i["gate"], out, t.rms, d_out=d_out, delta=delta, **stored)
    shared |= {"d_out": d_out, "cosine": t.cosine, "sine": t.sine, **stored}
    if width == 1:
        attend_backward_width1(i["query"], i["key"], i["value"], t.rms, **shared)
    else:
        attend_backward(i["query"], i["key"], i["value"], t.rms, **shared, width=width, log_sum=log_sum, delta=delta)
    return d_projected, row_max, column_max, units, weight


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("tokens", "width", "slope"), [(9, 9, 0.0), (12, 5, 0.5), (7, 1, 0.0), (7, 1, 0.3), (1, 1, 0.0), (1, 4, 0.5), (2, 2, 0.5)]
)
def test_results_and_gradients_are_those_of_the_model(tokens: int, width: int, slope: float, documents: bool) -> None:
    t = truth(tokens, width, slope, documents)
    d_projected, row_max, column_max, units, weight = backward(t, tokens, width, slope)
    for name, got, want in zip(("query", "key", "gate", "value"), d_projected.chunk(4, 1), t.d_projected.chunk(4, 1), strict=True):
        assert_close(f"d_{name}", got, want, 1e-11)
    size = t.d_projected.abs()
    assert_close("row_max", row_max, (size.unflatten(1, (4, -1)).amax(2) * units).amax(1), 1e-11)
    assert_close("column_max", column_max, (size * weight[:, None]).amax(0), 1e-11)


def test_a_head_that_is_zero_gets_no_gradient() -> None:
    t = truth(6, 6, 0.0, documents=False, zero_query=True)
    d_projected, *_ = backward(t, 6, 6, 0.0)
    assert float(d_projected[1, :128].abs().max()) == 0
    assert_close("d_projected", d_projected, t.d_projected, 1e-11)
