"""Which contributions a sum contains: the list in its header.

Enters: contributions by author stream and number, or bytes of a stranger. Leaves: canonical bytes, or entries, all checked.
Wire: entries of 14 bytes, at most `included_entries`: short id of the author stream (8) | u32 first number | u16 how many in a row;
ascending, and joined where they touch. Only the author needs to recognise its own contributions, so eight bytes of a hash name it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from blake3 import blake3

from tscale_peers import limits
from tscale_peers.errors import refuse
from tscale_peers.ranges import Range

LAST_NUMBER = (1 << 32) - 1
"""Contributions of one author to one chunk are numbered from 1 to here."""
_LONGEST_RUN = (1 << 16) - 1
_ENTRY = struct.Struct("<8sIH")

ShortId = bytes
"""Names an author stream, 8 bytes."""


class Entry(NamedTuple):
    """Contributions first..last of one author stream to one chunk."""

    author: ShortId
    first: int
    last: int


def short_id(stream_key: bytes) -> ShortId:
    """First 8 bytes of the stream key's BLAKE3."""
    return blake3(stream_key).digest(8)


def count(numbers: Mapping[ShortId, Sequence[Range]]) -> int:
    """Entries that these contributions take."""
    return sum(len(pairs) for pairs in numbers.values())


def encode(numbers: Mapping[ShortId, Sequence[Range]]) -> bytes:
    """Canonical bytes. numbers: canonical ranges by author. ValueError for more entries, or longer runs, than may be sent."""
    entries = [(author, first, last) for author in sorted(numbers) for first, last in numbers[author]]
    if len(entries) > limits.included_entries or any(last - first >= _LONGEST_RUN for _, first, last in entries):
        raise ValueError(f"{len(entries)} entries of contributions do not fit in one sum")
    return b"".join(_ENTRY.pack(author, first, last - first + 1) for author, first, last in entries)


def decode(data: bytes) -> list[Entry]:
    """Strict reading. Raises Refused("bad-included")."""
    if not data or len(data) % _ENTRY.size or len(data) > limits.included_entries * _ENTRY.size:
        raise refuse("bad-included", f"a list of contributions of {len(data)} bytes")
    entries: list[Entry] = []
    for author, first, in_a_row in _ENTRY.iter_unpack(data):
        entry = Entry(author, first, first + in_a_row - 1)
        before = entries[-1] if entries else Entry(b"", 0, 0)
        after = entry.author > before.author or (entry.author == before.author and first > before.last + 1)
        if not (after and first >= 1 and in_a_row >= 1 and entry.last <= LAST_NUMBER):
            raise refuse("bad-included", "a list of contributions that is not in canonical form")
        entries.append(entry)
    return entries
