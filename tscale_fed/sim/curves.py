"""Loss against time, bytes and tokens: as CSV, and as a chart of characters for terminals.

Enters: samples. Leaves: text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tscale_fed.sim.outcome import Sample

CHART_COLUMNS = 60
CHART_LINES = 10
MEGABYTE = 1e6
MEGATOKEN = 1e6


@dataclass(frozen=True, slots=True)
class Axis:
    """One way to look at the loss."""

    name: str
    label: str
    value: Callable[[Sample], float]


AXES = (
    Axis("time", "virtual minutes", lambda sample: sample.minute),
    Axis("bytes", "megabytes received per peer", lambda sample: sample.bytes_per_peer / MEGABYTE),
    Axis("tokens", "million tokens of all peers", lambda sample: sample.tokens / MEGATOKEN),
)


def csv_text(samples: Sequence[Sample]) -> str:
    """A line for each sample, with a head."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Sample.__struct_fields__)
    for sample in samples:
        writer.writerow([getattr(sample, name) for name in Sample.__struct_fields__])
    return out.getvalue()


def chart_lines(samples: Sequence[Sample], axis: Axis) -> list[str]:
    """Loss over one axis, drawn with stars; plain ASCII."""
    xs, ys = [axis.value(sample) for sample in samples], [sample.loss for sample in samples]
    low, high, left, right = min(ys), max(ys), min(xs), max(xs)
    rows = [[" "] * CHART_COLUMNS for _ in range(CHART_LINES)]
    for x, y in zip(xs, ys, strict=True):
        across = round((x - left) / (right - left) * (CHART_COLUMNS - 1)) if right > left else 0
        down = round((high - y) / (high - low) * (CHART_LINES - 1)) if high > low else 0
        rows[down][across] = "*"
    lines = []
    for number, row in enumerate(rows):
        level = high - (high - low) * number / (CHART_LINES - 1)
        lines.append(f"{level:>10.4f} |{''.join(row)}".rstrip())
    ends = f"{left:.4g}".ljust(CHART_COLUMNS - 8) + f"{right:>8.4g}"
    return [f"{'loss':>10}", *lines, " " * 11 + "+" + "-" * CHART_COLUMNS, " " * 12 + ends, " " * 12 + axis.label]
