"""What kernels are measured against, in the same run: bf16 cuBLAS, torch's own attention, a plain copy.

Enters: sizes. Leaves: closures for kernel_timing.time_calls, each on its own buffers.
Attention: strict past plus a zero sink is causal attention over keys and values that are shifted by one token, with a zero key and value in
front; so torch's fused kernels compute the very same thing for a window of all tokens. They have no window: a narrow one is compared with
the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tscale_fed.bench.kernel_timing import Call

HEAD_CHANNELS = 128
COPY_BYTES = 1 << 30
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def copy_call(device: torch.device) -> Call:
    """A copy that reads and writes COPY_BYTES each."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matmul_calls(size: tuple[int, int, int], device: torch.device, sets: int) -> list[Call]:
    """bf16 [rows, contraction] times [columns, contraction] transposed, by cuBLAS. size: (rows, columns, contraction)."""
    rows, columns, contraction = size

    def make() -> Call:
        a, b = (torch.randn(size, contraction, dtype=torch.bfloat16, device=device) for size in (rows, columns))
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return lambda: torch.mm(a, b.T, out=out)

    return [make() for _ in range(sets)]


def attention_calls(kind: str, fragments: int, heads: int, tokens: int, part: str, device: torch.device, sets: int) -> list[Call]:
    """bf16 attention of torch, `kind` of SDPA, its forward or backward part."""
    return [_attention_call(SDPA[kind], fragments, heads, tokens, part, device) for _ in range(sets)]


def shifted(x: Tensor) -> Tensor:
    """[B, H, T, D] one token later, zeros in front: with these keys and values causal attention is strict past with a zero sink."""
    return functional.pad(x, (0, 0, 1, 0))[:, :, :-1].contiguous()


def _attention_call(backend: SDPBackend, fragments: int, heads: int, tokens: int, part: str, device: torch.device) -> Call:
    shape = (fragments, heads, tokens, HEAD_CHANNELS)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
    key, value = shifted(key), shifted(value)
    for x in (query, key, value):
        x.requires_grad_(part == "backward")

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    if part == "forward":
        return forward
    out = forward()
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (query, key, value), gradient, retain_graph=True)
