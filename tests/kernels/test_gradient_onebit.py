"""One-bit gradients: nothing is lost on the way, any number of authors, TScale's rule for two; the kernels give the reference's bits."""

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
    residual = torch.full((n,), op.first_residual(authors), dtype=torch.int8)
    put_in, delivered = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    received, out, decoded = torch.zeros(authors, n // 8, dtype=torch.uint8), torch.zeros(n // 8, dtype=torch.uint8), torch.zeros(n)
    for _ in range(steps):
        for author in range(authors):
            gradient = torch.randn(n, generator=generator)
            op.encode(gradient, tails[author], scale, received[author])
            put_in += gradient.double() / authors
        op.average(received, residual, scale, out)
        op.decode(out, scale, decoded)
        delivered += decoded.double()
        assert int(residual.abs().max()) <= max(authors - 1, op.first_residual(authors))
    kept = tails.double().mean(0) + (residual.double() - op.first_residual(authors)) * scale.double().repeat_interleave(128) / authors
    assert torch.allclose(put_in, delivered + kept, atol=1e-4)
    if silent:
        assert float(delivered.view(groups, -1)[1].abs().max()) == 0.0


def test_two_authors_follow_majority_and_parity() -> None:
    """TScale's table: the result is the majority of both bits and the carry, the new carry is their parity."""
    cases = list(itertools.product((0, 1), repeat=3))
    a, b, carry = (torch.tensor([case[i] for case in cases], dtype=torch.uint8) for i in range(3))
    pack = (1 << torch.arange(8)).to(torch.uint8)
    received = torch.stack([(bits * pack).sum(dtype=torch.uint8).view(1) for bits in (a, b)])
    residual, out = (1 - 2 * carry.to(torch.int8)), torch.zeros(1, dtype=torch.uint8)
    op.average(received, residual, torch.ones(8), out)
    assert [(int(out) >> i) & 1 for i in range(8)] == ((a + b + carry) >= 2).int().tolist()
    assert (residual < 0).int().tolist() == (a ^ b ^ carry).int().tolist()


def test_a_steady_gradient_below_the_scale_arrives_on_average() -> None:
    tail, bits, out, decoded = torch.zeros(128), torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8), torch.zeros(128)
    residual, total, scale = torch.zeros(128, dtype=torch.int8), torch.zeros(128), torch.ones(1)
    for _ in range(1000):
        op.encode(torch.full((128,), 0.3), tail, scale, bits)
        op.average(bits.view(1, -1), residual, scale, out)
        op.decode(out, scale, decoded)
        total += decoded
    assert torch.allclose(total / 1000, torch.full((128,), 0.3), atol=2e-3)


def test_wrong_lengths_are_refused() -> None:
    g, bits = torch.zeros(128), torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 scales do not fit 128 elements"):
        op.encode(g, g.clone(), torch.ones(2), bits)
    with pytest.raises(ValueError, match="15 bytes"):
        op.encode(g, g.clone(), torch.ones(1), bits[:15])
    with pytest.raises(ValueError, match="129 authors"):
        op.average(torch.zeros(129, 16, dtype=torch.uint8), torch.zeros(128, dtype=torch.int8), torch.ones(1), bits)


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
        "average": (op.average_kernel, ("*u8", "*i8", "*fp32", "*u8", "i32", "constexpr")),
        "decode": (op.decode_kernel, ("*u8", "*fp32", "*fp32", "i32")),
    }[name]
    signature = dict(zip(kernel.arg_names, (*types, "constexpr"), strict=True))
    values = {"GROUPS": op._BLOCK_GROUPS} | ({"AUTHORS": 3} if name == "average" else {})
    constants = {(kernel.arg_names.index(key),): value for key, value in values.items()}
    compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]
