"""The update in host memory: C, torch and the reference give the same bits, and those of optimizer_step with pack_weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tscale_kernels import host_native, host_update
from tscale_kernels.host_update import HostScalars
from tscale_kernels.optimizer_step import ALL_FINITE, UpdateMatrix, UpdatePlan, optimizer_step, step_scalars
from tscale_kernels.pack_weights import PackMatrix, PackPlan, pack_weights
from tscale_kernels.testing import assert_same_bits

SHAPES = ((1, 128), (3, 384), (40, 1280), (129, 256), (5, 4224))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, built once; skips where no compiler is."""
    if not any(shutil.which(name) for name in host_native.COMPILERS):
        pytest.skip("no C compiler on this machine")
    folder = tmp_path_factory.mktemp("host update")
    assert host_native.host_library(folder).functions is not None, host_native.host_library(folder).reason
    return folder


def hosts(built: Path) -> list[host_update.HostBackend]:
    return [host_update.choose_host(2, forced="native", cache_folder=built), host_update.choose_host(2, forced="torch")]


def numbers(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, momentum, gradient (bf16) of rows of very different size, with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(2 * torch.randn(rows, 1, generator=generator))
    w = torch.randn(rows, columns, generator=generator) * 0.5
    m = torch.randn(rows, columns, generator=generator)
    g = (torch.randn(rows, columns, generator=generator) * size * 1e-3).bfloat16()
    g[0, :4] = torch.tensor([0.0, -0.0, 1e-38, -1e30])
    w[0, 0], w[-1, -1] = -0.0, 40.0
    return w, m, g


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("per_row", [False, True])
def test_every_way_gives_the_bits_of_the_reference(built: Path, shape: tuple[int, int], per_row: bool) -> None:
    w, m, g = numbers(*shape, seed=1)
    multipliers = -torch.rand(shape[0] if per_row else 1)
    scalars = HostScalars.of(0.01, 0.93, 7.5, l2=0.02)
    want_w, want_m, want_squares = w.clone(), m.clone(), torch.empty(host_update.blocks(w.numel()), dtype=torch.float64)
    host_update.ref_update(want_w, want_m, g, multipliers=multipliers, scalars=scalars, weight_squares=want_squares)
    unit = host_update.unit_of(want_squares, w.numel(), torch.int8)
    want_codes = torch.empty(shape, dtype=torch.int8)
    host_update.ref_encode_weights(want_w, unit, want_codes)
    for host in hosts(built):
        got_w, got_m, squares = w.clone(), m.clone(), torch.full_like(want_squares, float("nan"))
        host_update.update(got_w, got_m, g, multipliers=multipliers, scalars=scalars, weight_squares=squares, host=host)
        assert_same_bits(f"weights {host.name}", got_w, want_w)
        assert_same_bits(f"momentum {host.name}", got_m, want_m)
        assert_same_bits(f"squares {host.name}", squares, want_squares)
        again = torch.full_like(squares, float("nan"))
        host_update.weight_squares_of(got_w, again, host)
        assert_same_bits(f"squares again {host.name}", again, want_squares)
        codes = torch.full(shape, 85, dtype=torch.int8)
        host_update.encode_weights(got_w, unit, codes, host)
        assert_same_bits(f"codes {host.name}", codes, want_codes)


def test_it_is_the_optimizer_step_and_the_packing_of_the_device(built: Path) -> None:
    """Two matrices, one with rows, three steps: weights, momentum, units and codes are those of the device's operations, bit for bit."""
    shapes, per_row = ((24, 256), (40, 384)), (True, False)
    sizes = [rows * columns for rows, columns in shapes]
    starts = [0, sizes[0]]
    plan = UpdatePlan([UpdateMatrix(s, *shape, per_row=rows) for s, shape, rows in zip(starts, shapes, per_row, strict=True)], "cpu")
    packs = PackPlan([PackMatrix(s, *shape) for s, shape in zip(starts, shapes, strict=True)], "cpu")
    codes, codes_t = torch.empty(packs.elements, dtype=torch.int8), torch.empty(packs.transposed_elements, dtype=torch.int8)
    units, squares = torch.empty(packs.units), torch.empty(packs.blocks, dtype=torch.float64)
    w = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(3)) * 0.5
    m, sums = torch.zeros_like(w), torch.zeros(plan.moments)
    host = hosts(built)[0]
    own_w, own_m, own_sums = w.clone(), m.clone(), sums.clone()
    count = 0.0
    for step in range(3):
        g = (torch.randn(len(w), generator=torch.Generator().manual_seed(10 + step)) * 1e-2).bfloat16()
        beta = 1 - 0.5 / (1 + step) ** 0.5
        count = beta * count + 1
        scalars = torch.tensor(step_scalars(0.02, beta, count, 0.1))
        bad = torch.tensor([ALL_FINITE], dtype=torch.int32)
        optimizer_step(w, m, g.float(), plan, scalars=scalars, moment_sums=sums, bad_matrix=bad)
        pack_weights(w, packs, codes=codes, codes_t=codes_t, units=units, square_sums=squares)

        means = torch.cat([
            host_squares(g[: sizes[0]].view(shapes[0]), host) / shapes[0][1],
            (host_squares(g[sizes[0] :].view(shapes[1]), host).sum() / sizes[1]).view(1),
        ])  # fmt: skip
        own = HostScalars.of(0.02, beta, count, 0.1)
        own_sums.mul_(1.0 - scalars[1]).add_(means.float())
        multipliers = torch.where(own_sums > 0, -torch.rsqrt(own_sums * own.inverse_count), 0.0)
        for index, (start, size, many) in enumerate(zip(starts, sizes, multipliers.split([shapes[0][0], 1]), strict=True)):
            part = slice(start, start + size)
            weight_squares, own_codes = torch.empty(host_update.blocks(size), dtype=torch.float64), torch.empty(size, dtype=torch.int8)
            host_update.update(own_w[part], own_m[part], g[part], multipliers=many, scalars=own, weight_squares=weight_squares, host=host)
            unit = host_update.unit_of(weight_squares, size, torch.int8)
            host_update.encode_weights(own_w[part], unit, own_codes, host)
            assert unit == float(units[index])
            rows = shapes[index][0]
            assert_same_bits(f"codes {index}", own_codes.view(shapes[index]), packs.codes_of(codes, index)[:rows].contiguous())
        assert_same_bits("weights", own_w, w)
        assert_same_bits("momentum", own_m, m)


def host_squares(g: Tensor, host: host_update.HostBackend) -> Tensor:
    out = torch.empty(len(g), dtype=torch.float64)
    host_update.row_squares(g.contiguous(), out, host)
    return out


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 1 << 30))
def test_row_squares_and_sums_of_gradients(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, 128 * groups, generator=generator).bfloat16() for _ in range(2))
    for host in (host_update.choose_host(2), host_update.choose_host(2, forced="torch")):
        assert_same_bits(f"rows {host.name}", host_squares(a, host).float(), host_update.ref_row_squares(a).float())
        total = a.clone()
        host_update.add_gradient(total, b, host)
        assert_same_bits(f"sum {host.name}", total, (a.float() + b.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_other_codes_are_made_by_torch(built: Path, dtype: torch.dtype) -> None:
    w, _, _ = numbers(5, 384, seed=4)
    for host in hosts(built):
        codes = torch.empty(5, 384, dtype=dtype)
        host_update.encode_weights(w, 0.02, codes, host)
        want = torch.empty(5, 384, dtype=dtype)
        host_update.ref_encode_weights(w, 0.02, want)
        assert_same_bits(f"{dtype} {host.name}", codes, want)


def test_a_matrix_of_zeros_has_unit_zero_and_codes_zero(built: Path) -> None:
    w = torch.zeros(2, 128)
    squares, codes = torch.empty(1, dtype=torch.float64), torch.full((2, 128), 85, dtype=torch.int8)
    for host in hosts(built):
        host_update.weight_squares_of(w, squares, host)
        assert host_update.unit_of(squares, 256, torch.int8) == 0
        host_update.encode_weights(w, 0.0, codes, host)
        assert int(codes.abs().max()) == 0


def test_sizes_and_types_that_do_not_fit_are_refused(built: Path) -> None:
    w, m, g = numbers(4, 128, seed=5)
    squares, one = torch.empty(1, dtype=torch.float64), torch.ones(1)
    scalars = HostScalars.of(0.01, 0.9, 1.0)
    for host in hosts(built):
        for kwargs in (
            {"multipliers": torch.ones(3), "weight_squares": squares},
            {"multipliers": one, "weight_squares": squares.repeat(2)},
        ):
            with pytest.raises(ValueError):
                host_update.update(w, m, g, scalars=scalars, host=host, **kwargs)
        for bad in ((w.double(), m, g), (w, m.t(), g), (w, m, g.float())):
            with pytest.raises(ValueError, match="contiguous"):
                host_update.update(*bad, multipliers=one, scalars=scalars, weight_squares=squares, host=host)
        with pytest.raises(ValueError, match="multiples of 128"):
            host_update.row_squares(g[:, :64].contiguous(), torch.empty(4, dtype=torch.float64), host)


# -- the library -------------------------------------------------------------------------------------------------------


def test_without_a_compiler_torch_does_it_and_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_native, "COMPILERS", ("no-such-compiler",))
    host = host_update.choose_host(3, cache_folder=tmp_path / "a")
    assert host.name == "torch" and "no C compiler (no-such-compiler)" in host.reason and "\n" not in host.reason
    with pytest.raises(ValueError, match="no C compiler"):
        host_update.choose_host(3, forced="native", cache_folder=tmp_path / "a")


def test_a_compiler_that_fails_is_told_of_and_leaves_nothing(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_native, "FLAGS", ("-fno-such-flag", "-shared"))
    library = host_native.host_library(tmp_path / "b")
    assert library.functions is None and "failed" in library.reason and "\n" not in library.reason
    assert list((tmp_path / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_error(built: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert host_native.host_library(blocked / "c").functions is None


def test_the_library_is_built_once(built: Path) -> None:
    files = list(built.iterdir())
    assert len(files) == 1 and files[0].suffix == ".so"
    made = files[0].stat().st_mtime_ns
    host_native.host_library.cache_clear()
    assert host_native.host_library(built).functions is not None
    assert files[0].stat().st_mtime_ns == made
