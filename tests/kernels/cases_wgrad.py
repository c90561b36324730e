"""Cases of weight gradients and of the final normalisation's derivative (see case_protocol.py): int8 gives the same bits, fp8 and bf16 sums
have another order."""

from __future__ import annotations

from functools import partial

import torch
from case_protocol import CODES, Case, Setting, Tensors

from tscale_kernels import matmul_wgrad, norm_backward

LIMIT = {torch.int8: 0.0, torch.float8_e4m3fn: 6e-3, torch.bfloat16: 1e-5}
"""Of the gradient; sums of e4m3 products have 14 bits, and here are thousands of terms (spec/kernels.md 2: 4e-3 at 24576)."""


def weight_gradient(setting: Setting, code: torch.dtype, inputs: int, outputs_: int, *, mapped: bool, accumulate: bool) -> Case:
    """`inputs`, `outputs_`: 0 for the state width, else a number of attention widths."""
    s = setting.sizes
    rows, columns = (s.width if count == 0 else count * s.attention_width for count in (outputs_, inputs))
    g_t, x_t = setting.vector_codes(rows, s.rows, code), setting.vector_codes(columns, s.rows, code)
    unit_g, unit_x = setting.normal((rows,)).abs() + 0.1, setting.normal((columns,)).abs() + 0.1
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows)).to(setting.device, torch.int32) if mapped else None
    start = setting.normal((rows, columns)) * 100
    factor = columns**-0.5
    count = matmul_wgrad.square_sum_count(rows, columns)
    workspace = torch.zeros(matmul_wgrad.workspace_size(rows, columns), dtype=torch.int32, device=setting.device)

    def outputs() -> Tensors:
        grad = start.clone() if accumulate else setting.poisoned((rows, columns), torch.float32)
        return {"grad": grad, "square_sums": setting.poisoned((count,), torch.float32), "workspace": workspace}

    def exact() -> Tensors:
        result = (g_t.double() @ x_t.double().T) * unit_g.double()[:, None] * unit_x.double() * factor
        grad = torch.empty_like(result)
        grad[slice(None) if order is None else order.long()] = result
        return {"grad": grad + (start.double() if accumulate else 0.0)}

    return Case(
        outputs=outputs,
        run=lambda out, backend: matmul_wgrad.weight_gradient(
            g_t, x_t, unit_g, unit_x, factor=factor, row_map=order, accumulate=accumulate, **out, backend=backend
        ),
        limits={"grad": LIMIT[code], "square_sums": 1e-6 + 2 * LIMIT[code]},
        exact=exact,
        exact_limits={"grad": 1e-6 + LIMIT[code]},
        matmul=(rows, columns, s.rows),
        bytes_moved=sum(x.numel() * x.element_size() for x in (g_t, x_t, start)),
    )


def through_norm_add_rows(setting: Setting, code: torch.dtype, given: torch.dtype, stream: torch.dtype) -> Case:
    s = setting.sizes
    n = setting.vector_codes(s.rows, s.width, code)
    d_n = setting.normal((s.rows, s.width)).to(given)
    rms = setting.normal((s.width // 128, s.rows)).abs() + 0.5
    rms[:, 3] = 0.0
    start = setting.normal((s.rows, s.width)).to(stream)
    return Case(
        outputs=lambda: {"dx": start.clone(), "row_max": setting.poisoned((s.rows,), torch.float32)},
        run=lambda out, backend: norm_backward.through_norm_add_rows(d_n, n=n, rms=rms, **out, backend=backend),
        limits={"dx": 1e-6 if stream == torch.float32 else 5e-3, "row_max": 1e-6 if stream == torch.float32 else 1e-2},
        bytes_moved=sum(x.numel() * x.element_size() for x in (n, d_n, start, start)),
    )


CASES = {}
for _name, _code in CODES.items():
    CASES[f"weight_gradient projection {_name}"] = partial(weight_gradient, code=_code, inputs=0, outputs_=4, mapped=True, accumulate=False)
    CASES[f"weight_gradient combiner {_name}"] = partial(weight_gradient, code=_code, inputs=4, outputs_=0, mapped=False, accumulate=True)
    CASES[f"weight_gradient ffn_up {_name}"] = partial(weight_gradient, code=_code, inputs=0, outputs_=1, mapped=False, accumulate=False)
    CASES[f"weight_gradient ffn_down {_name}"] = partial(weight_gradient, code=_code, inputs=1, outputs_=0, mapped=False, accumulate=True)
for _name, _code in CODES.items():
    CASES[f"through_norm_add_rows {_name}"] = partial(through_norm_add_rows, code=_code, given=torch.bfloat16, stream=torch.float32)
CASES["through_norm_add_rows bf16 stream"] = partial(through_norm_add_rows, code=torch.int8, given=torch.float32, stream=torch.bfloat16)
