"""Forward products against the plain-torch model: rows in kernel order, rotation of adjacent pairs, normalisation, relu, residual."""

import numpy as np
import pytest
import torch
from test_checking import run_script

from tscale_fed.model.combiner import blocked_channels
from tscale_fed.model.normalise import normalise_ref
from tscale_fed.model.rotary import rotary_table, rotate
from tscale_kernels import codes, dispatch, matmul_addnorm, matmul_norm, normalise
from tscale_kernels.testing import assert_close, assert_same_bits, poisoned

TOKENS, WIDTH, HEADS, ROWS = 40, 256, 2, 128
CODES = (torch.int8, torch.float8_e4m3fn, torch.bfloat16)
STORED = {torch.int8: 1.3e-2, torch.float8_e4m3fn: 3e-2, torch.bfloat16: 3e-3}
"""Relative error of a unit-RMS Gaussian vector in codes (spec/model.md 8.1)."""


def vectors(shape: tuple[int, ...], code: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return codes.encode(torch.randn(shape, generator=generator) * codes.vector_scale(code), code)


def weights(shape: tuple[int, ...], code: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return codes.encode(torch.randn(shape, generator=generator) * codes.weight_scale(code), code)


def rotary_rows(heads: int) -> torch.Tensor:
    """Natural row at each place of the kernel order: pairs (b + k, b + k + 32) become adjacent."""
    pairs = torch.arange(128).view(2, 2, 32).transpose(1, 2).reshape(128)
    return (torch.arange(heads)[:, None] * 128 + pairs).flatten()


def lin(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.T / w.shape[1] ** 0.5


@pytest.mark.parametrize("code", CODES, ids=str)
def test_project_is_the_models_projection(code: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a = 128 * HEADS
    n, w = vectors((ROWS, WIDTH), code, generator), weights((4 * a, WIDTH), code, generator)
    units = torch.rand(4, generator=generator) / codes.weight_scale(code)
    cosine, sine = rotary_table(TOKENS, torch.device("cpu"), torch.float32)
    out = {name: poisoned((ROWS, a), code) for name in ("query", "key", "gate", "value")}
    rms = poisoned((4 * HEADS, ROWS), torch.float32)
    matmul_norm.project(n, w, units, cosine=cosine.view(-1, 64), sine=sine.view(-1, 64), **out, rms=rms)

    state = n.double() / codes.vector_scale(code)
    pairs, blocks = rotary_rows(HEADS), blocked_channels(HEADS)
    turn = [table.double()[torch.arange(ROWS) % TOKENS] for table in (cosine, sine)]
    for segment, (name, rows) in enumerate({"query": pairs, "key": pairs, "gate": blocks, "value": blocks}.items()):
        natural = torch.empty(a, WIDTH, dtype=torch.double)
        natural[rows] = w[segment * a : (segment + 1) * a].double() * units[segment].double()
        projected = lin(state, natural).view(1, ROWS, HEADS, 128)
        root = projected.square().mean(-1).sqrt().view(ROWS, HEADS)
        want = projected if name == "key" else normalise_ref(projected)
        if name in ("query", "key"):
            want = rotate(want, turn[0], turn[1])
        got = (out[name].double() / codes.vector_scale(code)).view(ROWS, HEADS, 128)
        if name == "key":
            got = got * root[:, :, None]
        assert_close(name, got.flatten(1), want.view(ROWS, a)[:, rows], STORED[code])
        assert_close(f"rms of {name}", rms[segment * HEADS : (segment + 1) * HEADS].T.double(), root, 1e-6)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_expand_is_the_models_hidden_layer(code: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    n, w = vectors((ROWS, WIDTH), code, generator), weights((384, WIDTH), code, generator)
    unit = torch.full((1,), 0.02)
    hidden, active, rms = poisoned((ROWS, 384), code), poisoned((ROWS, 384), code), poisoned((3, ROWS), torch.float32)
    matmul_norm.expand(n, w, unit, hidden=hidden, active=active, rms=rms)
    scale = codes.vector_scale(code)
    want = lin(n.double() / scale, w.double() * unit.double())
    assert_close("hidden", hidden.double() / scale, normalise_ref(want), STORED[code])
    assert_close("active", active.double(), hidden.double().relu(), 0.0)
    assert_close("rms", rms.T.double(), want.unflatten(1, (3, 128)).square().mean(2).sqrt(), 1e-6)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", CODES, ids=str)
def test_add_normalise_is_residual_and_normalisation(code: torch.dtype, stream: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a, w = vectors((ROWS, 384), code, generator), weights((WIDTH, 384), code, generator)
    x = torch.randn(ROWS, WIDTH, generator=generator).to(stream)
    unit, scale = torch.full((1,), 0.7) / codes.weight_scale(code), codes.vector_scale(code)
    want = x.double() + lin(a.double() / scale, w.double() * unit.double())
    n, rms = poisoned((ROWS, WIDTH), code), poisoned((2, ROWS), torch.float32)
    matmul_addnorm.add_normalise(a, w, unit, a_scale=scale, x=x, n=n, rms=rms)
    assert_close("x", x.double(), want, 1e-6 if stream == torch.float32 else 3e-3)
    assert_close("n", n.double() / codes.vector_scale(code), normalise_ref(want), STORED[code])
    assert_close("rms", rms.T.double(), want.unflatten(1, (2, 128)).square().mean(2).sqrt(), 1e-6)


def test_groups_of_zeros_give_zero_codes_and_zero_rms() -> None:
    n, w = torch.zeros(128, 128, dtype=torch.int8), torch.ones(128, 128, dtype=torch.int8)
    hidden, active, rms = poisoned((128, 128), torch.int8), poisoned((128, 128), torch.int8), poisoned((1, 128), torch.float32)
    matmul_norm.expand(n, w, torch.ones(1), hidden=hidden, active=active, rms=rms)
    assert int(hidden.abs().max()) == 0 and int(active.abs().max()) == 0 and float(rms.abs().max()) == 0


def test_wrong_shapes_are_refused() -> None:
    n, w = torch.zeros(128, 128, dtype=torch.int8), torch.zeros(128, 256, dtype=torch.int8)
    out, rms = torch.zeros(128, 128, dtype=torch.int8), torch.zeros(1, 128)
    with pytest.raises(ValueError, match="belong together"):
        matmul_norm.expand(n, w, torch.ones(1), hidden=out, active=out, rms=rms)
    with pytest.raises(ValueError, match="differ"):
        matmul_addnorm.add_normalise(n, w, torch.ones(1), a_scale=1.0, x=torch.zeros(128, 128), n=out, rms=rms)


@pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed (pip install 'tscale-fed[interp]')")
@pytest.mark.parametrize("words", [["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "all"])
def test_operands_by_pointer_give_the_same_as_the_reference(words: list[str]) -> None:
    done = run_script("interpreted_pointers.py", "cases_matmul", "--processes", "1", *words)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_roots_are_correctly_rounded_and_sums_have_the_prescribed_order() -> None:
    values = torch.randn(500, 256, generator=torch.Generator().manual_seed(4)) * 1e3
    scaled, root = normalise.ref_normalise(values, 24.0)
    squares = (values * values).view(500, 2, 128).numpy()
    for half in (64, 32, 16, 8):
        squares = squares[..., :half] + squares[..., half:]
    quads = (squares[..., 0::2] + squares[..., 1::2]).astype(np.float64)
    want = np.sqrt(quads.sum(-1).astype(np.float32) * np.float32(1 / 128))
    assert_same_bits("root", root, torch.from_numpy(want))
    assert_same_bits("scaled", scaled, (values.view(500, 2, 128) * torch.from_numpy(np.float32(24) / want)[:, :, None]).flatten(1))
