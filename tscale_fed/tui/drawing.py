"""Drawing without a screen: numbers in, characters out. Pure functions, each tested alone.

A braille character holds 2 x 4 dots, so a curve of `columns` x `rows` characters has 2*columns x 4*rows dots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tscale_fed.status import LossPoint

DOTS_ACROSS = 2
DOTS_DOWN = 4
_BRAILLE = 0x2800
_DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the dot in row 0..3, column 0..1 (Unicode block Braille Patterns)."""

NO_CURVE, TRAIN, SWARM = 0, 1, 2
"""Which curve a character belongs to, for its colour; the swarm's wins where both pass."""


@dataclass(frozen=True, slots=True)
class Curve:
    """`rows` lines of (character, curve) pairs, top first, with the values of the top and bottom edge and the steps at both ends."""

    cells: list[list[tuple[str, int]]]
    high: float
    low: float
    first_step: int
    last_step: int


def fit(parts: Sequence[str], width: int, gap: str = "  ") -> str:
    """As many parts, in order, as fit into `width` characters; the first two (a label, what matters most) are cut rather than left out."""
    text = gap.join(parts[:2])[:width]
    for part in parts[2:]:
        if len(text) + len(gap) + len(part) > width:
            break
        text += gap + part
    return text


def zoom(points: Sequence[LossPoint], fraction: float) -> list[LossPoint]:
    """The points of the last `fraction` of the steps; always at least the newest two."""
    if not points:
        return []
    first, last = min(point.step for point in points), max(point.step for point in points)
    start = last - (last - first) * fraction
    kept = [point for point in points if point.step >= start]
    return kept if len(kept) >= 2 else list(points[-2:])


def loss_curve(points: Sequence[LossPoint], columns: int, rows: int) -> Curve | None:
    """Own training loss and the swarm's held-out loss over own steps; None if there is nothing to draw or no room."""
    values = [value for point in points for value in (point.train, point.swarm) if value is not None]
    if not values or columns < 1 or rows < 1:
        return None
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    first, last = min(point.step for point in points), max(point.step for point in points)
    across, down = columns * DOTS_ACROSS, rows * DOTS_DOWN
    cells = [[(" ", NO_CURVE)] * columns for _ in range(rows)]
    bits: dict[tuple[int, int], int] = {}
    for curve, series in ((TRAIN, [(p.step, p.train) for p in points]), (SWARM, [(p.step, p.swarm) for p in points])):
        heights = _resample([(step, value) for step, value in series if value is not None], first, last, across)
        for x, y in _plot(heights, low, high, down):
            column, row = x // DOTS_ACROSS, y // DOTS_DOWN
            bits[column, row] = bits.get((column, row), 0) | _DOT_BITS[y % DOTS_DOWN][x % DOTS_ACROSS]
            cells[row][column] = (chr(_BRAILLE + bits[column, row]), curve)
    return Curve(cells, high, low, first, last)


def _resample(series: list[tuple[int, float]], first: int, last: int, across: int) -> list[float | None]:
    """Mean value per dot column, gaps between known columns filled by straight lines; None outside the series."""
    sums, counts = [0.0] * across, [0] * across
    for step, value in series:
        column = (step - first) * (across - 1) // (last - first) if last > first else across - 1
        sums[column] += value
        counts[column] += 1
    known = [column for column in range(across) if counts[column]]
    result: list[float | None] = [sums[column] / counts[column] if counts[column] else None for column in range(across)]
    for left, right in zip(known, known[1:], strict=False):
        start, end = sums[left] / counts[left], sums[right] / counts[right]
        for column in range(left + 1, right):
            result[column] = start + (end - start) * (column - left) / (right - left)
    return result


def _plot(heights: list[float | None], low: float, high: float, down: int) -> set[tuple[int, int]]:
    """Dots (column, row from the top) of a connected line: neighbours are joined by vertical strokes."""
    dots: set[tuple[int, int]] = set()
    before: int | None = None
    for column, height in enumerate(heights):
        if height is None:
            before = None
            continue
        row = round((high - height) / (high - low) * (down - 1))
        start = row if before is None else before + (1 if row > before else -1 if row < before else 0)
        dots.update((column, between) for between in range(min(start, row), max(start, row) + 1))
        before = row
    return dots
