"""The Triton kernels of the one-bit delta against the reference, for a process with TRITON_INTERPRET=1 (or a CUDA device as argument).

Run by test_delta_onebit_triton.py. Bits and integer results must be equal bit for bit; steps may differ by one code where a
row's mean lies at a rounding boundary, since fp32 sums have another order.
"""

import sys

import torch

from tscale_kernels import delta_onebit as op
from tscale_kernels.testing import AWKWARD_SHAPES, assert_same_bits, poisoned

UNIT_EXPONENT = -22


def check(rows: int, cols: int, device: str) -> None:
    case = f"{rows}x{cols} on {device}"
    generator = torch.Generator().manual_seed(rows * cols)
    d = (torch.randn(rows, cols, generator=generator) * 1e-2).to(device)
    d[0, :2] = torch.tensor([0.0, -0.0])
    bits, steps = op.encode(d, 0.37, UNIT_EXPONENT, backend="ref")
    got_bits, got_steps = op.encode(d, 0.37, UNIT_EXPONENT, backend="triton")
    assert_same_bits(f"bits {case}", got_bits, bits)
    assert torch.all((got_steps - steps).abs() <= 1 + steps * 2.0**-10), f"steps {case}"

    start = torch.randint(-(1 << 20), 1 << 20, (rows, cols), dtype=torch.int32, generator=generator).to(device)
    for sign in (1, -1):
        want, got = start.clone(), start.clone()
        op.apply(want, bits, steps, sign, backend="ref")
        op.apply(got, bits, steps, sign, backend="triton")
        assert_same_bits(f"basepoint {case}", got, want)
    flipped = (bits ^ 0x5A, (steps * 3) % 1000)
    want, got = start.clone(), start.clone()
    for several_bits, several_steps in ((bits, steps), flipped, (bits, steps)):
        op.apply(want, several_bits, several_steps, backend="ref")
    stacked = torch.stack([bits, flipped[0], bits]), torch.stack([steps, flipped[1], steps])
    op.apply_many(got, *stacked, backend="triton")
    assert_same_bits(f"several at once {case}", got, want)
    amounts = steps.float() * 2.0**UNIT_EXPONENT
    want_d, got_d = d.clone(), d.clone()
    op.leak(want_d, bits, amounts, backend="ref")
    op.leak(got_d, bits, amounts, backend="triton")
    assert_same_bits(f"displacement {case}", got_d, want_d)


def check_poisoned_outputs(device: str) -> None:
    """Every element of the outputs is written."""
    d = torch.ones(5, 264, device=device)
    mean, bits = poisoned((5,), torch.float32, device), poisoned((5 * 33,), torch.uint8, device)
    op.encode_kernel[(5,)](d, mean, bits, 264, 1.0 / 264, BYTES=32)
    assert int(bits.max()) == 0 and float((mean - 1).abs().max()) < 1e-6


def check_zero_and_bad_rows(device: str) -> None:
    d = torch.zeros(3, 128, device=device)
    d[1, 5] = -1e-30
    assert op.encode(d, 1.0, UNIT_EXPONENT, backend="triton")[1].tolist() == [0, 1, 0]
    d[2, 7] = float("nan")
    try:
        op.encode(d, 1.0, UNIT_EXPONENT, backend="triton")
    except ValueError:
        return
    raise AssertionError("NaN was encoded")


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    for rows, cols in AWKWARD_SHAPES:
        check(rows, cols, device)
    check_poisoned_outputs(device)
    check_zero_and_bad_rows(device)
    print("same bits")


if __name__ == "__main__":
    main()
