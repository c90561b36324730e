"""Sets of packets that are too large for one message, told part by part.

Enters: a set, where to begin. Leaves: the part from there on that fits, as bytes with its bounds; or what a received part is compared with.
A part covers all streams whose keys lie in first <= key < end, and says nothing about others. Parts in turn cover everything.
"""

from __future__ import annotations

from collections.abc import Mapping

from tscale_peers.applied import AppliedSet, Stream
from tscale_peers.messages import SetPart

_HEAD_BYTES = 32
"""Version and counts of an encoded set take less."""


def between(applied: AppliedSet, first: bytes, end: bytes) -> AppliedSet:
    """The streams with first <= key < end (an empty `end`: no end). Shares them with `applied`: to read, not to change."""
    return _set_of(applied, {key: stream for key, stream in applied.streams.items() if first <= key and (not end or key < end)})


def part_from(applied: AppliedSet, first: bytes, most_bytes: int) -> SetPart:
    """The part that begins at `first` and has at most `most_bytes`; bounds b"" and b"": the whole set.

    A stream that is too large by itself is told without its numbers beyond gaps, or not at all: it is then merely not compared.
    """
    chosen: dict[bytes, Stream] = {}
    left = most_bytes - _HEAD_BYTES
    for key in sorted(key for key in applied.streams if key >= first):
        stream = applied.streams[key]
        size = _size(applied, key, stream)
        if size > most_bytes - _HEAD_BYTES:
            stream = Stream(stream.contiguous, batches=stream.batches)
            size = _size(applied, key, stream)
            if stream.is_empty() or size > most_bytes - _HEAD_BYTES:
                continue
        if size > left:
            return SetPart(first, key, _set_of(applied, chosen).encode())
        left -= size
        chosen[key] = stream
    return SetPart(first, b"", _set_of(applied, chosen).encode())


def _set_of(applied: AppliedSet, streams: Mapping[bytes, Stream]) -> AppliedSet:
    part = AppliedSet(applied.chunks, applied.max_streams)
    part.streams = dict(streams)
    return part


def _size(applied: AppliedSet, key: bytes, stream: Stream) -> int:
    return len(_set_of(applied, {key: stream}).encode())
