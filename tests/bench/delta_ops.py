"""The delta operations of the kernels room, one after the other, with torch's own copy and addition of the same run beside them.

Enters: matrices of a model, on the CPU or a GPU. Leaves: seconds per part and codec: pack (encode, with the 16-bit step codes), unpack and
apply (as a receiver does), leak (as an author does), and bytes of the tensors that would travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tscale_kernels import delta_int8, delta_lowrank, delta_onebit, delta_topk

COEFFICIENT = 0.25
UNIT_EXPONENT = -22
UNIT = 2.0**UNIT_EXPONENT
TOPK, RANK = 64, 32
REPEATS = 5
Delta = tuple[Tensor, ...]


@dataclass(frozen=True)
class Ops:
    """A codec as three functions of one matrix. `pack` gets the matrix's number, for what it keeps between publications."""

    name: str
    pack: Callable[[int, Tensor], Delta]
    unpack_and_apply: Callable[[Tensor, Delta], None]
    leak: Callable[[Tensor, Delta], None]


def all_ops() -> list[Ops]:
    return [_onebit(), _int8(), _topk(), _lowrank()]


def _onebit() -> Ops:
    def pack(number: int, d: Tensor) -> Delta:
        bits, steps = delta_onebit.encode(d, COEFFICIENT, UNIT_EXPONENT)
        return bits, delta_onebit.steps_to_codes(steps).to(torch.int16)

    def steps_of(delta: Delta) -> Tensor:
        return delta_onebit.codes_to_steps(delta[1].to(torch.int32) & 0xFFFF)[0]

    return Ops(
        "sign, a step per row",
        pack,
        lambda b, delta: delta_onebit.apply(b, delta[0], steps_of(delta)),
        lambda d, delta: delta_onebit.leak(d, delta[0], steps_of(delta).float() * UNIT),
    )


def _int8() -> Ops:
    def pack(number: int, d: Tensor) -> Delta:
        codes, steps = delta_int8.encode_unchecked(d, COEFFICIENT, UNIT_EXPONENT)
        return codes, delta_onebit.steps_to_codes(steps).to(torch.int16)

    def steps_of(delta: Delta) -> Tensor:
        return delta_onebit.codes_to_steps(delta[1].to(torch.int32) & 0xFFFF)[0]

    return Ops(
        "int8, a step per 128",
        pack,
        lambda b, delta: delta_int8.apply(b, delta[0], steps_of(delta)),
        lambda d, delta: delta_int8.leak(d, delta[0], steps_of(delta).float() * UNIT),
    )


def _topk() -> Ops:
    return Ops(
        f"{TOPK} largest of 4096",
        lambda number, d: delta_topk.encode_unchecked(d, COEFFICIENT, UNIT_EXPONENT, TOPK),
        lambda b, delta: delta_topk.apply(b, delta[0], delta[1], TOPK),
        lambda d, delta: delta_topk.leak(d, delta[0], torch.where(delta[1] >= 0, torch.exp2(delta[1].float()) * UNIT, 0.0), TOPK),
    )


def _lowrank() -> Ops:
    warm: dict[int, Tensor] = {}

    def pack(number: int, d: Tensor) -> Delta:
        if number not in warm:
            warm[number] = delta_lowrank.start(d.shape[1], RANK, d.device)
        return delta_lowrank.encode(d, COEFFICIENT, UNIT_EXPONENT, warm[number])

    return Ops(
        f"rank {RANK}, int8 factors",
        pack,
        lambda b, delta: delta_lowrank.apply(b, *delta),
        lambda d, delta: delta_lowrank.leak(d, *delta, UNIT),
    )


def matrices(shapes: Iterable[tuple[int, int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(displacement, basepoint) of every shape."""
    for rows, cols in shapes:
        yield torch.randn(rows, cols, device=device) * 1e-3, torch.zeros(rows, cols, dtype=torch.int32, device=device)


def best_s(work: Callable[[], Any], device: torch.device) -> float:
    """Shortest of several runs: the machine may be shared."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def baselines_s(pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, float]:
    """Seconds of torch over the same matrices: a copy (8 bytes a value), an addition (12)."""

    def copy() -> None:
        for d, b in pairs:
            b.view(torch.float32).copy_(d)

    def add() -> None:
        for d, b in pairs:
            b.view(torch.float32).add_(d)

    result = {"torch copy, fp32": best_s(copy, device), "torch W += d, fp32": best_s(add, device)}
    for _, b in pairs:
        b.zero_()
    return result


def costs_s(ops: Ops, pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, float]:
    """Seconds of the parts, and "bytes" of what would travel."""
    deltas: list[Delta] = []

    def pack() -> None:
        deltas[:] = [ops.pack(number, d) for number, (d, _) in enumerate(pairs)]

    def apply() -> None:
        for (_, b), delta in zip(pairs, deltas, strict=True):
            ops.unpack_and_apply(b, delta)

    def leak() -> None:
        for (d, _), delta in zip(pairs, deltas, strict=True):
            ops.leak(d, delta)

    costs = {"pack": best_s(pack, device), "unpack + apply": best_s(apply, device), "leak": best_s(leak, device)}
    costs["bytes"] = float(sum(part.numel() * part.element_size() for delta in deltas for part in delta))
    return costs
