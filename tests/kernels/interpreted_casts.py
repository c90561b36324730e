"""Casts and dots of the fixed interpreter against torch, in a process of its own; run by test_checking.py."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import interpreter_fix
import torch
import triton
import triton.language as tl

from tscale_kernels.testing import assert_close, assert_same_bits

TYPES = {torch.bfloat16: tl.bfloat16, torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5, torch.float16: tl.float16}


@triton.jit
def cast_kernel(x, y, N: tl.constexpr, TARGET: tl.constexpr):  # type: ignore[no-untyped-def]
    o_value = tl.arange(0, N)
    tl.store(y + o_value, tl.load(x + o_value).to(TARGET))


@triton.jit
def dot_kernel(x, y, z, N: tl.constexpr):  # type: ignore[no-untyped-def]
    o_value = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(z + o_value, tl.dot(tl.load(x + o_value), tl.load(y + o_value).T))


@triton.jit
def double_kernel(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    o_value = tl.arange(0, N)
    tl.store(x + o_value, tl.load(x + o_value) + tl.load(x + o_value))


def check_casts() -> None:
    special = [0.0, -0.0, 31.8, 448.0, 449.0, 464.0, 1e9, -1e9, float("inf"), -float("inf"), 3e-9, 1.0 + 2**-8, 1.0 + 3 * 2**-8]
    values = torch.cat([torch.randn(4096 - len(special)) * torch.logspace(-9, 4, 4096 - len(special)), torch.tensor(special)])
    for dtype, target in TYPES.items():
        got, back = torch.empty(4096, dtype=dtype), torch.empty(4096)
        cast_kernel[(1,)](values, got, 4096, target)
        largest = torch.finfo(dtype).max if dtype.itemsize == 1 else torch.inf
        assert_same_bits(f"fp32 to {dtype}", got, values.clamp(-largest, largest).to(dtype))
        cast_kernel[(1,)](got, back, 4096, tl.float32)
        assert_same_bits(f"{dtype} to fp32", back, got.float())
    integers, again = torch.arange(-2048, 2048, dtype=torch.int32), torch.empty(4096, dtype=torch.int32)
    rounded = torch.empty(4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](integers, rounded, 4096, tl.bfloat16)
    assert_same_bits("int32 to bf16", rounded, integers.to(torch.bfloat16))
    cast_kernel[(1,)](rounded, again, 4096, tl.int32)
    assert_same_bits("bf16 to int32", again, rounded.to(torch.int32))


def check_dots() -> None:
    for dtype in (*TYPES, torch.int8, torch.float32):
        x, y = ((torch.randn(64, 64) * 30).clamp(-127, 127).to(dtype) for _ in range(2))
        got = torch.empty(64, 64, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
        dot_kernel[(1,)](x, y, got, 64)
        assert_close(f"dot of {dtype}", got, x.double() @ y.double().T, 0.0 if dtype == torch.int8 else 3e-7)


def check_a_renamed_function_is_noticed() -> None:
    builder = interpreter_fix.interpreter.InterpreterBuilder
    original = builder.create_dot
    del builder.create_dot
    try:
        interpreter_fix.install()
    except RuntimeError as error:
        assert "create_dot" in str(error), error
    else:
        raise AssertionError("a renamed function was not noticed")
    builder.create_dot = original


def check_arithmetic_on_bits_is_refused() -> None:
    try:
        double_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), 16)
    except Exception as error:
        assert "cast to fp32 first" in str(error), error
    else:
        raise AssertionError("arithmetic on bf16 was not refused")


if __name__ == "__main__":
    check_a_renamed_function_is_noticed()
    interpreter_fix.install()
    check_casts()
    check_dots()
    check_arithmetic_on_bits_is_refused()
