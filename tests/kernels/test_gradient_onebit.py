"""One-bit gradients: nothing is lost on the way, for any number of authors; the kernels give the reference's bits."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_kernels import gradient_onebit as op
from tscale_kernels.dispatch import has_triton

ROOT = Path(__file__).resolve().parents[2]


@settings(max_examples=25, deadline=None)
@given(authors=st.integers(1, 9), steps=st.integers(1, 12), seed=st.integers(0, 1 << 30), silent=st.booleans())
def test_what_is_not_delivered_is_still_there(authors: int, steps: int, seed: int, silent: bool) -> None:
    """Sum of the mean gradients = sum of what was delivered + mean tail + residual, with a constant scale."""
    generator = torch.Generator().manual_seed(seed)
    groups = 3
    n = groups * 128
    scale = 0.5 + torch.rand(groups, generator=generator)
    if silent:
        scale[1] = 0.0
    tails = torch.zeros(authors, n)
    residual, decoded = torch.zeros(n, dtype=torch.int16), torch.zeros(n)
    put_in, delivered = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    received, out = torch.zeros(authors, n // 8, dtype=torch.uint8), torch.zeros(n // 8, dtype=torch.uint8)
    size = torch.zeros(groups, dtype=torch.uint8)
    for _ in range(steps):
        for author in range(authors):
            gradient = torch.randn(n, generator=generator)
            op.encode(gradient, tails[author], scale, received[author])
            put_in += gradient.double() / authors
        op.average(received, residual, scale, out, size)
        op.decode(out, size, scale, decoded, authors)
        delivered += decoded.double()
    kept = tails.double().mean(0) + residual.double() * scale.double().repeat_interleave(128) / (op.UNITS * authors)
    assert torch.allclose(put_in, delivered + kept, atol=1e-4)
    if silent:
        assert float(delivered.view(groups, -1)[1].abs().max()) == 0.0


@pytest.mark.parametrize("authors", [1, 2, 3, 8, 63])
def test_residuals_stay_bounded_whatever_the_authors_send(authors: int) -> None:
    """All of one mind about a few elements, at odds about the rest, for long: the worst that the mean size could be misled by."""
    generator = torch.Generator().manual_seed(authors)
    residual, out, size = torch.zeros(128, dtype=torch.int16), torch.zeros(16, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    for _ in range(300):
        received = torch.randint(0, 256, (authors, 16), dtype=torch.uint8, generator=generator)
        received[:, 0] = 0
        op.average(received, residual, torch.ones(1), out, size)
        assert int(residual.abs().max()) <= 4 * op.UNITS * authors


def test_an_average_at_full_size_is_majority_and_parity() -> None:
    """TScale's table for two: the result is the majority of both bits and the carry, the new carry is their parity."""
    cases = list(itertools.product((0, 1), repeat=3))
    a, b, carry = (torch.tensor([case[i] for case in cases], dtype=torch.uint8).repeat(16) for i in range(3))
    received = torch.stack([op._pack(bits.bool()) for bits in (a, b)])
    residual = op.UNITS * (1 - 2 * carry.to(torch.int16))
    residual[-1] = 1000  # makes the group loud
    out, size = torch.zeros(16, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    op.average(received, residual, torch.ones(1), out, size)
    assert int(size) == 2 * op.UNITS
    assert (op._signs(out, torch.int16) < 0)[:-1].tolist() == ((a + b + carry) >= 2)[:-1].tolist()
    assert (residual < 0)[:-1].tolist() == (a ^ b ^ carry).bool()[:-1].tolist()
    assert set(residual[:-1].abs().tolist()) == {op.UNITS}


def test_an_average_is_as_loud_as_the_authors_agree() -> None:
    """Random bits of 16 authors: their mean has an RMS of 1 / 4; equal bits come through at full size."""
    generator = torch.Generator().manual_seed(1)
    n, authors = 128 * 64, 16
    residual, out, size = (
        torch.zeros(n, dtype=torch.int16),
        torch.zeros(n // 8, dtype=torch.uint8),
        torch.zeros(n // 128, dtype=torch.uint8),
    )
    for _ in range(20):
        received = torch.randint(0, 256, (authors, n // 8), dtype=torch.uint8, generator=generator)
        op.average(received, residual, torch.ones(n // 128), out, size)
    assert 0.2 < float(size.float().mean()) / (op.UNITS * authors) < 0.35
    residual.zero_()
    op.average(received[:1].expand(authors, -1).contiguous(), residual, torch.ones(n // 128), out, size)
    assert (size == op.UNITS * authors).all() and torch.equal(out, received[0]) and not residual.any()


def test_a_steady_gradient_below_the_scale_arrives_on_average() -> None:
    tail, bits, out, decoded = torch.zeros(128), torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8), torch.zeros(128)
    residual, total, scale, size = torch.zeros(128, dtype=torch.int16), torch.zeros(128), torch.ones(1), torch.zeros(1, dtype=torch.uint8)
    for _ in range(1000):
        op.encode(torch.full((128,), 0.3), tail, scale, bits)
        op.average(bits.view(1, -1), residual, scale, out, size)
        op.decode(out, size, scale, decoded, 1)
        total += decoded
    assert torch.allclose(total / 1000, torch.full((128,), 0.3), atol=3e-3)


def test_wrong_lengths_are_refused() -> None:
    g, bits = torch.zeros(128), torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 scales do not fit 128 elements"):
        op.encode(g, g.clone(), torch.ones(2), bits)
    with pytest.raises(ValueError, match="15 bytes"):
        op.encode(g, g.clone(), torch.ones(1), bits[:15])
    with pytest.raises(ValueError, match="64 authors"):
        op.average(torch.zeros(64, 16, dtype=torch.uint8), torch.zeros(128, dtype=torch.int16), torch.ones(1), bits, bits[:1])
    with pytest.raises(ValueError, match="2 sizes"):
        op.average(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(128, dtype=torch.int16), torch.ones(1), bits, bits[:2])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_same_bits_as_the_reference(device: str) -> None:
    """In its own process: Triton reads the variable that chooses its interpreter when a kernel is defined."""
    if not has_triton():
        pytest.skip("triton is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "."))
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0", "PYTHONPATH": paths}
    script = ROOT / "tests" / "kernels" / "interpreted_gradient_onebit.py"
    done = subprocess.run([sys.executable, str(script), device], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "same bits"


@pytest.mark.parametrize("name", ["encode", "average", "decode"])
def test_compiles_ahead_of_time_without_spilling(name: str) -> None:
    if not has_triton():
        pytest.skip("triton is not installed")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types = {
        "encode": (op.encode_kernel, ("*fp32", "*fp32", "*fp32", "*u8", "i32")),
        "average": (op.average_kernel, ("*u8", "*i16", "*fp32", "*u8", "*u8", "i32", "constexpr", "constexpr", "constexpr")),
        "decode": (op.decode_kernel, ("*u8", "*u8", "*fp32", "*fp32", "i32", "fp32")),
    }[name]
    signature = dict(zip(kernel.arg_names, (*types, "constexpr"), strict=True))
    values = {"GROUPS": op._BLOCK_GROUPS} | ({"AUTHORS": 3, "UNITS": op.UNITS, "LOUDEST": op._LOUDEST} if name == "average" else {})
    constants = {(kernel.arg_names.index(key),): value for key, value in values.items()}
    compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]
