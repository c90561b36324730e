"""Which backend runs an operation, and the reason, said once so that the start-up log can show it.

Enters: the device of the tensors and, optionally, a forced choice. Leaves: a `Backend` with its name and its reason.
Rule: Triton for CUDA tensors where Triton can be imported, the plain-torch reference everywhere else. Both give the same bits where the
operation says so, hence the choice is about speed alone. The environment is never read here: the command line passes `forced`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

BackendName = Literal["ref", "triton"]


@dataclass(frozen=True, slots=True)
class Backend:
    """A choice and why it was made."""

    name: BackendName
    reason: str


@cache
def has_triton() -> bool:
    """True if Triton is installed (it is not imported to find out)."""
    return importlib.util.find_spec("triton") is not None


def choose(device: torch.device, forced: BackendName | None = None) -> Backend:
    """Backend for tensors on `device`.

    Raises ValueError if "triton" is forced where it is not installed.
    """
    if forced == "triton" and not has_triton():
        raise ValueError("the triton backend was asked for, but triton is not installed: pip install triton, or leave the choice open")
    if forced is not None:
        return Backend(forced, "asked for by the caller")
    if device.type != "cuda":
        return Backend("ref", f"tensors are on the {device.type}, Triton kernels need CUDA")
    if not has_triton():
        return Backend("ref", "triton is not installed")
    return Backend("triton", "tensors are on CUDA and triton is installed")
