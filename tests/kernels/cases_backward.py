"""Cases of the backward products and the quantisers: balance, quantize, transpose, matmul_dgrad, matmul_wgrad, norm_backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from case_protocol import CODES, Case, CodeLimit, Setting, Tensors, replaced_row
from torch import Tensor

from tscale_kernels import balance, matmul_dgrad, quantize, transpose
from tscale_kernels.codes import encode, gradient_peak, vector_scale, weight_scale
from tscale_kernels.dispatch import BackendName

SALT = 2_654_435_769


def token_weights(setting: Setting) -> Case:
    rows = setting.sizes.rows
    row_max = setting.gradients(rows, 128).float().abs().amax(1)
    return Case(
        outputs=lambda: {name: setting.poisoned((rows,), torch.float32) for name in ("weight", "inverse")},
        run=lambda out, backend: balance.token_weights(row_max, weight=out["weight"], inverse=out["inverse"], backend=backend),
        limits={"weight": 0, "inverse": 0},
        bytes_moved=12 * rows,
    )


# -- quantisers --------------------------------------------------------------------------------------------------------


def weights_of(setting: Setting, row_max: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, inverse) of tokens, as `balance` makes them."""
    weight, inverse = torch.empty_like(row_max), torch.empty_like(row_max)
    balance.token_weights(row_max, weight=weight, inverse=inverse, backend="ref")
    return weight, inverse


def rows_and_transpose(setting: Setting, code: torch.dtype, columns: int, dtype: torch.dtype, segments: int) -> Case:
    """A gradient [rows, columns] with the maxima that its maker finds; a zero column; with segments, units of four joined matrices."""
    rows = setting.sizes.rows
    g = setting.gradients(rows, columns, dtype)
    g[:, 5] = 0
    units = setting.uniform((segments,), 0.5, 2.0) if segments > 1 else None
    row_max, column_max = setting.zeros((rows,)), setting.zeros((columns,))
    quantize.row_max(g, segment_units=units, out=row_max, backend="ref")
    weight, _ = weights_of(setting, row_max)
    quantize.column_max(g, token_weight=weight, out=column_max, backend="ref")
    seed = setting.step_seed()
    return Case(
        outputs=lambda: {
            "codes": setting.poisoned((rows, columns), code),
            "codes_t": setting.poisoned((columns, rows), code),
            "row_unit": setting.poisoned((rows,), torch.float32),
            "column_unit": setting.poisoned((columns,), torch.float32),
        },
        run=lambda out, backend: quantize.rows_and_transpose(
            g,
            row_max=row_max,
            column_max=column_max,
            token_weight=weight,
            segment_units=units,
            seed=seed,
            salt=SALT,
            backend=backend,
            **out,
        ),
        limits={"codes": 0, "codes_t": 0, "row_unit": 0, "column_unit": 0},
        bytes_moved=rows * columns * (dtype.itemsize + 2 * code.itemsize),
    )


def packed(case: Case) -> Case:
    """The same with words of four tokens exchanged between threads, whichever form the launch table asks for."""

    def run(out: Tensors, backend: BackendName) -> None:
        with replaced_row("rows_and_transpose", {"PACK": 4, "BN": 64}):
            case.run(out, backend)

    return replace(case, run=run, timed=False)


def column_max(setting: Setting, dtype: torch.dtype) -> Case:
    rows, columns = setting.sizes.rows, setting.sizes.width
    g, weight = setting.gradients(rows, columns, dtype), setting.uniform((rows,), 0.5, 50.0)
    return Case(
        outputs=lambda: {"out": setting.zeros((columns,))},
        run=lambda out, backend: quantize.column_max(g, token_weight=weight, out=out["out"], backend=backend),
        limits={"out": 0},
        bytes_moved=rows * columns * dtype.itemsize,
    )


def row_max(setting: Setting, dtype: torch.dtype, segments: int) -> Case:
    rows, columns = setting.sizes.rows, setting.sizes.width * segments
    g = setting.gradients(rows, columns, dtype)
    units = setting.uniform((segments,), 0.5, 2.0) if segments > 1 else None
    return Case(
        outputs=lambda: {"out": setting.poisoned((rows,), torch.float32)},
        run=lambda out, backend: quantize.row_max(g, segment_units=units, out=out["out"], backend=backend),
        limits={"out": 0},
        bytes_moved=rows * columns * dtype.itemsize,
    )


def transpose_outputs(setting: Setting, code: torch.dtype, columns: int) -> Tensors:
    return {
        "codes_t": setting.poisoned((columns, setting.sizes.rows), code),
        "column_unit": setting.poisoned((columns,), torch.float32),
    }


def transpose_scaled(setting: Setting, code: torch.dtype, relu: bool) -> Case:
    rows, columns = setting.sizes.rows, setting.sizes.ffn_width if relu else setting.sizes.width
    x, scale = setting.vector_codes(rows, columns, code), setting.uniform((rows,), 1e-4, 1e-2)
    x[:, 7] = 0
    column_max = setting.zeros((columns,))
    quantize.column_max(x.float().relu() if relu else x.float(), token_weight=scale, out=column_max, backend="ref")
    return Case(
        outputs=lambda: transpose_outputs(setting, code, columns),
        run=lambda out, backend: transpose.transpose_scaled(x, token_scale=scale, relu=relu, column_max=column_max, backend=backend, **out),
        limits={"codes_t": 0, "column_unit": 0},
        bytes_moved=rows * columns * code.itemsize * 2,
    )


def transpose_products(setting: Setting, code: torch.dtype, step: int = 1) -> Case:
    """As the engine calls it, scale of the gate over step; some products are larger than the largest code, some lie between two codes."""
    rows, columns = setting.sizes.rows, setting.sizes.attention_width
    gate, attended = setting.vector_codes(rows, columns, code), setting.normal((rows, columns), torch.bfloat16, 1.5)
    attended[1::5] = 0.5
    return Case(
        outputs=lambda: transpose_outputs(setting, code, 4 * columns),
        run=lambda out, backend: transpose.transpose_products(
            gate, attended, product_scale=vector_scale(code) / step, backend=backend, **out
        ),
        limits={"codes_t": 0, "column_unit": 0},
        bytes_moved=rows * columns * (2 + 5 * code.itemsize),
    )


# -- data gradients ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backwards:
    """Operands of a data gradient [rows, columns] that contracts over `depth`, and of its epilogues."""

    g: Tensor
    row_unit: Tensor
    w_t: Tensor
    unit: Tensor
    normalised: Tensor
    rms: Tensor
    token_weight: Tensor
    inverse: Tensor

    def product(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.g, self.row_unit, self.w_t, self.unit

    def input_scale(self) -> Tensor | None:
        """As the engine: with bf16 codes nobody asks for maxima of the input."""
        return None if self.g.dtype == torch.bfloat16 else self.inverse

    def exact(self) -> Tensor:
        """fp64."""
        factor = self.row_unit.double()[:, None] * self.unit.double() * self.w_t.shape[0] ** -0.5
        return self.g.double() @ self.w_t.double().T * factor

    def exact_through_norm(self, d: Tensor) -> Tensor:
        y = (self.normalised.double() / vector_scale(self.normalised.dtype)).unflatten(1, (-1, 128))
        groups = d.unflatten(1, (-1, 128))
        root = self.rms.double().T[:, :, None]
        inverse = torch.where(root == 0, 0.0, 1.0 / root)
        return ((groups - y * (y * groups).mean(-1, keepdim=True)) * inverse).flatten(1)


def input_maxima(setting: Setting, code: torch.dtype, columns: int) -> Tensors:
    return {} if code == torch.bfloat16 else {"input_max": setting.zeros((columns,))}


def input_limits(code: torch.dtype) -> dict[str, float]:
    return {} if code == torch.bfloat16 else {"input_max": 0}


def backwards(setting: Setting, code: torch.dtype, columns: int, depth: int) -> Backwards:
    rows = setting.sizes.rows
    scale = gradient_peak(code) / 4 / weight_scale(code)
    g, _ = setting.weights(rows, depth, code)  # rows fill the codes, as those of the quantiser do
    g = encode(g.float() * scale, code)
    w_t, unit = setting.weights(columns, depth, code)
    rms = setting.uniform((columns // 128, rows), 0.2, 2.0)
    rms[0, ::7] = 0
    token_weight = setting.uniform((rows,), 1.0, 50.0)
    return Backwards(
        g,
        setting.uniform((rows,), 0.0, 1e-5),
        w_t,
        unit,
        setting.vector_codes(rows, columns, code),
        rms,
        token_weight,
        1.0 / token_weight,
    )


def to_input(setting: Setting, code: torch.dtype) -> Case:
    rows, depth, columns = setting.sizes.rows, setting.sizes.width, 4 * setting.sizes.attention_width
    b = backwards(setting, code, columns, depth)
    return Case(
        outputs=lambda: {"out": setting.poisoned((rows, columns), torch.bfloat16)},
        run=lambda out, backend: matmul_dgrad.to_input(*b.product(), out=out["out"], backend=backend),
        limits={"out": product_limit(code)},
        exact=lambda: {"out": b.exact()},
        exact_limits={"out": 4e-3},
        matmul=(rows, columns, depth),
        bytes_moved=rows * (depth * code.itemsize + 2 * columns) + columns * depth * code.itemsize,
    )


def to_input_coded(setting: Setting, code: torch.dtype) -> Case:
    """As `to_input`, in int8 codes."""
    rows, depth, columns = setting.sizes.rows, setting.sizes.width, 4 * setting.sizes.attention_width
    b = backwards(setting, code, columns, depth)
    b.g[3] = 0
    return Case(
        outputs=lambda: {
            "out": setting.poisoned((rows, columns), torch.int8),
            "out_unit": setting.poisoned((columns // 128, rows), torch.float32),
        },
        run=lambda out, backend: matmul_dgrad.to_input(*b.product(), backend=backend, **out),
        limits={"out": 0, "out_unit": 0} if code == torch.int8 else {"out": CodeLimit(4e-2), "out_unit": product_limit(code)},
        matmul=(rows, columns, depth),
        bytes_moved=rows * (depth * code.itemsize + columns) + columns * depth * code.itemsize,
    )


def through_relu_norm(setting: Setting, code: torch.dtype) -> Case:
    rows, depth, columns = setting.sizes.rows, setting.sizes.width, setting.sizes.ffn_width
    b = backwards(setting, code, columns, depth)
    rounded = max(1e-3, product_limit(code))
    return Case(
        outputs=lambda: (
            {
                "out": setting.poisoned((rows, columns), torch.bfloat16),
                "row_max": setting.zeros((rows,)),
                "column_max": setting.zeros((columns,)),
            }
            | input_maxima(setting, code, columns)
        ),
        run=lambda out, backend: matmul_dgrad.through_relu_norm(
            *b.product(), hidden=b.normalised, rms=b.rms, token_weight=b.token_weight, input_scale=b.input_scale(), backend=backend, **out
        ),
        limits={"out": rounded, "row_max": rounded, "column_max": rounded} | input_limits(code),
        exact=lambda: {"out": b.exact_through_norm(torch.where(b.normalised.double() >= 0, b.exact(), 0.0))},
        exact_limits={"out": 4e-3},
        matmul=(rows, columns, depth),
        bytes_moved=rows * (depth * code.itemsize + columns * (2 + code.itemsize)) + columns * depth * code.itemsize,
    )


def through_norm_add(setting: Setting, code: torch.dtype, depth: int, stream: torch.dtype = torch.float32) -> Case:
    rows, columns = setting.sizes.rows, setting.sizes.width
    b = backwards(setting, code, columns, depth)
    dx = setting.gradients(rows, columns, stream)
    return Case(
        outputs=lambda: (
            {"dx": dx.clone(), "row_max": setting.zeros((rows,)), "column_max": setting.zeros((columns,))}
            | input_maxima(setting, code, columns)
        ),
        run=lambda out, backend: matmul_dgrad.through_norm_add(
            *b.product(), n=b.normalised, rms=b.rms, token_weight=b.token_weight, input_scale=b.input_scale(), backend=backend, **out
        ),
        limits={name: 1e-3 if stream == torch.bfloat16 else product_limit(code) or 1e-6 for name in ("dx", "row_max", "column_max")}
        | input_limits(code),
        exact=lambda: {"dx": dx.double() + b.exact_through_norm(b.exact())},
        exact_limits={"dx": 4e-3},
        matmul=(rows, columns, depth),
        bytes_moved=rows * (depth * code.itemsize + columns * (2 * stream.itemsize + code.itemsize)) + columns * depth * code.itemsize,
    )


def product_limit(code: torch.dtype) -> float:
    """int8 sums are exact; sums of fp8 products lose bits in the tensor cores of an H100."""
    return 0.0 if code == torch.int8 else 3e-3


CASES: dict[str, Callable[[Setting], Case]] = {
    "token_weights": token_weights,
    "column_max fp32": partial(column_max, dtype=torch.float32),
    "column_max bf16": partial(column_max, dtype=torch.bfloat16),
    "row_max fp32": partial(row_max, dtype=torch.float32, segments=1),
    "row_max joined": partial(row_max, dtype=torch.bfloat16, segments=4),
}


def _add_quantisers(name: str, code: torch.dtype) -> None:
    def stream(setting: Setting) -> Case:
        return rows_and_transpose(setting, code, setting.sizes.width, torch.float32, 1)

    def up(setting: Setting) -> Case:
        return rows_and_transpose(setting, code, setting.sizes.ffn_width, torch.bfloat16, 1)

    def joined(setting: Setting) -> Case:
        return rows_and_transpose(setting, code, 4 * setting.sizes.attention_width, torch.bfloat16, 4)

    CASES[f"transpose_scaled {name}"] = partial(transpose_scaled, code=code, relu=False)
    CASES[f"transpose_scaled {name} relu"] = partial(transpose_scaled, code=code, relu=True)
    CASES[f"transpose_products {name}"] = partial(transpose_products, code=code)
    CASES[f"to_input {name}"] = partial(to_input, code=code)
    CASES[f"to_input {name} coded"] = partial(to_input_coded, code=code)
    CASES[f"through_relu_norm {name}"] = partial(through_relu_norm, code=code)
    CASES[f"through_norm_add {name} up"] = lambda setting: through_norm_add(setting, code, setting.sizes.ffn_width)
    CASES[f"through_norm_add {name} joined"] = lambda setting: through_norm_add(setting, code, 4 * setting.sizes.attention_width)
    CASES[f"through_norm_add {name} bf16 stream"] = lambda setting: through_norm_add(setting, code, setting.sizes.ffn_width, torch.bfloat16)
    CASES.update({f"rows_and_transpose {name} {what.__name__}": what for what in (stream, up, joined)})
    CASES[f"rows_and_transpose {name} joined packed"] = lambda setting: packed(joined(setting))


for _name, _code in CODES.items():
    _add_quantisers(_name, _code)
CASES["transpose_products int8 halved"] = partial(transpose_products, code=torch.int8, step=2)
