"""Deltas of 8 and 4 bits, of the k largest values, of low rank: formula, integer exactness, contraction, bad input (reference backend)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tscale_kernels import delta_int4, delta_int8, delta_lowrank, delta_topk, limits
from tscale_kernels.testing import AWKWARD_SHAPES, assert_same_bits

UNIT_EXPONENT = -22
UNIT = 2.0**UNIT_EXPONENT
K = 24


def displacement(rows: int, cols: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """fp32 on the grid of units, so that what the author gives up is exact; rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(rows, cols, generator=generator) * torch.exp(spread * torch.randn(rows, 1, generator=generator)) * 1e-3
    return torch.round(d / UNIT) * UNIT


@dataclass(frozen=True)
class Codec:
    """One codec as `delta` (units added to a zero basepoint, and what is left of d after `leak` with c) and its own encoding."""

    name: str
    encode: Callable[[Tensor, float], tuple[Tensor, ...]]
    apply: Callable[[Tensor, tuple[Tensor, ...], int], None]
    leak: Callable[[Tensor, tuple[Tensor, ...], float], None]


def _encode_lowrank(d: Tensor, c: float) -> tuple[Tensor, ...]:
    return delta_lowrank.encode(d, c, UNIT_EXPONENT, delta_lowrank.start(d.shape[1], min(4, d.shape[1])))


CODECS = [
    Codec(
        "int8",
        lambda d, c: delta_int8.encode(d, c, UNIT_EXPONENT),
        lambda b, delta, sign: delta_int8.apply(b, delta[0], delta[1], sign),
        lambda d, delta, c: delta_int8.leak(d, delta[0], delta[1].to(d.dtype) * (UNIT / c)),
    ),
    Codec(
        "int4",
        lambda d, c: delta_int4.encode(d, c, UNIT_EXPONENT),
        lambda b, delta, sign: delta_int4.apply(b, delta[0], delta[1], sign),
        lambda d, delta, c: delta_int4.leak(d, delta[0], delta[1].to(d.dtype) * (UNIT / c)),
    ),
    Codec(
        "topk",
        lambda d, c: delta_topk.encode(d, c, UNIT_EXPONENT, K),
        lambda b, delta, sign: delta_topk.apply(b, delta[0], delta[1], K, sign),
        lambda d, delta, c: delta_topk.leak(d, delta[0], torch.where(delta[1] >= 0, torch.exp2(delta[1].to(d.dtype)), 0.0) * (UNIT / c), K),
    ),
    Codec(
        "lowrank",
        _encode_lowrank,
        lambda b, delta, sign: delta_lowrank.apply(b, delta[0], delta[1], delta[2], sign),
        lambda d, delta, c: delta_lowrank.leak(d, delta[0], delta[1], delta[2], UNIT / c),
    ),
]


@pytest.fixture(params=CODECS, ids=lambda codec: codec.name)
def codec(request: pytest.FixtureRequest) -> Codec:
    return request.param


def decoded(codec: Codec, delta: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    units = torch.zeros(shape, dtype=torch.int32)
    codec.apply(units, delta, 1)
    return units


# -- every codec -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", AWKWARD_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_apply_adds_integers_that_can_be_taken_back(codec: Codec, shape: tuple[int, int]) -> None:
    delta = codec.encode(displacement(*shape), 0.37)
    start = torch.randint(-(1 << 20), 1 << 20, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    got = start.clone()
    codec.apply(got, delta, 1)
    assert_same_bits("basepoint", got, start + decoded(codec, delta, shape))
    codec.apply(got, delta, -1)
    assert_same_bits("taken back", got, start)


@pytest.mark.parametrize("shape", AWKWARD_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_author_gives_up_exactly_what_receivers_add(codec: Codec, shape: tuple[int, int]) -> None:
    d = displacement(*shape)
    delta = codec.encode(d, 1.0)
    left = d.clone()
    codec.leak(left, delta, 1.0)
    assert_same_bits("units", (left / UNIT).to(torch.int64), (d / UNIT).to(torch.int64) - decoded(codec, delta, shape))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(CODECS), st.integers(1, 9), st.integers(1, 40), st.integers(0, 1 << 30), st.floats(0.02, 1.0), st.floats(0.0, 3.0))
def test_the_remainder_is_never_larger_than_the_displacement(
    codec: Codec, rows: int, eighths: int, seed: int, c: float, spread: float
) -> None:
    """|d - q| <= |d| with q = decoded / c, up to the rounding of each value to half a unit (of c*d)."""
    d = displacement(rows, 8 * eighths, seed, spread).double()
    q = decoded(codec, codec.encode(d, c), tuple(d.shape)).double() * (UNIT / c)
    rounding = 0.5 * UNIT / c * (d.numel() ** 0.5)
    assert (d - q).norm() <= d.norm() * (1 + 1e-6) + rounding


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(CODECS), st.integers(0, 1 << 30), st.sampled_from([0.3, 1.0]))
def test_error_feedback_drains_a_constant_displacement(codec: Codec, seed: int, c: float) -> None:
    """What is published again and again goes to zero (spec/distributed.md, test T4), and nothing is lost on the way."""
    d = displacement(16, 256, seed, spread=0.5)
    total, left = torch.zeros(d.shape, dtype=torch.int64), d.double()
    warm = delta_lowrank.start(256, 4)
    sizes = [float(left.norm())]
    for _ in range(30):
        delta = delta_lowrank.encode(left, c, UNIT_EXPONENT, warm) if codec.name == "lowrank" else codec.encode(left, c)
        total += decoded(codec, delta, tuple(d.shape))
        codec.leak(left, delta, c)
        sizes.append(float(left.norm()))
    assert all(after <= before * (1 + 1e-6) + 0.5 * UNIT / c * 64 for before, after in zip(sizes, sizes[1:], strict=False))
    # What a codec can move at once decides the pace: everything, 24 of 4096 values, 4 of 16 directions.
    assert sizes[-1] < {"int8": 0.02, "int4": 0.02, "topk": 0.75, "lowrank": 0.05}[codec.name] * sizes[0]
    assert (d.double() - left - total.double() * (UNIT / c)).abs().max() < 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(codec: Codec, bad: float) -> None:
    d = displacement(4, 128)
    d[2, 3] = bad
    with pytest.raises(ValueError, match="NaN"):
        codec.encode(d, 1.0)


def test_zero_gives_zero_and_nothing_is_smaller_than_a_unit(codec: Codec) -> None:
    zero = torch.zeros(4, 128)
    assert int(decoded(codec, codec.encode(zero, 1.0), (4, 128)).abs().max()) == 0
    d = zero.clone()
    d[1, 5] = -0.6 * UNIT
    assert int(decoded(codec, codec.encode(d, 1.0), (4, 128))[1, 5]) == -1


def test_empty_matrices(codec: Codec) -> None:
    delta = codec.encode(torch.empty(0, 128), 1.0)
    codec.apply(torch.empty(0, 128, dtype=torch.int32), delta, 1)


def test_huge_displacements_stay_within_the_largest_step(codec: Codec) -> None:
    units = decoded(codec, codec.encode(torch.full((8, 128), 1e30), 1.0), (8, 128))
    assert 0 < int(units.max()) <= (1 << 30 if codec.name == "lowrank" else limits.max_step) and int(units.min()) >= 0


# -- 8 bits ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.integers(0, 1 << 30), st.floats(0.01, 1.0))
def test_int8_is_within_half_a_step_everywhere_and_steps_are_tight(eighths: int, seed: int, c: float) -> None:
    d = displacement(1, 8 * eighths, seed, spread=2.0)
    codes, steps = delta_int8.encode(d, c, UNIT_EXPONENT)
    each = steps.repeat_interleave(limits.delta_block)[: d.numel()]
    units = d.double().view(-1) * (c / UNIT)
    assert torch.all((codes.double() * each - units).abs() <= 0.5 * each + 1e-5 * units.abs())
    peak = torch.stack([part.abs().max() for part in units.split(limits.delta_block)])
    assert torch.all((steps * 127 >= peak * (1 - 1e-6)) | ((steps == 0) & (peak <= 0.5)))
    assert torch.all(steps <= (peak / 127 + 1) * (1 + 2.0**-10))
    assert bool(delta_int8.valid(codes))


def test_int8_steps_are_those_of_the_wire_code() -> None:
    from tscale_kernels.delta_onebit import round_steps

    _, steps = delta_int8.encode(displacement(64, 1280, spread=3.0) * 100, 1.0, UNIT_EXPONENT)
    assert int(steps.max()) > 1 << limits.step_mantissa_bits
    assert_same_bits("steps", round_steps(steps), steps)


@pytest.mark.parametrize("width", [delta_int8, delta_int4], ids=["int8", "int4"])
def test_a_block_that_moves_nothing_has_step_zero(width: ModuleType) -> None:
    d = torch.zeros(1, 256)
    d[0, 3], d[0, 200] = 0.4 * UNIT, -0.6 * UNIT
    steps = width.encode(d, 1.0, UNIT_EXPONENT)[1].tolist()
    assert sum(steps) == 1 and steps[200 // width.GRID.values] == 1


def test_int8_code_that_no_encoder_writes() -> None:
    assert not bool(delta_int8.valid(torch.tensor([3, -128, 5], dtype=torch.int8)))


# -- 4 bits ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.integers(0, 1 << 30), st.floats(0.01, 1.0))
def test_int4_is_within_half_a_step_everywhere_and_steps_are_tight(eighths: int, seed: int, c: float) -> None:
    d = displacement(1, 8 * eighths, seed, spread=2.0)
    packed, steps = delta_int4.encode(d, c, UNIT_EXPONENT)
    got = torch.zeros(1, 8 * eighths, dtype=torch.int32)
    delta_int4.apply(got, packed, steps)
    each = steps.repeat_interleave(limits.nibble_block)[: d.numel()]
    units = d.double().view(-1) * (c / UNIT)
    assert torch.all((got.view(-1).double() - units).abs() <= 0.5 * each + 1e-5 * units.abs())
    peak = torch.stack([part.abs().max() for part in units.split(limits.nibble_block)])
    assert torch.all((steps * 7 >= peak * (1 - 1e-6)) | ((steps == 0) & (peak <= 0.5)))
    assert torch.all(steps <= (peak / 7 + 1) * (1 + 2.0**-10))
    assert bool(delta_int4.valid(packed))


def test_int4_puts_two_codes_into_a_byte_the_first_one_low() -> None:
    d = torch.tensor([[7.0, -7.0, 1.0, 0.0, -1.0, -2.0, 3.0, 5.0]]) * UNIT
    packed, steps = delta_int4.encode(d, 1.0, UNIT_EXPONENT)
    assert steps.tolist() == [1] and packed.tolist() == [0x97, 0x01, 0xEF, 0x53]


@pytest.mark.parametrize("byte", [0x08, 0x80, 0x88, 0x8F])
def test_int4_codes_that_no_encoder_writes(byte: int) -> None:
    assert bool(delta_int4.valid(torch.tensor([0x97, 0x01], dtype=torch.uint8)))
    assert not bool(delta_int4.valid(torch.tensor([0x97, byte], dtype=torch.uint8)))


# -- the k largest -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1200), st.integers(0, 1 << 30), st.integers(1, 70))
def test_topk_takes_the_largest_and_of_equal_ones_the_first(eighths: int, seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = torch.randint(-5, 6, (1, 8 * eighths), generator=generator).float() * UNIT
    picks, exponents = delta_topk.encode(d, 1.0, UNIT_EXPONENT, k)
    assert picks.numel() == delta_topk.picked(d.numel(), k)
    for part, picked, exponent in zip(d.view(-1).split(limits.topk_stretch), picks.split(k), exponents, strict=True):
        order = sorted(range(len(part)), key=lambda x: (-abs(float(part[x])), x))[:k]
        assert (picked >> 1).tolist() == sorted(order)
        assert [bool(p & 1) for p in picked] == [float(part[x]) < 0 for x in sorted(order)]
        mean = float(part[order].abs().double().mean() / UNIT)
        assert int(exponent) == -1 if mean == 0 else 2.0 ** int(exponent) <= max(1.0, 4 / 3 * mean) + 1e-9
        assert mean == 0 or 2.0 ** (int(exponent) + 1) > 4 / 3 * mean - 1e-9
    assert bool(delta_topk.valid(picks, exponents, d.numel(), k))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 64))
def test_topk_removes_eight_ninths_of_what_the_best_scale_would(seed: int, k: int) -> None:
    d = displacement(2, limits.topk_stretch, seed).double()
    units = torch.zeros(d.shape, dtype=torch.int32)
    delta_topk.apply(units, *delta_topk.encode(d, 1.0, UNIT_EXPONENT, k), k)
    left = (d - units.double() * UNIT).square().sum(1)
    mean = d.abs().topk(k, dim=1).values.mean(1)
    assert torch.all(d.square().sum(1) - left >= 8 / 9 * k * mean.square() * (1 - 1e-3))


@pytest.mark.parametrize(
    ("change", "place", "value"),
    [("picks", 0, 24), ("picks", 3, -2), ("picks", 5, 1 << 13), ("picks", 7, 400), ("exponents", 0, -2), ("exponents", 0, 25)],
)
def test_topk_refuses_what_no_encoder_writes(change: str, place: int, value: int) -> None:
    d = displacement(1, 200)
    parts = dict(zip(("picks", "exponents"), delta_topk.encode(d, 1.0, UNIT_EXPONENT, 8), strict=True))
    parts["picks"] = torch.arange(8, dtype=torch.int16) * 2
    assert bool(delta_topk.valid(parts["picks"], parts["exponents"], 200, 8))
    parts[change][place] = value
    assert not bool(delta_topk.valid(parts["picks"], parts["exponents"], 200, 8))


def test_topk_wants_a_sensible_k() -> None:
    for k in (0, limits.topk_stretch + 1):
        with pytest.raises(ValueError, match="between 1 and 4096"):
            delta_topk.encode(displacement(1, 8), 1.0, UNIT_EXPONENT, k)


# -- low rank ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([1, 3, 32, 128]), st.integers(-24, 9), st.integers(0, 1 << 30))
def test_lowrank_decodes_by_integer_arithmetic(rows: int, eighths: int, rank: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randint(-127, 128, (rows, rank), dtype=torch.int8, generator=generator)
    q = torch.randint(-127, 128, (8 * eighths, rank), dtype=torch.int8, generator=generator)
    power = torch.tensor([exponent], dtype=torch.int32)
    got = torch.zeros(rows, 8 * eighths, dtype=torch.int32)
    delta_lowrank.apply(got, p, q, power)
    total = p.to(torch.int64) @ q.to(torch.int64).T
    want = total << exponent if exponent >= 0 else (total + (1 << (-exponent - 1))) >> -exponent
    assert_same_bits("delta", got, want.to(torch.int32))
    assert int(want.abs().max()) <= delta_lowrank.largest_step(p, q, power)


def test_lowrank_finds_a_displacement_of_low_rank() -> None:
    """Rank 3 of spread singular values, 8 directions: the first publication holds all but what int8 rounds away."""
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(96, 3, generator=generator), torch.randn(200, 3, generator=generator)
    d = (left * torch.tensor([4e-2, 1e-2, 2e-3])) @ right.T
    warm = delta_lowrank.start(200, 8)
    units = torch.zeros(d.shape, dtype=torch.int32)
    for _ in range(2):
        delta = delta_lowrank.encode(d, 1.0, UNIT_EXPONENT, warm)
    delta_lowrank.apply(units, *delta)
    assert (d - units * UNIT).norm() < 0.02 * d.norm()


def test_lowrank_warm_start_converges_to_the_best_subspace() -> None:
    generator = torch.Generator().manual_seed(6)
    d = torch.randn(64, 160, generator=generator) * 1e-3
    s = torch.linalg.svdvals(d)
    best = float(s[8:].square().sum().sqrt())
    warm = delta_lowrank.start(160, 8)
    errors = []
    for _ in range(30):
        units = torch.zeros(d.shape, dtype=torch.int32)
        delta_lowrank.apply(units, *delta_lowrank.encode(d, 1.0, UNIT_EXPONENT, warm))
        errors.append(float((d - units * UNIT).norm()))
    assert errors[-1] < errors[0] and errors[-1] < 1.02 * best


def test_lowrank_refined_start_saves_publications_and_nothing_else_moves_it() -> None:
    generator = torch.Generator().manual_seed(6)
    d = (torch.randn(64, 160, generator=generator) * 0.9 ** torch.arange(160)) @ torch.randn(160, 160, generator=generator) * 1e-3
    warm = delta_lowrank.start(160, 8)

    def left(start: Tensor) -> float:
        units = torch.zeros(d.shape, dtype=torch.int32)
        delta_lowrank.apply(units, *delta_lowrank.encode(d, 1.0, UNIT_EXPONENT, start.clone()))
        return float((d - units * UNIT).norm())

    before = left(warm)
    for nothing in (torch.zeros_like(d), d * float("nan")):
        kept = warm.clone()
        delta_lowrank.refine(nothing, kept)
        assert_same_bits("warm", kept, warm)
    delta_lowrank.refine(d, warm)
    assert left(warm) < 0.97 * before


def test_lowrank_directions_come_back_after_a_zero_and_after_a_displacement_of_rank_one() -> None:
    warm = delta_lowrank.start(64, 4)
    delta_lowrank.encode(torch.zeros(32, 64), 1.0, UNIT_EXPONENT, warm)
    delta_lowrank.encode(torch.ones(32, 1) * torch.linspace(-1e-2, 1e-2, 64), 1.0, UNIT_EXPONENT, warm)
    d = displacement(32, 4, seed=9) @ displacement(4, 64, seed=10) * 1e3
    for _ in range(4):
        delta = delta_lowrank.encode(d, 1.0, UNIT_EXPONENT, warm)
    units = torch.zeros(d.shape, dtype=torch.int32)
    delta_lowrank.apply(units, *delta)
    assert (d - units * UNIT).norm() < 0.05 * d.norm()


def test_lowrank_refuses_what_no_encoder_writes() -> None:
    p, q, exponent = (torch.ones(4, 2, dtype=torch.int8), torch.ones(8, 2, dtype=torch.int8), torch.tensor([0], dtype=torch.int32))
    assert bool(delta_lowrank.valid(p, q, exponent))
    assert bool(delta_lowrank.valid(p * 0, q * 0, exponent))
    assert not bool(delta_lowrank.valid(p * 0, q, exponent))
    assert not bool(delta_lowrank.valid(p * 0, q * 0, exponent - 1))
    assert not bool(delta_lowrank.valid(p - 129, q, exponent))
    for wrong in (limits.lowrank_max_exponent + 1, limits.lowrank_min_exponent - 1):
        assert not bool(delta_lowrank.valid(p, q, torch.tensor([wrong], dtype=torch.int32)))


def test_lowrank_wants_a_sensible_rank() -> None:
    with pytest.raises(ValueError, match="between 1 and 128"):
        delta_lowrank.start(128, 129)
