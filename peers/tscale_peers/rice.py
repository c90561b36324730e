"""Rice codes of whole arrays: the parameter, the bit strings, and a reader that accepts one spelling.

Enters: gaps between picks, bit planes. Leaves: packed bytes; from bytes, arrays, each part checked for being there and for its filling.
A Rice code with parameter r writes a number as `number >> r` in unary and its r lowest bits as they are (Rice and Plaunt 1971). The unary
parts and the low bits of all numbers are kept apart, so that whole arrays are packed and unpacked at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tscale_net.errors import Refused
from tscale_peers import limits
from tscale_peers.errors import refuse

Bits = NDArray[np.uint8]
"""Zeros and ones."""
Ints = NDArray[np.int64]


# -- Rice parameter ----------------------------------------------------------------------------------------------------


def best_parameter(gaps: Ints) -> int:
    """The least r that makes len(gaps) * (1 + r) + sum(gaps >> r) least; that cost is convex in r, so a walk from a guess finds it."""
    if not len(gaps):
        return 0
    r = min(limits.rice_max_parameter, max(0, int(gaps.mean()).bit_length() - 1))
    while r > 0 and not _next_is_shorter(gaps, r - 1):
        r -= 1
    while r < limits.rice_max_parameter and _next_is_shorter(gaps, r):
        r += 1
    return r


def is_best_parameter(gaps: Ints, r: int) -> bool:
    """Whether `best_parameter` gives r."""
    if not len(gaps):
        return r == 0
    return (r == 0 or _next_is_shorter(gaps, r - 1)) and (r == limits.rice_max_parameter or not _next_is_shorter(gaps, r))


def _next_is_shorter(gaps: Ints, r: int) -> bool:
    """Parameter r + 1 costs a bit more per pick and saves what the unary parts lose."""
    return int((gaps >> r).sum() - (gaps >> (r + 1)).sum()) > len(gaps)


# -- bit strings -------------------------------------------------------------------------------------------------------


def pack(planes: Iterable[NDArray[np.bool_] | Bits]) -> bytes:
    """One bit string of all planes, lowest bit first, filled up with zeros to whole bytes."""
    return np.packbits(np.concatenate(list(planes)), bitorder="little").tobytes()


def planes_of(values: Ints, bits: int) -> list[Bits]:
    """The lowest bit of every value, then the next one, ... up to `bits`."""
    return [((values >> plane) & 1).astype(np.uint8) for plane in range(bits)]


def numbers_of(planes: Bits) -> Ints:
    """[bits, n] planes -> n numbers."""
    total = np.zeros(planes.shape[1], dtype=np.int64)
    for plane, bits in enumerate(planes):
        total |= bits.astype(np.int64) << plane
    return total


def bytes_of(bits: int) -> int:
    """Whole bytes that hold so many bits."""
    return -(-bits // 8)


class BitReader:
    """Takes parts off a payload, each checked for being there and for its filling.

    Raises Refused: "packet-truncated", "packet-oversized", "packet-payload".
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._at = 0

    def byte(self) -> int:
        """The next byte."""
        self._at += 1
        if self._at > len(self._payload):
            raise self._ends()
        return self._payload[self._at - 1]

    def planes(self, bits: int, count: int) -> Bits:
        """The next bit string: uint8 [bits, count]."""
        return self.bits(bits * count).reshape(bits, count)

    def bits(self, total: int) -> Bits:
        """The next bit string: uint8 [total]."""
        first = self._at
        self._at += bytes_of(total)
        if self._at > len(self._payload):
            raise self._ends()
        raw = np.frombuffer(self._payload, dtype=np.uint8, count=self._at - first, offset=first)
        if total % 8 and raw[-1] >> (total % 8):
            raise refuse("packet-payload", f"a payload whose filling after byte {self._at - 1} is not zero")
        return np.unpackbits(raw, count=total, bitorder="little")

    def unary(self, count: int) -> Ints:
        """The rest of the payload: `count` numbers, each as so many zeros and a one."""
        raw = np.frombuffer(self._payload, dtype=np.uint8, offset=self._at)
        ones = np.flatnonzero(np.unpackbits(raw, bitorder="little").view(np.bool_))
        if len(ones) < count:
            raise self._ends()
        if len(ones) > count or (len(raw) and not raw[-1]):
            raise refuse("packet-oversized", f"a payload of {len(self._payload)} bytes goes on after its last pick")
        return np.diff(ones, prepend=-1) - 1

    def _ends(self) -> Refused:
        return refuse("packet-truncated", f"a payload of {len(self._payload)} bytes ends before its picks do")
