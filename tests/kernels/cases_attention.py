"""Cases of attention, attention of width 1, their backward passes and the combiner's products (see case_protocol.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from case_protocol import CODES, AttentionSize, Case, Limit, Setting, Sizes, Tensors
from torch import Tensor

from tscale_kernels import codes
from tscale_kernels.attention import attend, ref_attend
from tscale_kernels.attention_backward import attend_backward, ref_attend_backward
from tscale_kernels.attention_backward_width1 import attend_backward_width1, ref_attend_backward_width1
from tscale_kernels.attention_width1 import attend_width1, ref_attend_width1
from tscale_kernels.dispatch import BackendName
from tscale_kernels.head_gradient import GATE, SegmentStore
from tscale_kernels.kv_product import products_backward, ref_products_backward

LOCAL_WIDTH, LOCAL_SLOPE = 64, 0.5
ODD = Sizes("odd", fragments=2, tokens=300, width=128, heads=1, vocab=128, window=200)
"""600 tokens in 640 rows, fragments that no block divides, a window with whole blocks inside."""

ROUNDED: Limit = 5e-3
"""Results of bf16 products with fp32 sums, stored as bf16: 2 ** -9 each for the weights and the result."""
ROUNDED_CODES: Limit = 3e-2
"""Codes of such results: where they differ by 2 ** -9, a small code differs by one now and then."""
LOG_SUM = {torch.int8: 1e-5, torch.bfloat16: 1e-5, torch.float8_e4m3fn: 2e-4}
"""Tensor cores of sm_89 and sm_90 keep 14 bits of sums of e4m3 products."""
MAXIMUM: Limit = 2e-2
"""The largest of a row or column is one rounded number, so its error is not averaged."""


@dataclass(frozen=True)
class Kind:
    """A way to attend: sizes of the setting (or of ODD), width and slope of the layer, and whether documents are told apart."""

    width: Callable[[Sizes], int]
    slope: float = 0.0
    documents: bool = False
    odd: bool = False


KINDS = {
    "": Kind(lambda s: s.tokens),
    "local": Kind(lambda s: LOCAL_WIDTH if s.tokens > LOCAL_WIDTH else s.window, LOCAL_SLOPE),
    "documents": Kind(lambda s: s.tokens, documents=True),
    "odd": Kind(lambda s: s.tokens, odd=True),
    "odd window": Kind(lambda s: s.window, 0.03, odd=True),
    "odd local documents": Kind(lambda s: LOCAL_WIDTH, LOCAL_SLOPE, documents=True, odd=True),
}


@dataclass(frozen=True)
class Inputs:
    """One layer's attention: what `attend` and `attend_backward` read."""

    query: Tensor
    key: Tensor
    value: Tensor
    rms: Tensor
    gate: Tensor
    cosine: Tensor
    sine: Tensor
    document_start: Tensor | None

    @property
    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.rms, self.gate

    def exact(self) -> Inputs:
        """The same numbers as fp64 codes."""
        query, key, value, gate = (fp64_codes(x) for x in (self.query, self.key, self.value, self.gate))
        return replace(self, query=query, key=key, value=value, gate=gate, rms=self.rms.double())


def fp64_codes(x: Tensor) -> Tensor:
    return x.double() * (codes.vector_scale(torch.float64) / codes.vector_scale(x.dtype))


def make_inputs(setting: Setting, kind: Kind, code: torch.dtype, value_code: torch.dtype, gate_code: torch.dtype) -> Inputs:
    s = setting.sizes
    query, key = (setting.vector_codes(s.rows, s.attention_width, code) for _ in range(2))
    rms = setting.uniform((4 * s.heads, s.rows), 0.3, 3.0)
    rms[:, s.fragments * s.tokens :] = 0
    return Inputs(
        query, key, setting.vector_codes(s.rows, s.attention_width, value_code), rms,
        setting.vector_codes(s.rows, s.attention_width, gate_code),
        *setting.rotary(), setting.document_start() if kind.documents else None,
    )  # fmt: skip


def sized(setting: Setting, kind: Kind) -> Setting:
    return replace(setting, sizes=ODD) if kind.odd else setting


def size_of(s: Sizes, width: int, part: str) -> AttentionSize:
    return AttentionSize(s.fragments, s.heads, s.tokens, width, "forward" if part == "forward" else "backward")


def forward(setting: Setting, kind: Kind, code: torch.dtype, value_code: torch.dtype, gate_code: torch.dtype) -> Case:
    setting = sized(setting, kind)
    s, i = setting.sizes, make_inputs(setting, kind, code, value_code, gate_code)
    width = kind.width(s)
    layer = {"tokens": s.tokens, "width": width, "slope": kind.slope, "document_start": i.document_start}
    scale = codes.product_scale(gate_code, width, kind.slope)

    def exact() -> Tensors:
        out = {"out": (s.rows, s.attention_width), "log_sum": (s.heads, s.rows), "products": (s.rows, 4 * s.attention_width)}
        results = {name: setting.zeros(shape, torch.float64) for name, shape in out.items()}
        ref_attend(*i.exact().forward, **layer, **results)
        return results

    return Case(
        outputs=lambda: forward_outputs(setting, gate_code) | {"log_sum": setting.poisoned((s.heads, s.rows), torch.float32)},
        run=lambda out, backend: attend(*i.forward, **layer, **out, product_scale=scale, backend=backend),
        limits={"out": ROUNDED, "log_sum": LOG_SUM[code], "products": ROUNDED_CODES},
        exact=exact,
        exact_limits={"out": ROUNDED, "log_sum": LOG_SUM[code]},
        attention=size_of(s, width, "forward"),
        bytes_moved=nbytes(*i.forward[:3], i.gate) + nbytes(*forward_outputs(setting, gate_code).values()),
        timed=not kind.odd,
    )


def forward_outputs(setting: Setting, code: torch.dtype) -> Tensors:
    s = setting.sizes
    return {
        "out": setting.poisoned((s.rows, s.attention_width), torch.bfloat16),
        "products": setting.poisoned((s.rows, 4 * s.attention_width), code),
    }


def forward_width1(setting: Setting, kind: Kind, code: torch.dtype, value_code: torch.dtype, gate_code: torch.dtype) -> Case:
    setting = sized(setting, kind)
    s, i = setting.sizes, make_inputs(setting, kind, code, value_code, gate_code)
    layer = {"tokens": s.tokens, "slope": kind.slope, "document_start": i.document_start}
    scale = codes.product_scale(gate_code, 1, kind.slope)

    def exact() -> Tensors:
        results = {"out": setting.zeros((s.rows, s.attention_width), torch.float64)}
        ref_attend_width1(*i.exact().forward, **layer, **results, products=setting.zeros((s.rows, 4 * s.attention_width), torch.float64))
        return results

    return Case(
        outputs=lambda: forward_outputs(setting, gate_code),
        run=lambda out, backend: attend_width1(*i.forward, **layer, **out, product_scale=scale, backend=backend),
        limits={"out": 1e-4, "products": 5e-3},
        exact=exact,
        exact_limits={"out": ROUNDED},
        bytes_moved=nbytes(*i.forward[:3], i.gate) + nbytes(*forward_outputs(setting, gate_code).values()),
        timed=not kind.odd,
    )


def backward_outputs(setting: Setting, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """d_projected, of which every op writes some segments (the others stay zero), and the maxima."""
    s, maxima = setting.sizes, torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "d_projected": setting.zeros((s.rows, 4 * s.attention_width), dtype),
        "row_max": setting.zeros((s.rows,), maxima),
        "column_max": setting.zeros((4 * s.attention_width,), maxima),
    }


def with_poison(setting: Setting, outputs: Tensors, segments: tuple[int, ...]) -> Tensors:
    """d_projected poisoned where the op must write."""
    for segment in segments:
        columns = outputs["d_projected"][:, segment * setting.sizes.attention_width : (segment + 1) * setting.sizes.attention_width]
        columns.copy_(setting.poisoned(tuple(columns.shape), torch.bfloat16))
    return outputs


def statistics(setting: Setting) -> tuple[Tensor, Tensor]:
    """(units, token weights)."""
    return setting.uniform((4,), 0.01, 0.1), setting.uniform((setting.sizes.rows,), 0.5, 50.0)


def exact_store(setting: Setting, units: Tensor, weight: Tensor) -> tuple[Tensors, SegmentStore]:
    results = backward_outputs(setting, torch.float64)
    return results, SegmentStore(units.double(), weight.double(), *results.values())


def backward(setting: Setting, kind: Kind, code: torch.dtype, value_code: torch.dtype, gate_code: torch.dtype) -> Case:
    setting = sized(setting, kind)
    s, i = setting.sizes, make_inputs(setting, kind, code, value_code, gate_code)
    width, (units, weight) = kind.width(s), statistics(setting)
    layer = {"tokens": s.tokens, "width": width, "slope": kind.slope, "document_start": i.document_start}
    seen = forward_outputs(setting, gate_code) | {"log_sum": setting.zeros((s.heads, s.rows))}
    attend(*i.forward, **layer, **seen, backend="ref")
    d_out = setting.gradients(s.rows, s.attention_width)
    delta = (seen["out"].float() * d_out.float()).unflatten(1, (-1, 128)).sum(2).T.contiguous()
    given = {"cosine": i.cosine, "sine": i.sine, **layer}

    def run(out: Tensors, backend: BackendName) -> None:
        attend_backward(
            *i.forward[:4], d_out=d_out, log_sum=seen["log_sum"], delta=delta, **given, units=units, token_weight=weight, **out,
            backend=backend,
        )  # fmt: skip

    def exact() -> Tensors:
        results, store = exact_store(setting, units, weight)
        sums = {"d_out": d_out.double(), "log_sum": seen["log_sum"].double(), "delta": delta.double()}
        ref_attend_backward(*i.exact().forward[:4], **sums, **given, store=store)
        return results

    return Case(
        outputs=lambda: with_poison(setting, backward_outputs(setting), (0, 1, 3)),
        run=run,
        limits={"d_projected": 2 * ROUNDED, "row_max": MAXIMUM, "column_max": MAXIMUM},
        exact=exact,
        exact_limits={"d_projected": 2 * ROUNDED},
        attention=size_of(s, width, "backward"),
        bytes_moved=nbytes(*i.forward[:3]) + nbytes(d_out) * 4,
        timed=not kind.odd,
    )


def backward_width1(setting: Setting, kind: Kind, code: torch.dtype, value_code: torch.dtype, gate_code: torch.dtype) -> Case:
    setting = sized(setting, kind)
    s, i = setting.sizes, make_inputs(setting, kind, code, value_code, gate_code)
    units, weight = statistics(setting)
    d_out = setting.gradients(s.rows, s.attention_width)
    given = {"cosine": i.cosine, "sine": i.sine, "tokens": s.tokens, "slope": kind.slope, "document_start": i.document_start}

    def run(out: Tensors, backend: BackendName) -> None:
        attend_backward_width1(*i.forward[:4], d_out=d_out, **given, units=units, token_weight=weight, **out, backend=backend)

    def exact() -> Tensors:
        results, store = exact_store(setting, units, weight)
        ref_attend_backward_width1(*i.exact().forward[:4], d_out=d_out.double(), **given, store=store)
        return results

    return Case(
        outputs=lambda: with_poison(setting, backward_outputs(setting), (0, 1, 3)),
        run=run,
        limits={"d_projected": 1e-3, "row_max": 5e-3, "column_max": 5e-3},
        exact=exact,
        exact_limits={"d_projected": ROUNDED},
        bytes_moved=nbytes(*i.forward[:3]) + nbytes(d_out) * 4,
        timed=not kind.odd,
    )


def products(setting: Setting, code: torch.dtype, delta: bool, coded: bool = False) -> Case:
    """coded: the gradient comes in int8."""
    s = setting.sizes
    gate, out = setting.vector_codes(s.rows, s.attention_width, code), setting.normal((s.rows, s.attention_width), torch.bfloat16, 0.3)
    rms, (units, weight) = setting.uniform((4 * s.heads, s.rows), 0.3, 3.0), statistics(setting)
    rms[GATE * s.heads :, :3] = 0
    d_products, d_unit = setting.gradients(s.rows, 4 * s.attention_width), None
    true_gradient = d_products.double()
    if coded:
        d_unit = setting.uniform((4 * s.heads, s.rows), 0.0, 1e-5)
        d_products = setting.integers((s.rows, 4 * s.attention_width), -127, 128, torch.int8)
        true_gradient = d_products.double() * d_unit.double().T.repeat_interleave(128, dim=1)

    def outputs() -> Tensors:
        d_out = setting.poisoned((s.rows, s.attention_width), torch.bfloat16)
        sums = {"delta": setting.poisoned((s.heads, s.rows), torch.float32)} if delta else {}
        return with_poison(setting, backward_outputs(setting), (GATE,)) | {"d_out": d_out} | sums

    def run(results: Tensors, backend: BackendName) -> None:
        buffers = {"delta": None} | results
        products_backward(d_products, gate, out, rms, d_unit=d_unit, units=units, token_weight=weight, **buffers, backend=backend)

    def exact() -> Tensors:
        results, store = exact_store(setting, units, weight)
        d_out = setting.zeros((s.rows, s.attention_width), torch.float64)
        ref_products_backward(true_gradient, fp64_codes(gate), out.double(), rms.double(), d_out=d_out, delta=None, store=store)
        return results | {"d_out": d_out}

    return Case(
        outputs=outputs,
        run=run,
        limits={"d_out": 1e-3, "d_projected": 1e-3, "row_max": 5e-3, "column_max": 5e-3} | ({"delta": 1e-3} if delta else {}),
        exact=exact,
        exact_limits={"d_out": ROUNDED, "d_projected": ROUNDED},
        bytes_moved=nbytes(d_products, gate, out) + 2 * nbytes(out),
    )


def nbytes(*tensors: Tensor) -> int:
    return sum(math.prod(x.shape) * x.element_size() for x in tensors)


DTYPES = {
    "int8": ("int8", "bf16", "int8"),
    "e4m3": ("e4m3", "e4m3", "e4m3"),
    "bf16": ("bf16", "bf16", "bf16"),
    "bf16 gate int8": ("bf16", "bf16", "int8"),
}
"""Name -> codes of query and key; of value; of gate and products. The last row is what int8 training does unless told otherwise."""


def _attention(op: str, build: Callable[..., Case], kinds: tuple[str, ...]) -> dict[str, Callable[[Setting], Case]]:
    names = {" ".join(filter(None, (op, kind, dtype))): (kind, dtype) for kind in kinds for dtype in DTYPES}
    return {
        name: partial(build, kind=KINDS[kind], **dict(zip(("code", "value_code", "gate_code"), map(CODES.get, DTYPES[dtype]), strict=True)))
        for name, (kind, dtype) in names.items()
        if (not kind or kind == "local" or dtype == "int8") and not (dtype == "bf16 gate int8" and "backward" in op)
    }


CASES: dict[str, Callable[[Setting], Case]] = {
    **_attention("attend", forward, tuple(KINDS)),
    **_attention("attend_backward", backward, tuple(KINDS)),
    **_attention("attend_width1", forward_width1, ("", "documents", "odd local documents")),
    **_attention("attend_backward_width1", backward_width1, ("", "documents", "odd local documents")),
    **{f"products_backward {name}": partial(products, code=code, delta=True) for name, code in CODES.items()},
    **{f"products_backward {name} coded": partial(products, code=CODES[name], delta=True, coded=True) for name in ("int8", "e4m3")},
    "products_backward without delta int8": partial(products, code=torch.int8, delta=False),
}
