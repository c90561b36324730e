"""The one-bit delta: code, packing, formula, integer exactness. Reference backend."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_kernels import delta_onebit as op
from tscale_kernels import dispatch, limits
from tscale_kernels.testing import AWKWARD_SHAPES, assert_same_bits

UNIT_EXPONENT = -22


def displacement(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * 1e-2


@pytest.fixture(params=AWKWARD_SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def test_bits_are_little_endian_row_major_and_set_where_negative(shape: tuple[int, int]) -> None:
    d = displacement(*shape)
    bits, _ = op.encode(d, 0.5, UNIT_EXPONENT)
    assert_same_bits("bits", bits, torch.from_numpy(np.packbits(d.numpy().ravel() < 0, bitorder="little")))


def test_zero_and_minus_zero_count_as_positive() -> None:
    d = torch.tensor([[0.0, -0.0, 1.0, -1.0, 0.0, -0.0, -2.0, 3.0]])
    bits, steps = op.encode(d, 1.0, 0)
    assert bits.tolist() == [0b01001000]
    assert steps.tolist() == [1]  # mean 7/8


def test_steps_follow_the_formula_within_the_code(shape: tuple[int, int]) -> None:
    d = displacement(*shape)
    _, steps = op.encode(d, 0.37, UNIT_EXPONENT)
    want = d.double().abs().mean(1) * 0.37 / 2.0**UNIT_EXPONENT
    assert torch.all((steps - want).abs() <= 0.51 + want * 2.0**-limits.step_mantissa_bits)


def test_a_row_that_is_not_zero_gets_at_least_one_unit_and_a_zero_row_none() -> None:
    d = torch.zeros(3, 128)
    d[1, 5] = -1e-30
    _, steps = op.encode(d, 1.0, UNIT_EXPONENT)
    assert steps.tolist() == [0, 1, 0]


def test_steps_are_capped() -> None:
    _, steps = op.encode(torch.full((1, 8), 1e30), 1.0, -40)
    assert steps.tolist() == [limits.max_step]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    d = displacement(4, 128)
    d[2, 3] = bad
    with pytest.raises(ValueError, match="NaN"):
        op.encode(d, 1.0, UNIT_EXPONENT)


@given(st.integers(0, limits.max_step))
def test_rounding_to_the_code_keeps_eleven_bits_and_is_idempotent(step: int) -> None:
    rounded = op.round_steps(torch.tensor([step]))
    assert abs(int(rounded) - step) <= step * 2.0**-limits.step_mantissa_bits
    assert_same_bits("again", op.round_steps(rounded), rounded)
    back, valid = op.codes_to_steps(op.steps_to_codes(rounded))
    assert bool(valid.all()) and int(back) == int(rounded)


def test_each_value_has_exactly_one_valid_code() -> None:
    steps, valid = op.codes_to_steps(torch.arange(1 << 16, dtype=torch.int32))
    values = steps[valid]
    assert len(values.unique()) == len(values)
    assert int(values.max()) == limits.max_step
    assert_same_bits("codes", op.steps_to_codes(values), torch.arange(1 << 16, dtype=torch.int32)[valid])
    assert int(steps[~valid].abs().max()) == 0


def test_apply_adds_the_decoded_integers(shape: tuple[int, int]) -> None:
    d = displacement(*shape)
    bits, steps = op.encode(d, 1.0, UNIT_EXPONENT)
    start = torch.randint(-(1 << 20), 1 << 20, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    got = start.clone()
    op.apply(got, bits, steps)
    signs = 1 - 2 * np.unpackbits(bits.numpy(), bitorder="little").reshape(shape).astype(np.int32)
    assert_same_bits("basepoint", got, start + torch.from_numpy(signs) * steps[:, None])
    op.apply(got, bits, steps, sign=-1)
    assert_same_bits("taken back", got, start)


def test_apply_works_where_rows_do_not_end_on_a_byte() -> None:
    d = displacement(5, 11)
    bits, steps = op.encode(d, 1.0, UNIT_EXPONENT)
    assert len(bits) == 7
    got = torch.zeros(5, 11, dtype=torch.int32)
    op.apply(got, bits, steps)
    assert_same_bits("basepoint", got, torch.where(d < 0, -steps[:, None], steps[:, None]))


def test_leak_gives_up_exactly_what_apply_adds() -> None:
    d = displacement(16, 256)
    bits, steps = op.encode(d, 0.25, UNIT_EXPONENT)
    unit = 2.0**UNIT_EXPONENT
    left = torch.round(d / unit) * unit
    before = (left / unit).to(torch.int64)
    op.leak(left, bits, steps.float() * unit)
    added = torch.zeros(16, 256, dtype=torch.int32)
    op.apply(added, bits, steps)
    assert_same_bits("kept", (left / unit).to(torch.int64), before - added)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 1 << 30), st.floats(0.01, 1.0))
def test_contraction_is_the_one_of_the_least_squares_scale(rows: int, bytes_per_row: int, seed: int, c: float) -> None:
    """||d - q||^2 = ||d||^2 - ||d||_1^2 / n per row, up to the rounding of steps: q = step * u / c differs from mean|d| by at most half a
    unit and half a code, and that difference enters squared."""
    cols = 8 * bytes_per_row
    d = displacement(rows, cols, seed).double()
    bits, steps = op.encode(d, c, UNIT_EXPONENT)
    q = torch.zeros_like(d)
    op.leak(q, bits, steps.double() * (-(2.0**UNIT_EXPONENT) / c))
    left = (d - q).square().sum(1)
    ideal = d.square().sum(1) - d.abs().sum(1).square() / cols
    rounding = 0.51 * 2.0**UNIT_EXPONENT / c + d.abs().mean(1) * 2.0**-limits.step_mantissa_bits
    assert torch.all((left - ideal).abs() <= cols * rounding.square() + 1e-12)


def test_empty_matrices() -> None:
    bits, steps = op.encode(torch.empty(0, 128), 1.0, UNIT_EXPONENT)
    assert bits.numel() == 0 and steps.numel() == 0
    op.apply(torch.empty(0, 128, dtype=torch.int32), bits, steps)


def test_backend_choice_says_why() -> None:
    assert dispatch.choose(torch.device("cpu")).name == "ref"
    assert "CUDA" in dispatch.choose(torch.device("cpu")).reason
    if not dispatch.has_triton():
        assert dispatch.choose(torch.device("cuda")).name == "ref"
        with pytest.raises(ValueError, match="triton is not installed"):
            dispatch.choose(torch.device("cpu"), "triton")
