"""Data gradients: g [M, N] times a weight [N, K], and what the layer does with the product, in its epilogue.

    d[t, k] = row_unit[t] * unit / sqrt(K) * sum_n g[t, n] * w_t[k, n]                       lin(x, W) = x W^T / sqrt(K), backwards
    to_input           out = d, in bf16; or as int8 codes with a unit for 128 channels of a token, largest |d| / 127, rounded to nearest
    through_relu_norm  out = normalise'(d where hidden >= 0 else 0)     gradient of the up projection's output
    through_norm_add   dx += normalise'(d)                              gradient of the residual stream
    normalise'(d) = (d - y * mean(y d)) / rms   over groups of 128 channels, y = code / vector_scale the stored normalised vector
The last two also find the maxima that the next quantiser needs (`quantize.py`): row_max[t] over channels of |result| and column_max[k] over
tokens of |result| * token_weight, before the result is rounded to bf16, by atomic maxima, which no order changes; and, since they read the
input whose weight gradient is next (`transpose.transpose_scaled`), the maxima over tokens of that: input_max[k] of |max(hidden, 0)| or |n|,
in codes, times input_scale[t]. A joined projection has its units in the row codes already, and takes unit = 1. The sum is exact for int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tscale_kernels import tiles
from tscale_kernels.codes import ref_product, vector_scale
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.launch_table import Config, fitted, launch

_GROUP_CHANNELS = 128
_LARGEST_CODE = 127.0

# -- reference ---------------------------------------------------------------------------------------------------------


def ref_to_input(g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor, *, out: Tensor, out_unit: Tensor | None = None) -> None:
    """See `to_input`."""
    if out_unit is None:
        out.copy_(_ref_gradient(g, row_unit, w_t, unit))
        return
    sums = ref_product(g, w_t).unflatten(1, (-1, _GROUP_CHANNELS))
    largest = sums.abs().amax(2)
    factor = torch.where(largest > 0, torch.full_like(largest, _LARGEST_CODE) / largest, 0.0)
    out.copy_((sums * factor[:, :, None]).round().flatten(1))
    scale = _ref_scale(row_unit, w_t, unit)[:, None]
    out_unit.copy_((largest / torch.full_like(largest, _LARGEST_CODE) * scale).T)


def ref_through_relu_norm(
    g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor,
    *, hidden: Tensor, rms: Tensor, token_weight: Tensor, out: Tensor, row_max: Tensor, column_max: Tensor,
    input_scale: Tensor | None, input_max: Tensor | None,
) -> None:  # fmt: skip
    """See `through_relu_norm`."""
    d = _ref_gradient(g, row_unit, w_t, unit)
    d = ref_through_norm(torch.where(hidden.float() >= 0, d, 0.0), hidden, rms)
    out.copy_(d)
    _ref_maxima(d, token_weight, row_max, column_max)
    _ref_input_maxima(hidden.float().relu(), input_scale, input_max)


def ref_through_norm_add(
    g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor,
    *, n: Tensor, rms: Tensor, token_weight: Tensor, dx: Tensor, row_max: Tensor, column_max: Tensor,
    input_scale: Tensor | None, input_max: Tensor | None,
) -> None:  # fmt: skip
    """See `through_norm_add`."""
    new = dx.float() + ref_through_norm(_ref_gradient(g, row_unit, w_t, unit), n, rms)
    dx.copy_(new)
    _ref_maxima(new, token_weight, row_max, column_max)
    _ref_input_maxima(n.float(), input_scale, input_max)


def _ref_gradient(g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor) -> Tensor:
    return ref_product(g, w_t) * _ref_scale(row_unit, w_t, unit)[:, None]


def _ref_scale(row_unit: Tensor, w_t: Tensor, unit: Tensor) -> Tensor:
    return row_unit * (unit * w_t.shape[0] ** -0.5)


def ref_through_norm(d: Tensor, codes: Tensor, rms: Tensor) -> Tensor:
    """normalise'(d). d: fp32 [M, K]; codes [M, K] of the normalised vector; rms: fp32 [K / 128, M]. A group of rms 0 passes no gradient."""
    y = (codes.float() * (1.0 / vector_scale(codes.dtype))).unflatten(1, (-1, _GROUP_CHANNELS))
    groups = d.unflatten(1, (-1, _GROUP_CHANNELS))
    along = (y * groups).sum(-1, keepdim=True) * (1.0 / _GROUP_CHANNELS)
    inverse = torch.where(rms == 0, 0.0, 1.0 / rms).T[:, :, None]
    return ((groups - y * along) * inverse).flatten(1)


def _ref_maxima(values: Tensor, token_weight: Tensor, row_max: Tensor, column_max: Tensor) -> None:
    size = values.abs()
    row_max.copy_(torch.maximum(row_max, size.amax(1)))
    column_max.copy_(torch.maximum(column_max, (size * token_weight[:, None]).amax(0)))


def _ref_input_maxima(values: Tensor, scale: Tensor | None, maxima: Tensor | None) -> None:
    if scale is not None and maxima is not None:
        maxima.copy_(torch.maximum(maxima, (values.abs() * scale[:, None]).amax(0)))


# -- Triton ------------------------------------------------------------------------------------------------------------
# One program per output tile; on an H100 two of them share a processor, so that one multiplies while the other is in its epilogue.

if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import small_to_float
    from tscale_kernels.tiles import load_tile, product_tile, store_tile, tile_position

    @triton.jit
    def row_scale(row_unit, unit, row, factor, BR: tl.constexpr):  # type: ignore[no-untyped-def]
        """d / (sum of products of codes), fp32 [BR]."""
        return tl.load(row_unit + row + tl.arange(0, BR)) * (tl.load(unit) * factor)

    @triton.jit
    def through_norm_tile(  # type: ignore[no-untyped-def]
        sums, codes, scale, rms, row, column, rows, code_unit, BR: tl.constexpr, BC: tl.constexpr
    ):
        """`ref_through_norm` of d = sums * scale [BR], all fp32; codes are numbers of code_unit, rms a pointer to [K / 128, rows]."""
        sums = tl.reshape(sums, (BR, BC // 128, 128))
        codes = tl.reshape(codes, (BR, BC // 128, 128))
        group = column // 128 + tl.arange(0, BC // 128)
        root = tl.load(rms + group[None, :] * rows + (row + tl.arange(0, BR))[:, None])
        scale = tl.where(root == 0, 0.0, tl.div_rn(scale[:, None], root))
        along = tl.sum(codes * sums, axis=2) * (0.0078125 * code_unit * code_unit) * scale
        return tl.reshape(sums * scale[:, :, None] - codes * along[:, :, None], (BR, BC))

    @triton.jit
    def note_maxima(values, token_weight, row_max, column_max, row, column, BR: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
        """Raise the maxima (int32 pointers to bits of floats >= 0, which compare as the floats do) to those of an fp32 tile. A row whose
        group is NaN (one number makes its group so) has the maximum NaN, a column ignores it."""
        rows = row + tl.arange(0, BR)
        size = tl.abs(values)
        tl.atomic_max(row_max + rows, tl.max(size, axis=1).to(tl.int32, bitcast=True), sem="relaxed")
        weighted = tl.max(size * tl.load(token_weight + rows)[:, None], axis=0)
        tl.atomic_max(column_max + column + tl.arange(0, BC), weighted.to(tl.int32, bitcast=True), sem="relaxed")

    @triton.jit
    def note_input(  # type: ignore[no-untyped-def]
        x, input_scale, input_max, row, column, width, RELU: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr
    ):
        """Raise input_max (int32 pointer as in `note_maxima`) to the column maxima of |x|, or max(x, 0), times input_scale, if given.
        The tile is loaded a second time: kept from its first use, it would cost registers while there are none."""
        if input_scale is not None:
            codes = small_to_float(load_tile(x, row, column, width, BR, BC, TMA))
            size = (tl.maximum(codes, 0.0) if RELU else tl.abs(codes)) * tl.load(input_scale + row + tl.arange(0, BR))[:, None]
            largest = tl.max(size.to(tl.int32, bitcast=True), axis=0)  # as integers: a NaN is above all
            tl.atomic_max(input_max + column + tl.arange(0, BC), largest, sem="relaxed")

    @triton.jit
    def group_codes(sums, BR: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
        """(int8 codes [BR, BC], code units [BR, BC / 128]) of an fp32 tile."""
        groups = tl.reshape(sums, (BR, BC // 128, 128))
        largest = tl.max(tl.abs(groups), axis=2)
        factor = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)
        rounded = groups * factor[:, :, None] + 12582912.0  # 1.5 * 2**23: the bits below are the nearest integer
        return tl.reshape(rounded.to(tl.int32, bitcast=True).to(tl.int8), (BR, BC)), tl.div_rn(largest, 127.0)

    @triton.jit
    def to_input_kernel(  # type: ignore[no-untyped-def]
        g, row_unit, w_t, unit, out, out_unit, row_tiles, column_tiles, depth, factor,
        ACC: tl.constexpr, TMA: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One [BR, BC] tile. g, w_t, out are operands (tiles.py), the rest pointers; out_unit is None for bf16."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row = row_tile * BR
        column = column_tile * BC
        sums = product_tile(g, w_t, row, column, 0, depth // BK, depth, depth, BR, BC, BK, ACC, TMA).to(tl.float32)
        scale = row_scale(row_unit, unit, row, factor, BR)
        if out_unit is None:
            store_tile(out, row, column, column_tiles * BC, (sums * scale[:, None]).to(tl.bfloat16), BR, BC, TMA)
        else:
            codes, group_unit = group_codes(sums, BR, BC)
            store_tile(out, row, column, column_tiles * BC, codes, BR, BC, TMA)
            group = (column // 128 + tl.arange(0, BC // 128)).to(tl.int64)
            to = out_unit + group[None, :] * (row_tiles * BR) + (row + tl.arange(0, BR))[:, None]
            tl.store(to, group_unit * scale[:, None])

    @triton.jit
    def through_relu_norm_kernel(  # type: ignore[no-untyped-def]
        g, row_unit, w_t, unit, hidden, rms, token_weight, out, row_max, column_max, input_scale, input_max,
        row_tiles, column_tiles, depth, rows, factor, code_unit,
        ACC: tl.constexpr, TMA: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One [BR, BC] tile. g, w_t, hidden, out are operands (tiles.py), the rest pointers."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row = row_tile * BR
        column = column_tile * BC
        width = column_tiles * BC
        sums = product_tile(g, w_t, row, column, 0, depth // BK, depth, depth, BR, BC, BK, ACC, TMA).to(tl.float32)
        codes = load_tile(hidden, row, column, width, BR, BC, TMA).to(tl.float32)
        scale = row_scale(row_unit, unit, row, factor, BR)
        d = through_norm_tile(tl.where(codes >= 0, sums, 0.0), codes, scale, rms, row, column, rows, code_unit, BR, BC)
        store_tile(out, row, column, width, d.to(tl.bfloat16), BR, BC, TMA)
        note_maxima(d, token_weight, row_max, column_max, row, column, BR, BC)
        note_input(hidden, input_scale, input_max, row, column, width, True, BR, BC, TMA)

    @triton.jit
    def through_norm_add_kernel(  # type: ignore[no-untyped-def]
        g, row_unit, w_t, unit, n, rms, token_weight, dx, row_max, column_max, input_scale, input_max,
        row_tiles, column_tiles, depth, rows, factor, code_unit,
        STREAM: tl.constexpr, ACC: tl.constexpr, TMA: tl.constexpr,
        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One [BR, BC] tile. g, w_t, n, dx are operands (tiles.py), the rest pointers; STREAM is the dtype of dx."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row = row_tile * BR
        column = column_tile * BC
        width = column_tiles * BC
        sums = product_tile(g, w_t, row, column, 0, depth // BK, depth, depth, BR, BC, BK, ACC, TMA).to(tl.float32)
        codes = load_tile(n, row, column, width, BR, BC, TMA).to(tl.float32)
        scale = row_scale(row_unit, unit, row, factor, BR)
        d = through_norm_tile(sums, codes, scale, rms, row, column, rows, code_unit, BR, BC)
        new = load_tile(dx, row, column, width, BR, BC, TMA).to(tl.float32) + d
        store_tile(dx, row, column, width, new.to(STREAM), BR, BC, TMA)
        note_maxima(new, token_weight, row_max, column_max, row, column, BR, BC)
        note_input(n, input_scale, input_max, row, column, width, False, BR, BC, TMA)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the launches of the three kernels share."""

    config: Config
    tma: bool
    row_tiles: int
    column_tiles: int
    depth: int
    factor: float

    @property
    def grid(self) -> tuple[int]:
        return (self.row_tiles * self.column_tiles,)

    def operands(self, g: Tensor, w_t: Tensor) -> tuple[Any, Any]:
        rows, columns, depth = self.config["BR"], self.config["BC"], self.config["BK"]
        return tiles.operand(g, rows, depth, self.tma), tiles.operand(w_t, columns, depth, self.tma)

    def tile(self, x: Tensor) -> Any:
        """A matrix [M, K] that the epilogue reads or writes."""
        return tiles.operand(x, self.config["BR"], self.config["BC"], self.tma)


def _plan(op: str, g: Tensor, w_t: Tensor) -> _Plan:
    (rows, depth), columns = g.shape, w_t.shape[0]
    config = fitted(launch(op, tiles.capability(g.device), g.dtype), BR=rows, BC=columns, BK=depth)
    return _Plan(config, tiles.uses_tma(g.device), rows // config["BR"], columns // config["BC"], depth, columns**-0.5)


def _bits(maxima: Tensor) -> Tensor:
    return maxima.view(torch.int32)


def _launch_to_input(g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor, out: Tensor, out_unit: Tensor | None) -> None:
    plan = _plan("to_input", g, w_t)
    codes, weights = plan.operands(g, w_t)
    to_input_kernel[plan.grid](
        codes, row_unit, weights, unit, plan.tile(out), out_unit, plan.row_tiles, plan.column_tiles, plan.depth, plan.factor,
        ACC=tiles.accumulator(g.dtype), TMA=plan.tma, enable_fp_fusion=False, **plan.config,
    )  # fmt: skip


def _launch_through_relu_norm(
    g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor,
    hidden: Tensor, rms: Tensor, token_weight: Tensor, out: Tensor, row_max: Tensor, column_max: Tensor,
    input_scale: Tensor | None, input_max: Tensor | None,
) -> None:  # fmt: skip
    plan = _plan("through_relu_norm", g, w_t)
    codes, weights = plan.operands(g, w_t)
    through_relu_norm_kernel[plan.grid](
        codes, row_unit, weights, unit, plan.tile(hidden), rms, token_weight, plan.tile(out), _bits(row_max), _bits(column_max),
        input_scale, None if input_max is None else _bits(input_max),
        plan.row_tiles, plan.column_tiles, plan.depth, g.shape[0], plan.factor,
        1.0 / vector_scale(hidden.dtype), ACC=tiles.accumulator(g.dtype), TMA=plan.tma, enable_fp_fusion=True, **plan.config,
    )  # fmt: skip


def _launch_through_norm_add(
    g: Tensor, row_unit: Tensor, w_t: Tensor, unit: Tensor,
    n: Tensor, rms: Tensor, token_weight: Tensor, dx: Tensor, row_max: Tensor, column_max: Tensor,
    input_scale: Tensor | None, input_max: Tensor | None,
) -> None:  # fmt: skip
    plan = _plan("through_norm_add", g, w_t)
    codes, weights = plan.operands(g, w_t)
    through_norm_add_kernel[plan.grid](
        codes, row_unit, weights, unit, plan.tile(n), rms, token_weight, plan.tile(dx), _bits(row_max), _bits(column_max),
        input_scale, None if input_max is None else _bits(input_max),
        plan.row_tiles, plan.column_tiles, plan.depth, g.shape[0], plan.factor,
        1.0 / vector_scale(n.dtype), STREAM=tiles.TRITON_DTYPES[dx.dtype], ACC=tiles.accumulator(g.dtype), TMA=plan.tma,
        enable_fp_fusion=True, **plan.config,
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def to_input(
    g: Tensor,
    row_unit: Tensor,
    w_t: Tensor,
    unit: Tensor,
    *,
    out: Tensor,
    out_unit: Tensor | None = None,
    backend: BackendName | None = None,
) -> None:
    """out = d. g: codes [M, N]; row_unit: fp32 [M]; w_t: codes [K, N] of the same dtype; unit: fp32 [1].

    Writes out bf16 [M, K]; or, with an out_unit fp32 [K / 128, M], out int8 [M, K] and that: d = code * unit, at most 1/254 of the largest
    of its group beside the truth.
    """
    if choose(g.device, backend).name == "triton":
        _launch_to_input(g, row_unit, w_t, unit, out, out_unit)
        return
    ref_to_input(g, row_unit, w_t, unit, out=out, out_unit=out_unit)


def through_relu_norm(
    g: Tensor,
    row_unit: Tensor,
    w_t: Tensor,
    unit: Tensor,
    *,
    hidden: Tensor,
    rms: Tensor,
    token_weight: Tensor,
    out: Tensor,
    row_max: Tensor,
    column_max: Tensor,
    input_scale: Tensor | None = None,
    input_max: Tensor | None = None,
    backend: BackendName | None = None,
) -> None:
    """out = normalise'(ReLU'(d)). Operands as in `to_input`; hidden: codes [M, K] before the ReLU (0 passes); rms: fp32 [K / 128, M].

    Writes out bf16 [M, K]; raises row_max fp32 [M] and column_max fp32 [K] (zeroed by the caller) to the maxima of out.
    token_weight: fp32 [M]. With input_scale fp32 [M], raises input_max fp32 [K] to those of max(hidden, 0) * input_scale.
    """
    if choose(g.device, backend).name == "triton":
        _launch_through_relu_norm(g, row_unit, w_t, unit, hidden, rms, token_weight, out, row_max, column_max, input_scale, input_max)
        return
    ref_through_relu_norm(
        g, row_unit, w_t, unit, hidden=hidden, rms=rms, token_weight=token_weight, out=out, row_max=row_max, column_max=column_max,
        input_scale=input_scale, input_max=input_max,
    )  # fmt: skip


def through_norm_add(
    g: Tensor,
    row_unit: Tensor,
    w_t: Tensor,
    unit: Tensor,
    *,
    n: Tensor,
    rms: Tensor,
    token_weight: Tensor,
    dx: Tensor,
    row_max: Tensor,
    column_max: Tensor,
    input_scale: Tensor | None = None,
    input_max: Tensor | None = None,
    backend: BackendName | None = None,
) -> None:
    """dx += normalise'(d), in place. Operands as in `to_input`; n: codes [M, K] of the normalised stream; rms: fp32 [K / 128, M].

    dx: fp32 or bf16 [M, K]. Raises row_max fp32 [M] and column_max fp32 [K] (zeroed by the caller) to the maxima of the new dx.
    With input_scale fp32 [M], raises input_max fp32 [K] to those of n * input_scale.
    """
    if choose(g.device, backend).name == "triton":
        _launch_through_norm_add(g, row_unit, w_t, unit, n, rms, token_weight, dx, row_max, column_max, input_scale, input_max)
        return
    ref_through_norm_add(
        g, row_unit, w_t, unit, n=n, rms=rms, token_weight=token_weight, dx=dx, row_max=row_max, column_max=column_max,
        input_scale=input_scale, input_max=input_max,
    )  # fmt: skip
