"""Cases of the forward products: project, expand, add_normalise (see case_protocol.py).

int8 must give the same bits on both backends. fp8 sums have 14 bits on the H100's tensor cores (relative error 6e-4 at 1280 terms, 2e-3 at
10240), bf16 sums are fp32 in another order: these move codes across rounding boundaries, so their limits are relative errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from case_protocol import CODES, Case, Setting, Tensors
from torch import Tensor

from tscale_kernels import matmul_addnorm, matmul_norm
from tscale_kernels.codes import vector_scale

CODE_LIMIT = {torch.int8: 0.0, torch.float8_e4m3fn: 2e-2, torch.bfloat16: 1e-3}
"""Between the backends, by the dtype of the operands."""
SUM_LIMIT = {torch.int8: 0.0, torch.float8_e4m3fn: 3e-3, torch.bfloat16: 1e-5}
STORED = {torch.int8: 1.3e-2, torch.float8_e4m3fn: 3.5e-2, torch.bfloat16: 3e-3}
"""Error of a unit-RMS Gaussian vector in codes of a dtype (spec/model.md 8.1), with some room for the sums' own."""


def project(setting: Setting, code: torch.dtype, attention: torch.dtype, value: torch.dtype, table: torch.dtype = torch.float32) -> Case:
    """Operands and gate in `code`, query and key in `attention`."""
    s = setting.sizes
    n = setting.vector_codes(s.rows, s.width, code)
    w, units = setting.weights(4 * s.attention_width, s.width, code, segments=4)
    cosine, sine = (angles.to(table) for angles in setting.rotary())
    shape, dtypes = (s.rows, s.attention_width), {"query": attention, "key": attention, "gate": code, "value": value}

    def outputs() -> Tensors:
        codes = {name: setting.poisoned(shape, dtype) for name, dtype in dtypes.items()}
        return {**codes, "rms": setting.poisoned((4 * s.heads, s.rows), torch.float32)}

    def exact() -> Tensors:
        values, roots = _normalised(_lin(n, w, vector_scale(code)))
        parts = dict(zip(dtypes, values.chunk(4, 1), strict=True))
        position = torch.arange(s.rows, device=n.device) % s.tokens
        angle = torch.complex(cosine.double(), sine.double())[position, None]
        for name in ("query", "key"):
            pairs = torch.view_as_complex(parts[name].unflatten(1, (s.heads, 64, 2)))
            parts[name] = torch.view_as_real(pairs * angle).flatten(1)
        codes = {name: parts[name] * vector_scale(dtype) for name, dtype in dtypes.items()}
        return {**codes, "rms": roots.T * units.double().repeat_interleave(s.heads)[:, None]}

    return Case(
        outputs=outputs,
        run=lambda out, backend: matmul_norm.project(n, w, units, cosine=cosine, sine=sine, **out, backend=backend),
        limits={**dict.fromkeys(dtypes, CODE_LIMIT[code]), "rms": SUM_LIMIT[code]},
        exact=exact,
        exact_limits={**{name: STORED[dtype] + SUM_LIMIT[code] for name, dtype in dtypes.items()}, "rms": 1e-6 + SUM_LIMIT[code]},
        matmul=(s.rows, 4 * s.attention_width, s.width),
        bytes_moved=_bytes(n, w, cosine, sine, *outputs().values()),
    )


def expand(setting: Setting, code: torch.dtype) -> Case:
    s = setting.sizes
    n = setting.vector_codes(s.rows, s.width, code)
    w, unit = setting.weights(s.ffn_width, s.width, code)
    shape = (s.rows, s.ffn_width)

    def outputs() -> Tensors:
        return {
            "hidden": setting.poisoned(shape, code),
            "active": setting.poisoned(shape, code),
            "rms": setting.poisoned((s.ffn_width // 128, s.rows), torch.float32),
        }

    def exact() -> Tensors:
        values, roots = _normalised(_lin(n, w, vector_scale(code)))
        return {"hidden": values * vector_scale(code), "active": values.relu() * vector_scale(code), "rms": roots.T * unit.double()}

    return Case(
        outputs=outputs,
        run=lambda out, backend: matmul_norm.expand(n, w, unit, **out, backend=backend),
        limits={"hidden": CODE_LIMIT[code], "active": CODE_LIMIT[code], "rms": SUM_LIMIT[code]},
        exact=exact,
        exact_limits={**dict.fromkeys(("hidden", "active"), STORED[code] + SUM_LIMIT[code]), "rms": 1e-6 + SUM_LIMIT[code]},
        matmul=(s.rows, s.ffn_width, s.width),
        bytes_moved=_bytes(n, w, *outputs().values()),
    )


def add_normalise(setting: Setting, code: torch.dtype, inputs: int, stream: torch.dtype = torch.float32) -> Case:
    """`inputs`: columns of the operand in attention widths (4: combiner, 1: ffn_down)."""
    s = setting.sizes
    depth = inputs * s.attention_width
    a = setting.vector_codes(s.rows, depth, code)
    w, unit = setting.weights(s.width, depth, code)
    x = setting.normal((s.rows, s.width), stream)
    scale = vector_scale(code)

    def outputs() -> Tensors:
        rms = setting.poisoned((s.width // 128, s.rows), torch.float32)
        return {"x": x.clone(), "n": setting.poisoned((s.rows, s.width), code), "rms": rms}

    def exact() -> Tensors:
        new = x.double() + _lin(a, w, scale) * unit.double()
        values, roots = _normalised(new)
        return {"x": new, "n": values * scale, "rms": roots.T}

    rounded = 0.0 if stream == torch.float32 or code == torch.int8 else 1e-3
    return Case(
        outputs=outputs,
        run=lambda out, backend: matmul_addnorm.add_normalise(a, w, unit, a_scale=scale, **out, backend=backend),
        limits={"x": SUM_LIMIT[code] + rounded, "n": CODE_LIMIT[code], "rms": SUM_LIMIT[code]},
        exact=exact,
        exact_limits={
            "x": (1e-6 if stream == torch.float32 else 3e-3) + SUM_LIMIT[code],
            "n": STORED[code] + SUM_LIMIT[code],
            "rms": 1e-6 + SUM_LIMIT[code],
        },
        matmul=(s.rows, s.width, depth),
        bytes_moved=_bytes(a, w, x, *outputs().values()),
    )


def _lin(n: Tensor, w: Tensor, scale: float) -> Tensor:
    """lin / unit in fp64."""
    return n.double() @ w.double().T / (scale * n.shape[1] ** 0.5)


def _normalised(values: Tensor) -> tuple[Tensor, Tensor]:
    """(values of unit RMS in each group of 128, RMS [rows, groups])"""
    groups = values.unflatten(1, (-1, 128))
    roots = groups.square().mean(2).sqrt()
    return (groups / roots.where(roots > 0, 1.0)[:, :, None]).flatten(1), roots


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _cases() -> dict[str, Callable[[Setting], Case]]:
    int8, e4m3, bf16, half = torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16
    built: dict[str, Any] = {
        "project int8": partial(project, code=int8, attention=int8, value=bf16),
        "project int8, half angles": partial(project, code=int8, attention=int8, value=bf16, table=half),
        "project int8, e4m3 attention": partial(project, code=int8, attention=e4m3, value=e4m3),
        "project int8, bf16 attention": partial(project, code=int8, attention=bf16, value=bf16),
        "project e4m3": partial(project, code=e4m3, attention=e4m3, value=e4m3),
        "project e4m3, bf16 values": partial(project, code=e4m3, attention=int8, value=bf16),
        "project bf16": partial(project, code=bf16, attention=bf16, value=bf16),
        "project bf16, int8 attention": partial(project, code=bf16, attention=int8, value=bf16),
    }
    for name, code in CODES.items():
        built[f"expand {name}"] = partial(expand, code=code)
        built[f"add_normalise {name} combiner"] = partial(add_normalise, code=code, inputs=4)
        built[f"add_normalise {name} ffn_down"] = partial(add_normalise, code=code, inputs=1)
        built[f"add_normalise {name}, bf16 stream"] = partial(add_normalise, code=code, inputs=1, stream=bf16)
    return built


CASES = _cases()
