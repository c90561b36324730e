"""Sets of positive integers as sorted, disjoint, non-adjacent ranges (first, last), both inclusive: one spelling per set.

Enters and leaves: lists of pairs. Pure; used by the applied set, whose streams are almost always one range.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

Range = tuple[int, int]


def contains(ranges: Sequence[Range], value: int) -> bool:
    """Is `value` in the set?"""
    at = bisect_right(ranges, value, key=_first) - 1
    return at >= 0 and value <= ranges[at][1]


def insert(ranges: list[Range], value: int) -> bool:
    """Add `value` in place, joining neighbours. False if it was there."""
    at = bisect_right(ranges, value, key=_first)
    if at > 0 and value <= ranges[at - 1][1]:
        return False
    first = last = value
    if at < len(ranges) and ranges[at][0] == value + 1:
        last = ranges.pop(at)[1]
    if at > 0 and ranges[at - 1][1] == value - 1:
        first = ranges.pop(at - 1)[0]
        at -= 1
    ranges.insert(at, (first, last))
    return True


def subtract(ranges: Sequence[Range], other: Sequence[Range]) -> list[Range]:
    """What is in `ranges` and not in `other`."""
    left: list[Range] = []
    at = 0
    for first, last in ranges:
        while at < len(other) and other[at][1] < first:
            at += 1
        look = at
        while look < len(other) and other[look][0] <= last:
            if first < other[look][0]:
                left.append((first, other[look][0] - 1))
            first = other[look][1] + 1
            look += 1
        if first <= last:
            left.append((first, last))
    return left


def canonical(ranges: Sequence[Range]) -> bool:
    """Sorted, disjoint, non-adjacent, positive, each first <= last."""
    before = -1
    for first, last in ranges:
        if first < 1 or first <= before + 1 or last < first:
            return False
        before = last
    return True


def _first(pair: Range) -> int:
    return pair[0]
