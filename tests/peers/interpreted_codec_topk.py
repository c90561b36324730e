"""Payloads made with the Triton kernel against those of the reference, for a process with TRITON_INTERPRET=1. Prints "same" per case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.peers.test_codec_topk import NAMES, RUGGED, codec_of, displacement
from tscale_kernels import delta_topk


def payload(encode: Callable[..., object], name: str, tail: str) -> bytes:
    """With `encode` in the place of the operation that looks at the device."""
    delta_topk.encode_unchecked = encode  # type: ignore[assignment]
    return codec_of(name).encode(displacement(tail=tail), RUGGED, 0.37)


def main() -> None:
    dispatched = delta_topk.encode_unchecked
    reference, triton = partial(dispatched, backend="ref"), partial(dispatched, backend="triton")
    for name in NAMES[1:3]:
        for tail in ("heavy", "few"):
            print("same" if payload(triton, name, tail) == payload(reference, name, tail) else f"{name} {tail}")


if __name__ == "__main__":
    main()
