"""Command line values that several benches share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tscale_fed.model.shape import ModelShape

FORMATS = ("bfloat16", "int8", "fp8")
"""What the engine computes with."""


def count(text: str) -> int:
    """A whole number above 0."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def shape_of(dims: str, vocab: int, noise_rows: int = 0) -> ModelShape:
    """A model shape. Raises Refused("bad-bench") with the shape's own sentence."""
    from tscale_fed.model.shape import ModelShape, ShapeError
    from tscale_net.errors import Refused

    try:
        return ModelShape.parse(dims, vocab, noise_rows)
    except ShapeError as error:
        raise Refused("bad-bench", str(error)) from None


def formats_of(text: str) -> tuple[str, str]:
    """PRECISION[/ATTENTION] as (precision, attention), attention "auto" if it is not given. Raises Refused("bad-bench")."""
    from tscale_net.errors import Refused

    precision, _, attention = text.partition("/")
    if precision not in FORMATS or attention not in ("", *FORMATS):
        raise Refused("bad-bench", f"'{text}' is unknown: write PRECISION or PRECISION/ATTENTION, each of {', '.join(FORMATS)}")
    return precision, attention or "auto"
