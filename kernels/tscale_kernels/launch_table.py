"""Launch configurations: block sizes, warps and pipeline stages of every kernel on every kind of card, from `launch_table.toml`.

Enters: an operation, the card's compute capability, the code dtype. Leaves: keyword arguments of a kernel launch.
The table is checked in and made by hand or by the tuning script: nothing tunes when a peer starts, so two peers with the same card run the
same code, and the interpreter never looks for a driver. A row is looked up in the card's section, then in the section `all`; under the
dtype's name, then under `any`. A card without a section uses the newest one before it (8.7 uses sm_86).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]
CODE_NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16"}

SHARED_MEMORY_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Most shared memory of one program on each architecture (CUDA programming guide): what a configuration must fit in."""

_TABLE = Path(__file__).with_suffix(".toml")
_NOTE = "note"
"""Key of a row that says where its numbers come from; it is not passed to the kernel."""


@cache
def table() -> Mapping[str, Any]:
    """The whole table: section -> operation -> dtype name -> row."""
    return tomllib.loads(_TABLE.read_text())


@cache
def architecture(capability: tuple[int, int]) -> int:
    """The architecture of the table (80, 86, ...) whose configurations a card uses. Raises ValueError for cards older than 8.0."""
    number = capability[0] * 10 + capability[1]
    known = [known for known in SHARED_MEMORY_BYTES if known <= number]
    if not known:
        card = f"{capability[0]}.{capability[1]}"
        raise ValueError(f"this card has compute capability {card}; the kernels need 8.0 (Ampere) or newer: use the CPU")
    return max(known)


def launch(op: str, capability: tuple[int, int], code: torch.dtype | None = None) -> Config:
    """Launch keywords of `op` (a fresh dict) on a card for operands of dtype `code` (None: the op does not depend on it).

    Raises ValueError for cards older than 8.0, KeyError for an operation without a row.
    """
    return dict(_row(op, architecture(capability), code))


@cache
def _row(op: str, arch: int, code: torch.dtype | None) -> Config:
    names = ["any"] if code is None else [CODE_NAMES[code], "any"]
    for section in (f"sm_{arch}", "all"):
        rows = table().get(section, {}).get(op, {})
        for name in names:
            if name in rows:
                return {key: value for key, value in rows[name].items() if key != _NOTE}
    raise KeyError(f"launch_table.toml has no row for {op} of {names[0]} on sm_{arch}")


def fitted(config: Config, **sizes: int) -> Config:
    """The configuration with every named block halved until it divides its size: fitted(config, BR=rows, BC=columns)."""
    fit = dict(config)
    for name, size in sizes.items():
        while size % fit[name]:
            fit[name] //= 2
    return fit
