"""Backward products and quantisers, reference backend: error of weight gradients, unbiased rounding, exactness, derivatives by autograd.

(That the Triton kernels give what the reference gives is tested through cases_backward.py, see test_cases.py.)
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tscale_fed.model.combiner import blocked_channels, combine_ref
from tscale_fed.model.normalise import normalise_ref
from tscale_kernels import balance, matmul_dgrad, matmul_wgrad, quantize, transpose
from tscale_kernels.codes import encode, vector_scale
from tscale_kernels.testing import assert_close, assert_same_bits, poisoned, relative_error

INT8, E4M3, BF16 = torch.int8, torch.float8_e4m3fn, torch.bfloat16
SEEDS = range(8)
LIMIT = {INT8: 0.0300, E4M3: 0.0450, BF16: 0.0060}
"""Relative error of a weight gradient (spec/kernels.md 5.3)."""


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the weight gradient as the engine makes it ------------------------------------------------------------------------


class Quantised:
    """A gradient [M, N] after the statistics and both sets of codes."""

    def __init__(self, g: Tensor, code: torch.dtype, seed: int = 1, salt: int = 7) -> None:
        rows, columns = g.shape
        row_max, column_max = torch.zeros(rows), torch.zeros(columns)
        self.weight, self.inverse = torch.empty(rows), torch.empty(rows)
        quantize.row_max(g, segment_units=None, out=row_max)
        balance.token_weights(row_max, weight=self.weight, inverse=self.inverse)
        quantize.column_max(g, token_weight=self.weight, out=column_max)
        self.codes, self.codes_t = poisoned((rows, columns), code), poisoned((columns, rows), code)
        self.row_unit, self.column_unit = torch.empty(rows), torch.empty(columns)
        quantize.rows_and_transpose(
            g, row_max=row_max, column_max=column_max, token_weight=self.weight, segment_units=None,
            seed=torch.tensor([seed], dtype=torch.int32), salt=salt, codes=self.codes, row_unit=self.row_unit, codes_t=self.codes_t,
            column_unit=self.column_unit,
        )  # fmt: skip


def weight_gradient_of(g: Tensor, x: Tensor, code: torch.dtype, seed: int = 1) -> Tensor:
    """g [M, N]; x: codes [M, K] -> [N, K]."""
    q, inputs = Quantised(g, code, seed), x.shape[1]
    x_t, column_max, column_unit = poisoned((inputs, x.shape[0]), code), torch.zeros(inputs), torch.empty(inputs)
    quantize.column_max(x.float(), token_weight=q.inverse, out=column_max)
    transpose.transpose_scaled(x, token_scale=q.inverse, relu=False, codes_t=x_t, column_max=column_max, column_unit=column_unit)
    grad = poisoned((g.shape[1], inputs), torch.float32)
    matmul_wgrad.weight_gradient(
        q.codes_t, x_t, q.column_unit, column_unit, factor=inputs**-0.5, row_map=None, grad=grad, accumulate=False, square_sums=None,
        workspace=None,
    )  # fmt: skip
    return grad


def token_scales(kind: str, tokens: int, generator: torch.Generator) -> Tensor:
    """Of spec/kernels.md 5.2, times a size that gradients have."""
    normal = torch.randn(tokens, 1, generator=generator)
    scales = {
        "lognormal 1.5": torch.exp(1.5 * normal),
        "lognormal 0.7": torch.exp(0.7 * normal),
        "cross entropy": torch.rand(tokens, 1, generator=generator) * torch.exp(0.5 * normal),
    }
    return scales[kind] * 1e-5


@pytest.mark.parametrize("uneven", [False, True], ids=["even channels", "uneven channels"])
@pytest.mark.parametrize("kind", ["lognormal 1.5", "lognormal 0.7", "cross entropy"])
@pytest.mark.parametrize("code", [INT8, E4M3])
def test_weight_gradient_error_over_token_scales(code: torch.dtype, kind: str, uneven: bool) -> None:
    for seed in SEEDS:
        generator = generator_of(seed)
        g = torch.randn(1024, 128, generator=generator) * token_scales(kind, 1024, generator)
        if uneven:
            g = g * torch.exp(torch.randn(1, 128, generator=generator))
        g = g.bfloat16()
        x = encode(torch.randn(1024, 128, generator=generator) * vector_scale(code), code)
        got = weight_gradient_of(g, x, code, seed)
        want = g.double().T @ (x.double() / vector_scale(code)) * 128**-0.5
        case = f"{code} {kind} uneven={uneven} seed {seed}"
        assert_close(case, got, want, LIMIT[code])
        assert float(torch.cosine_similarity(got.double().flatten(), want.flatten(), dim=0)) > 0.999, case


def test_weight_gradient_does_not_depend_on_the_order_of_tokens() -> None:
    generator = generator_of(3)
    g_t, x_t = (torch.randint(-127, 128, (128, 512), generator=generator, dtype=INT8) for _ in range(2))
    units = torch.rand(128, generator=generator)
    order = torch.randperm(512, generator=generator)
    results = []
    for at in (torch.arange(512), order):
        grad, sums = torch.empty(128, 128), torch.empty(matmul_wgrad.square_sum_count(128, 128))
        matmul_wgrad.weight_gradient(
            g_t[:, at].contiguous(), x_t[:, at].contiguous(), units, units, factor=0.1, row_map=None, grad=grad, accumulate=False,
            square_sums=sums, workspace=None,
        )  # fmt: skip
        results.append(grad)
        assert_close("square sums", sums.sum(), grad.double().square().sum(), 1e-6)
    assert_same_bits("gradient", results[1], results[0])


def test_rows_go_where_the_map_says_and_are_added() -> None:
    generator = generator_of(4)
    g_t, x_t = (torch.randint(-127, 128, (256, 128), generator=generator, dtype=INT8) for _ in range(2))
    ones, order = torch.ones(256), torch.randperm(256, generator=generator).to(torch.int32)
    plain, mapped = torch.empty(256, 256), torch.ones(256, 256)
    for grad, row_map, accumulate in ((plain, None, False), (mapped, order, True)):
        matmul_wgrad.weight_gradient(
            g_t, x_t, ones, ones, factor=0.5, row_map=row_map, grad=grad, accumulate=accumulate, square_sums=None, workspace=None
        )
    assert_same_bits("gradient", mapped[order.long()], plain + 1.0)


# -- quantisers --------------------------------------------------------------------------------------------------------


def test_dithered_codes_have_the_mean_of_the_value() -> None:
    """Over seeds, rows and columns of equal numbers; the standard deviation of a code is at most half a unit."""
    value = torch.linspace(-1.0, 1.0, 128).repeat(128, 1) * 3e-4
    rows, columns = torch.zeros(128, 128, dtype=torch.float64), torch.zeros(128, 128, dtype=torch.float64)
    repeats = 100
    for seed in range(repeats):
        q = Quantised(value, INT8, seed)
        rows += q.codes.double() * q.row_unit.double()[:, None]
        columns += q.codes_t.T.double() * q.column_unit.double() / q.weight.double()[:, None]
    for name, total, unit in (("rows", rows, q.row_unit[0]), ("columns", columns, (q.column_unit / q.weight[0]).max())):
        error = (total / repeats - value).mean(0).abs()  # the 128 rows are equal
        allowed = 5 * 0.5 * float(unit) / (128 * repeats) ** 0.5 + float(unit) / 512
        assert float(error.max()) < allowed, f"{name}: {float(error.max()):.2e}, allowed {allowed:.2e}"


def test_noise_of_rows_and_columns_is_uniform_and_independent() -> None:
    seed = torch.tensor([12345], dtype=torch.int32)
    fields = [*quantize.ref_noise_bytes(256, 256, seed, 1), *quantize.ref_noise_bytes(256, 256, seed, 2)]
    limit = 5 / 256  # five standard deviations of a correlation of 2**16 pairs
    for number, field in enumerate(fields):
        assert abs(float(field.mean()) - 127.5) < limit * 128
        assert abs(float(torch.corrcoef(torch.stack((field[:, 1:].flatten(), field[:, :-1].flatten())))[0, 1])) < limit
        for other in fields[:number]:
            assert abs(float(torch.corrcoef(torch.stack((field.flatten(), other.flatten())))[0, 1])) < limit


@pytest.mark.parametrize("code", [INT8, E4M3])
@pytest.mark.parametrize("power", [-20, 13])
def test_scaling_by_a_power_of_two_changes_units_alone(code: torch.dtype, power: int) -> None:
    g = (torch.randn(128, 128, generator=generator_of(5)) * 1e-3).bfloat16()
    a, b = Quantised(g, code), Quantised((g.float() * 2.0**power).bfloat16(), code)
    assert_same_bits("codes", b.codes, a.codes)
    assert_same_bits("row units", b.row_unit, a.row_unit * 2.0**power)
    assert_close(
        "values by column",
        b.codes_t.float() * b.column_unit[:, None] / b.weight,
        a.codes_t.float() * a.column_unit[:, None] / a.weight * 2.0**power,
        1e-2,
    )


@pytest.mark.parametrize("code", [INT8, E4M3, BF16])
def test_zero_rows_and_columns_and_one_outlier(code: torch.dtype) -> None:
    g = torch.zeros(128, 256)
    g[5, 9] = -3.0
    q = Quantised(g, code)
    expected = -quantize.quantizer_peak(code) if code != BF16 else -3.0
    assert float(q.codes[5, 9]) in (expected, expected - 0.5, expected + 0.5)
    assert relative_error(q.codes.float() * q.row_unit[:, None], g) < 5e-3
    assert relative_error(q.codes_t.float().T * q.column_unit / q.weight[:, None], g) < 5e-3
    assert int((q.codes.float() != 0).sum()) == 1 and int((q.codes_t.float() != 0).sum()) == 1


def test_all_zero_gradient_has_weight_one() -> None:
    q = Quantised(torch.zeros(128, 128), INT8)
    assert torch.equal(q.weight, torch.ones(128)) and torch.equal(q.inverse, torch.ones(128))
    assert not q.codes.any() and not q.codes_t.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_reaches_the_weight_gradient(bad: float) -> None:
    g = torch.randn(128, 128, generator=generator_of(6))
    g[3, 4] = bad
    x = encode(torch.randn(128, 128, generator=generator_of(7)) * 24, INT8)
    assert not torch.isfinite(weight_gradient_of(g, x, INT8)).all()
    q = Quantised(g, INT8)
    assert not torch.isfinite(q.codes.float() * q.row_unit[:, None]).all()


def test_weights_are_the_inverse_root_of_the_scale_but_not_below_the_mean() -> None:
    row_max = torch.tensor([0.0, 1.0, 4.0, 11.0]).repeat(32)
    weight, inverse = torch.empty(128), torch.empty(128)
    balance.token_weights(row_max, weight=weight, inverse=inverse)
    assert_close("inverse", inverse[:4].double(), torch.tensor([4.0, 4.0, 4.0, 11.0]).double().sqrt(), 1e-7)
    assert_close("weight", weight * inverse, torch.ones(128), 1e-7)


@pytest.mark.parametrize("step", [1, 2])
def test_products_are_transposed_in_the_order_of_the_combiner(step: int) -> None:
    heads, rows = 2, 128
    width, generator = 128 * heads, generator_of(8)
    gate = encode(torch.randn(rows, width, generator=generator) * 24, INT8)
    out = torch.randn(rows, width, generator=generator).bfloat16()
    blocked = blocked_channels(heads)
    codes_t, column_unit = poisoned((4 * width, rows), INT8), torch.empty(4 * width)
    gate_input, out_input = gate[:, blocked].contiguous(), out[:, blocked].contiguous()
    transpose.transpose_products(gate_input, out_input, codes_t=codes_t, column_unit=column_unit, product_scale=24 / step)
    shape = (1, rows, heads, 128)
    want = encode(combine_ref(gate.float().view(shape), out.float().view(shape))[0] / step, INT8)
    assert_same_bits("products", codes_t.T.contiguous(), want)
    assert_same_bits("units", column_unit, torch.full((4 * width,), step / 24))


# -- data gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
def test_derivative_of_the_normalisation_is_that_of_autograd(relu: bool) -> None:
    x = torch.randn(128, 256, dtype=torch.float64, generator=generator_of(9)).requires_grad_()
    d = torch.randn(128, 256, dtype=torch.float64, generator=generator_of(10))
    y = normalise_ref(x)
    (torch.relu(y) if relu else y).backward(d)
    rms = x.detach().unflatten(1, (-1, 128)).square().mean(2).sqrt().T
    codes = y.detach().bfloat16()
    got = matmul_dgrad.ref_through_norm(torch.where(codes >= 0, d, 0.0).float() if relu else d.float(), codes, rms.float())
    assert x.grad is not None
    assert_close("gradient", got, x.grad, 5e-3)


def test_a_data_gradient_is_that_of_lin() -> None:
    generator = generator_of(11)
    g = (torch.randn(256, 384, generator=generator) * torch.exp(torch.randn(256, 1, generator=generator)) * 1e-5).bfloat16()
    unit = torch.tensor([0.01])
    w_t = torch.randint(-100, 101, (128, 384), generator=generator, dtype=INT8)
    q, out = Quantised(g, INT8), poisoned((256, 128), BF16)
    matmul_dgrad.to_input(q.codes, q.row_unit, w_t, unit, out=out)
    weight = (w_t.double() * 0.01).T  # [out, in]
    assert_close("gradient", out, g.double() @ weight * 128**-0.5, 2.5e-2)


def test_maxima_are_raised_never_lowered() -> None:
    generator = generator_of(12)
    g = torch.randint(-127, 128, (128, 128), generator=generator, dtype=INT8)
    codes = encode(torch.randn(128, 128, generator=generator) * 24, INT8)
    weight = torch.rand(128, generator=generator) + 0.5
    dx = torch.randn(128, 128, generator=generator)
    row_max, column_max, input_max = torch.zeros(128), torch.full((128,), 1e9), torch.full((128,), 1e-3)
    input_max[5] = 1e9
    matmul_dgrad.through_norm_add(
        g, torch.full((128,), 1e-3), g, torch.ones(1), n=codes, rms=torch.ones(1, 128), token_weight=weight, dx=dx, row_max=row_max,
        column_max=column_max, input_scale=1 / weight, input_max=input_max,
    )  # fmt: skip
    want = (codes.float().abs() * (1 / weight)[:, None]).amax(0)
    assert_same_bits("input maxima", input_max, want.index_fill(0, torch.tensor([5]), 1e9))
    assert_same_bits("row maxima", row_max, dx.abs().amax(1))
    assert_same_bits("column maxima", column_max, torch.full((128,), 1e9))


# -- how a contraction is split ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [(264, (264, 1)), (800, (792, 7)), (200, (0, 5)), (1, (0, 7)), (0, (0, 1)), (528 + 250, (778, 1))],
)
def test_only_tiles_that_do_not_fill_a_wave_are_split(count: int, expected: tuple[int, int]) -> None:
    assert matmul_wgrad.split_of(count, places=264, largest=8, room=1024) == expected


def test_without_room_nothing_is_split() -> None:
    assert matmul_wgrad.split_of(200, places=264, largest=8, room=0) == (200, 1)
    alone, parts = matmul_wgrad.split_of(200, places=264, largest=8, room=450)
    assert (200 - alone) * parts <= 450
