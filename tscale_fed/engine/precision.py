"""Precision: which number formats a training step uses, and whether this processor has them.

Enters: [device] precision and attention of the run file, and the processor. Leaves: a `Precision` and a remark for the start-up line, or
one sentence that names the card, what it lacks and the nearest setting that works.

    precision   float32   the plain torch model with autograd; the reference
                bfloat16  the engine with bfloat16 codes (plain torch where there is no Triton)
                int8      the engine with 8-bit integer products, exact sums
                fp8       the engine with float8_e4m3fn products
    attention   formats of queries and keys; values are bfloat16, with fp8 attention float8 too
The engine's operations also have plain-torch references, so the processor can compute every setting: slowly, for checking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tscale_kernels.dispatch import has_triton
from tscale_net.errors import Refused

PrecisionName = Literal["float32", "bfloat16", "int8", "fp8"]
AttentionName = Literal["bfloat16", "int8", "fp8"]

CODE_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}

ENGINE_CAPABILITY = (8, 0)
"""First NVIDIA generation for the kernels: int8 and bfloat16 matrix units as Triton uses them (Ampere)."""
FP8_CAPABILITY = (8, 9)
"""First NVIDIA generation with float8 matrix units (Ada)."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A checked choice."""

    name: PrecisionName
    attention: AttentionName = "bfloat16"
    kernels: bool = False
    """Whether steps go through the engine; else through the autograd model."""

    @property
    def code(self) -> torch.dtype:
        """Of the engine's matrix products."""
        return CODE_DTYPES[self.name]

    @property
    def score_code(self) -> torch.dtype:
        """Of queries and keys."""
        return CODE_DTYPES[self.attention]

    @property
    def value_code(self) -> torch.dtype:
        """Of values."""
        return torch.float8_e4m3fn if self.attention == "fp8" else torch.bfloat16

    @property
    def compute(self) -> torch.dtype:
        """Of the autograd model's products."""
        return torch.float32 if self.name == "float32" else torch.bfloat16


def choose_precision(device: torch.device, precision: str = "auto", attention: str = "auto") -> tuple[Precision, str]:
    """(choice, remark). `precision` is auto, float32, bfloat16, int8 or fp8; `attention` auto, bfloat16, int8 or fp8.

    "auto" is int8 with bfloat16 attention on GPUs from Ampere on with Triton, float32 elsewhere. Raises Refused("no-device").
    """
    if device.type != "cuda":
        return _on_processor(precision, attention)
    capability, card = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    name, remark = (precision, "asked for") if precision != "auto" else _best(capability)
    if name == "float32":
        _refuse_attention_without_engine(precision, attention)
        return Precision("float32"), f"float32 ({remark})"
    if capability < ENGINE_CAPABILITY:
        raise _lacking("precision", name, card, capability, "matrix units of compute capability 8.0", "float32")
    if not has_triton():
        if name != "bfloat16" or attention not in ("auto", "bfloat16"):
            key, value = ("precision", name) if name != "bfloat16" else ("attention", attention)
            raise Refused("no-device", f'[device] {key} = "{value}": triton is not installed; pip install triton, or write "bfloat16"')
        return Precision("bfloat16"), f"bfloat16 matrix products ({remark}; triton is not installed), float32 weights"
    attention_name = "bfloat16" if attention == "auto" else attention
    for key, wanted, nearest in (("precision", name, "int8"), ("attention", attention_name, "int8")):
        if wanted == "fp8" and capability < FP8_CAPABILITY:
            raise _lacking(key, wanted, card, capability, "float8 matrix units (compute capability 8.9)", nearest)
    chosen = Precision(name, attention_name, kernels=True)  # type: ignore[arg-type]
    return chosen, f"{name} matrix products ({remark}), {attention_name} attention, float32 weights"


def _on_processor(precision: str, attention: str) -> tuple[Precision, str]:
    if precision in ("auto", "float32"):
        _refuse_attention_without_engine(precision, attention)
        return Precision("float32"), "float32 (asked for)" if precision == "float32" else "float32"
    attention_name = "bfloat16" if attention == "auto" else attention
    chosen = Precision(precision, attention_name, kernels=True)  # type: ignore[arg-type]
    return chosen, f"{precision} matrix products and {attention_name} attention emulated on the processor: slow, for checking"


def _best(capability: tuple[int, int]) -> tuple[PrecisionName, str]:
    if capability < ENGINE_CAPABILITY:
        return "float32", "this GPU has no bfloat16"
    if not has_triton():
        return "bfloat16", "8 bits need triton"
    return "int8", "fastest here, exact sums"


def _refuse_attention_without_engine(precision: str, attention: str) -> None:
    if attention != "auto":
        why = 'precision = "float32" has float32 attention' if precision == "float32" else "the processor attends in float32"
        raise Refused("no-device", f'[device] attention = "{attention}": {why}; leave attention out, or write precision = "int8"')


def _lacking(key: str, value: str, card: str, capability: tuple[int, int], what: str, nearest: str) -> Refused:
    having = f"{card} (compute capability {capability[0]}.{capability[1]})"
    return Refused("no-device", f'[device] {key} = "{value}": {having} lacks {what}; write "{nearest}" or "auto"')
