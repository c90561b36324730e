"""Cases that go wrong on purpose, for the test of the checking scripts themselves (test_checking.py)."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from case_protocol import Case, Setting, Skip, Tensors

from tscale_kernels.dispatch import BackendName


def _case(setting: Setting, triton_writes: Callable[[Tensors], object], limit: float = 0) -> Case:
    """ref writes ones."""

    def run(out: Tensors, backend: BackendName) -> None:
        out["y"].fill_(1) if backend == "ref" else triton_writes(out)

    return Case(lambda: {"y": setting.poisoned((4, 8), torch.float32)}, run, {"y": limit})


def _fail(out: Tensors) -> None:
    raise ValueError("does not compile")


def _lose_device(out: Tensors) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _skip(setting: Setting) -> Case:
    raise Skip("not here")


CASES: dict[str, Callable[[Setting], Case]] = {
    "right": lambda setting: _case(setting, lambda out: out["y"].fill_(1)),
    "forgets an element": lambda setting: _case(setting, lambda out: out["y"].reshape(-1)[:-1].fill_(1)),
    "writes NaN": lambda setting: _case(setting, lambda out: out["y"].fill_(float("nan")), limit=0.5),
    "dies": lambda setting: _case(setting, lambda out: os._exit(9)),
    "raises": lambda setting: _case(setting, _fail),
    "loses the device": lambda setting: _case(setting, _lose_device),
    "skips": _skip,
    "right again": lambda setting: _case(setting, lambda out: out["y"].fill_(1)),
}
