"""Cases of the deltas: 8 and 4 bits, the k largest, low rank. Every result is equal bit for bit."""

from __future__ import annotations

from functools import partial

import torch
from case_protocol import Case, Setting, Tensors
from torch import Tensor

from tscale_kernels import delta_int4, delta_int8, delta_lowrank, delta_topk
from tscale_kernels.dispatch import BackendName

UNIT_EXPONENT = -22
COEFFICIENT = 0.37
K = 64
RANK = 32
"""An unusual k and rank are in _VARIANTS."""
AWKWARD = ((1, 8), (3, 264), (33, 1280), (5, 4104), (130, 24))


def displacement(setting: Setting, rows: int, cols: int) -> Tensor:
    """Rows of very different size, zeros of both signs, equal magnitudes, a zero block, one huge value."""
    size = torch.exp(2 * setting.normal((rows, 1))) * 1e-3
    d = setting.normal((rows, cols)) * size
    flat = d.view(-1)
    flat[:3] = torch.tensor([0.0, -0.0, 1e-30], device=setting.device)
    flat[128:640] = 0
    flat[700:900] = -0.25
    flat[5::997] = 0.125
    flat[-1] = 3e4
    return d


def basepoint(setting: Setting, rows: int, cols: int) -> Tensor:
    return setting.integers((rows, cols), -(1 << 20), 1 << 20, torch.int32)


def _copy(out: Tensors, names: tuple[str, ...], results: tuple[Tensor, ...]) -> None:
    for name, result in zip(names, results, strict=True):
        out[name].copy_(result)


def encode_int8(setting: Setting, rows: int, cols: int) -> Case:
    d = displacement(setting, rows, cols)
    size = rows * cols

    def run(out: Tensors, backend: BackendName) -> None:
        _copy(out, ("codes", "steps"), delta_int8.encode_unchecked(d, COEFFICIENT, UNIT_EXPONENT, backend=backend))

    return Case(
        outputs=lambda: {
            "codes": setting.poisoned((size,), torch.int8),
            "steps": setting.poisoned((delta_int8.blocks(size),), torch.int32),
        },
        run=run,
        limits={"codes": 0, "steps": 0},
        bytes_moved=5 * size,
    )


def apply_int8(setting: Setting, rows: int, cols: int) -> Case:
    codes, steps = delta_int8.encode(displacement(setting, rows, cols), COEFFICIENT, UNIT_EXPONENT, backend="ref")
    start = basepoint(setting, rows, cols)
    return Case(
        outputs=lambda: {"basepoint": start.clone()},
        run=lambda out, backend: delta_int8.apply(out["basepoint"], codes, steps, backend=backend),
        limits={"basepoint": 0},
        bytes_moved=9 * rows * cols,
    )


def leak_int8(setting: Setting, rows: int, cols: int) -> Case:
    d = displacement(setting, rows, cols)
    codes, steps = delta_int8.encode(d, COEFFICIENT, UNIT_EXPONENT, backend="ref")
    amounts = steps.float() * (2.0**UNIT_EXPONENT / COEFFICIENT)
    return Case(
        outputs=lambda: {"displacement": d.clone()},
        run=lambda out, backend: delta_int8.leak(out["displacement"], codes, amounts, backend=backend),
        limits={"displacement": 0},
        bytes_moved=9 * rows * cols,
    )


def encode_int4(setting: Setting, rows: int, cols: int) -> Case:
    d = displacement(setting, rows, cols)
    size = rows * cols

    def run(out: Tensors, backend: BackendName) -> None:
        _copy(out, ("packed", "steps"), delta_int4.encode_unchecked(d, COEFFICIENT, UNIT_EXPONENT, backend=backend))

    return Case(
        outputs=lambda: {
            "packed": setting.poisoned((delta_int4.packed_bytes(size),), torch.uint8),
            "steps": setting.poisoned((delta_int4.blocks(size),), torch.int32),
        },
        run=run,
        limits={"packed": 0, "steps": 0},
        bytes_moved=4 * size + size // 2,
    )


def apply_int4(setting: Setting, rows: int, cols: int) -> Case:
    packed, steps = delta_int4.encode(displacement(setting, rows, cols), COEFFICIENT, UNIT_EXPONENT, backend="ref")
    start = basepoint(setting, rows, cols)
    return Case(
        outputs=lambda: {"basepoint": start.clone()},
        run=lambda out, backend: delta_int4.apply(out["basepoint"], packed, steps, sign=-1, backend=backend),
        limits={"basepoint": 0},
        bytes_moved=8 * rows * cols + packed.numel(),
    )


def leak_int4(setting: Setting, rows: int, cols: int) -> Case:
    d = displacement(setting, rows, cols)
    packed, steps = delta_int4.encode(d, COEFFICIENT, UNIT_EXPONENT, backend="ref")
    amounts = steps.float() * (2.0**UNIT_EXPONENT / COEFFICIENT)
    return Case(
        outputs=lambda: {"displacement": d.clone()},
        run=lambda out, backend: delta_int4.leak(out["displacement"], packed, amounts, backend=backend),
        limits={"displacement": 0},
        bytes_moved=8 * rows * cols + packed.numel(),
    )


def encode_topk(setting: Setting, rows: int, cols: int, k: int = K) -> Case:
    d = displacement(setting, rows, cols)
    size = rows * cols

    def run(out: Tensors, backend: BackendName) -> None:
        _copy(out, ("picks", "exponents"), delta_topk.encode_unchecked(d, COEFFICIENT, UNIT_EXPONENT, k, backend=backend))

    return Case(
        outputs=lambda: {
            "picks": setting.poisoned((delta_topk.picked(size, k),), torch.int16),
            "exponents": setting.poisoned((delta_topk.stretches(size),), torch.int8),
        },
        run=run,
        limits={"picks": 0, "exponents": 0},
        bytes_moved=4 * size,
    )


def apply_topk(setting: Setting, rows: int, cols: int, k: int = K) -> Case:
    picks, exponents = delta_topk.encode(displacement(setting, rows, cols), COEFFICIENT, UNIT_EXPONENT, k, backend="ref")
    start = basepoint(setting, rows, cols)
    return Case(
        outputs=lambda: {"basepoint": start.clone()},
        run=lambda out, backend: delta_topk.apply(out["basepoint"], picks, exponents, k, sign=-1, backend=backend),
        limits={"basepoint": 0},
        bytes_moved=picks.numel() * (2 + 2 * 32),  # a pick moves a sector of 32 bytes in and out
    )


def leak_topk(setting: Setting, rows: int, cols: int, k: int = K) -> Case:
    d = displacement(setting, rows, cols)
    picks, exponents = delta_topk.encode(d, COEFFICIENT, UNIT_EXPONENT, k, backend="ref")
    amounts = torch.where(exponents >= 0, torch.exp2(exponents.float()) * (2.0**UNIT_EXPONENT / COEFFICIENT), 0.0)
    return Case(
        outputs=lambda: {"displacement": d.clone()},
        run=lambda out, backend: delta_topk.leak(out["displacement"], picks, amounts, k, backend=backend),
        limits={"displacement": 0},
        bytes_moved=picks.numel() * (2 + 2 * 32),
    )


def _factors(setting: Setting, rows: int, cols: int, rank: int) -> tuple[Tensor, Tensor]:
    return setting.integers((rows, rank), -127, 128, torch.int8), setting.integers((cols, rank), -127, 128, torch.int8)


def apply_lowrank(setting: Setting, rows: int, cols: int, rank: int = RANK, exponent: int = -3, sign: int = 1) -> Case:
    p, q = _factors(setting, rows, cols, rank)
    start = basepoint(setting, rows, cols)
    power = torch.tensor([exponent], dtype=torch.int32, device=setting.device)
    return Case(
        outputs=lambda: {"basepoint": start.clone()},
        run=lambda out, backend: delta_lowrank.apply(out["basepoint"], p, q, power, sign=sign, backend=backend),
        limits={"basepoint": 0},
        bytes_moved=8 * rows * cols + p.numel() + q.numel(),
    )


def leak_lowrank(setting: Setting, rows: int, cols: int, rank: int = RANK, exponent: int = -3) -> Case:
    p, q = _factors(setting, rows, cols, rank)
    d = displacement(setting, rows, cols)
    power = torch.tensor([exponent], dtype=torch.int32, device=setting.device)
    amount = 2.0**UNIT_EXPONENT / COEFFICIENT
    return Case(
        outputs=lambda: {"displacement": d.clone()},
        run=lambda out, backend: delta_lowrank.leak(out["displacement"], p, q, power, amount, backend=backend),
        limits={"displacement": 0},
        bytes_moved=8 * rows * cols + p.numel() + q.numel(),
    )


def _sized(build: partial[Case], setting: Setting) -> Case:
    """A matrix of the setting's sizes: the combiner's shape, which is the largest of a layer."""
    s = setting.sizes
    return build(setting, s.width, 4 * s.attention_width)


def _awkward(build: partial[Case], rows: int, cols: int, setting: Setting) -> Case:
    case = build(setting, rows, cols)
    return Case(case.outputs, case.run, case.limits, timed=False)


_OPS: dict[str, partial[Case]] = {
    "delta_int8_encode": partial(encode_int8),
    "delta_int8_apply": partial(apply_int8),
    "delta_int8_leak": partial(leak_int8),
    "delta_int4_encode": partial(encode_int4),
    "delta_int4_apply": partial(apply_int4),
    "delta_int4_leak": partial(leak_int4),
    "delta_topk_encode": partial(encode_topk),
    "delta_topk_apply": partial(apply_topk),
    "delta_topk_leak": partial(leak_topk),
    "delta_lowrank_apply": partial(apply_lowrank),
    "delta_lowrank_leak": partial(leak_lowrank),
}
_VARIANTS: dict[str, partial[Case]] = {
    "delta_topk_encode k 7": partial(_awkward, partial(encode_topk, k=7), 3, 4096),
    "delta_topk_encode k 4096": partial(_awkward, partial(encode_topk, k=4096), 2, 2056),
    "delta_topk_apply k 7": partial(_awkward, partial(apply_topk, k=7), 3, 4096),
    "delta_lowrank_apply rank 1": partial(_awkward, partial(apply_lowrank, rank=1, exponent=9), 70, 136),
    "delta_lowrank_apply rank 40": partial(_awkward, partial(apply_lowrank, rank=40, exponent=0, sign=-1), 70, 136),
    "delta_lowrank_apply rank 128": partial(_awkward, partial(apply_lowrank, rank=128, exponent=-24), 64, 128),
}
CASES = (
    {name: partial(_sized, build) for name, build in _OPS.items()}
    | {f"{name} {rows}x{cols}": partial(_awkward, build, rows, cols) for name, build in _OPS.items() for rows, cols in AWKWARD}
    | _VARIANTS
)
