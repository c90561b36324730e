"""Which way local attention of the compiled baseline goes: both are timed, forward and backward, on the sizes at hand.

Enters: sizes. Leaves: the faster way, and one sentence with both times.
"""

from __future__ import annotations

import time
from typing import get_args

import torch

from tscale_fed.bench.compiled_layer import LocalWay, is_causal, make_attend
from tscale_fed.model.constants import HEAD_CHANNELS, PREVIOUS_WIDTH
from tscale_fed.model.shape import ModelShape

_REPEATS = 20


def choose_local_way(shape: ModelShape, fragments: int, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[LocalWay, str]:
    """The faster way for the model's narrowest local layers; `blocks` without a GPU, as FlexAttention has no backward pass there."""
    kinds = [kind for kind in dict.fromkeys(shape.layers()) if kind[0] != PREVIOUS_WIDTH and not is_causal(kind, tokens)]
    if device.type != "cuda" or not kinds:
        return "blocks", "local attention by blocks"
    times: dict[LocalWay, float] = {}
    failures = []
    for way in get_args(LocalWay):
        try:
            times[way] = _milliseconds(shape, kinds[0], fragments, tokens, device, dtype, way)
        except Exception as error:  # a compiler that fails on one way leaves the other
            failures.append(f"{way} failed ({type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''})")
    best = min(times, key=times.__getitem__)
    told = [f"{way} {took:.2f} ms" for way, took in times.items()] + failures
    return best, f"local attention by {best}: forward and backward of {fragments} x {tokens} tokens, {', '.join(told)}"


def _milliseconds(
    shape: ModelShape, kind: tuple[int, float], fragments: int, tokens: int, device: torch.device, dtype: torch.dtype, way: LocalWay
) -> float:
    size = (fragments, tokens, shape.heads, HEAD_CHANNELS)
    query, key, value = (torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(size, device=device, dtype=dtype)
    attend = torch.compile(make_attend(kind, tokens, device, way), dynamic=False)

    def once() -> None:
        torch.autograd.grad(attend(query, key, value), (query, key, value), gradient)

    once()
    once()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_REPEATS):
        once()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / _REPEATS * 1e3
