"""The Triton kernels of one-bit gradients against the reference, bit for bit, for a process with TRITON_INTERPRET=1 (or a CUDA device)."""

import sys

import torch

from tscale_kernels import gradient_onebit as op
from tscale_kernels.testing import assert_same_bits, poisoned


def check(groups: int, authors: int, device: str) -> None:
    case = f"{groups} groups, {authors} authors on {device}"
    generator = torch.Generator().manual_seed(groups * authors)
    n = groups * 128
    scale = torch.rand(groups, generator=generator)
    scale[groups // 2] = 0.0
    scale = scale.to(device)
    received = torch.zeros(authors, n // 8, dtype=torch.uint8, device=device)
    for author in range(authors):
        g, tail = (torch.randn(n, generator=generator).to(device) for _ in range(2))
        want_tail, got_tail, got = tail.clone(), tail.clone(), poisoned((n // 8,), torch.uint8, device)
        op.encode(g, want_tail, scale, received[author], backend="ref")
        op.encode(g, got_tail, scale, got, backend="triton")
        assert_same_bits(f"bits {case}", got, received[author])
        assert_same_bits(f"tail {case}", got_tail, want_tail)
    residual = torch.randint(-9 * authors, 9 * authors, (n,), dtype=torch.int16, generator=generator).to(device)
    residual[0] = 17 * authors  # a group that is decoded at full size
    for _ in range(3):
        want_residual, got_residual = residual.clone(), residual.clone()
        want, got = poisoned((n // 8,), torch.uint8, device), poisoned((n // 8,), torch.uint8, device)
        size, got_size = poisoned((groups,), torch.uint8, device), poisoned((groups,), torch.uint8, device)
        op.average(received, want_residual, scale, want, size, backend="ref")
        op.average(received, got_residual, scale, got, got_size, backend="triton")
        assert_same_bits(f"size {case}", got_size, size)
        assert_same_bits(f"residual {case}", got_residual, want_residual)
        assert_same_bits(f"average {case}", got, want)
        residual = want_residual
    want_g, got_g = poisoned((n,), torch.float32, device), poisoned((n,), torch.float32, device)
    op.decode(want, size, scale, want_g, authors, backend="ref")
    op.decode(want, size, scale, got_g, authors, backend="triton")
    assert_same_bits(f"gradient {case}", got_g, want_g)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    for groups, authors in ((1, 1), (3, 2), (16, 3), (37, 4), (1, 63)):
        check(groups, authors, device)
    print("same bits")


if __name__ == "__main__":
    main()
