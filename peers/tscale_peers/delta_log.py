"""The delta log: every packet that this peer can still give to others, append-only, replayable.

Enters: checked packets with their keys. Leaves: their bytes by key, until retention drops them.
On disk: segments of consecutive records, dropped whole.
    record = magic u32 | body length u32 | stream key 40 B | seq u64 | chunk u32 | BLAKE3-64 of all that and the body | body
Numbers are little-endian. A record is believed only if its checksum holds: the newest segment is checked in full when it is opened (a torn
tail, after a crash, is cut off and said so), older ones when a record is read.
Retention: the newest `retain_per_stream` numbers of each stream are kept while the log fits in `max_bytes`; beyond that the oldest
segment goes. Numbers from a stream's `hold` on are never dropped: an author's own packets that its last checkpoint does not contain.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from tscale_peers import limits
from tscale_peers.errors import refuse
from tscale_peers.packet import Key
from tscale_peers.packet_log import IndexedLog, LogIndex, MemoryLog, PacketLog

__all__ = ["DeltaLog", "MemoryLog", "PacketLog"]

_MAGIC = 0x31444C54  # "TLD1"
_HEAD = struct.Struct("<II40sQI8s")
_NAME = "deltas-{:08d}.log"


@dataclass(slots=True)
class _Segment:
    """One file. `newest`: highest seq in it per stream."""

    number: int
    path: Path
    file: int
    size: int = 0
    keys: list[Key] = field(default_factory=list)
    newest: dict[bytes, int] = field(default_factory=dict)

    def note(self, key: Key) -> None:
        self.keys.append(key)
        self.newest[key[0]] = max(key[1], self.newest.get(key[0], 0))


@dataclass(frozen=True, slots=True)
class _Place:
    """A record: its segment, where it starts, how long its body is."""

    segment: _Segment
    offset: int
    length: int


class DeltaLog(IndexedLog):
    """The log in a folder of its own, which is created. Close it at the end.

    `notices`: sentences about what was found damaged when it was opened, for the start-up screen.
    Raises Refused("log-write") if the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        retain_per_stream: int = limits.log_default_retain,
        max_bytes: int = limits.log_default_bytes,
        segment_bytes: int = limits.log_segment_bytes,
    ) -> None:
        super().__init__()
        self.notices: list[str] = []
        self._folder = folder
        self._retain = retain_per_stream
        self._max_bytes = max_bytes
        self._segment_bytes = min(segment_bytes, max(1, max_bytes // 4))
        self._hold: dict[bytes, int] = {}
        self._segments: list[_Segment] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open_all()
        except OSError as error:
            raise self._unwritable(error) from None

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, body: bytes, key: Key, fsync: bool = False) -> bool:
        with self._lock:
            if self._index.get(key) is not None:
                return False
            self._write([(body, key)], fsync)
            return True

    def append_all(self, packets: Sequence[tuple[bytes, Key]], fsync: bool = False) -> None:
        with self._lock:
            self._write([(body, key) for body, key in packets if self._index.get(key) is None], fsync)

    def _write(self, packets: list[tuple[bytes, Key]], fsync: bool) -> None:
        """All of `packets` into one segment; on any error the file is cut back, so that no half record stays in the way."""
        try:
            segment = self._current()
        except OSError as error:
            raise self._unwritable(error) from None
        offset = segment.size
        places: list[tuple[Key, _Place]] = []
        try:
            for body, key in packets:
                record = _record(body, key)
                _write_all(segment.file, record, offset)
                places.append((key, _Place(segment, offset, len(body))))
                offset += len(record)
            if fsync:
                os.fsync(segment.file)
        except OSError as error:
            os.ftruncate(segment.file, segment.size)
            raise self._unwritable(error) from None
        segment.size = offset
        for key, place in places:
            self._index.put(key, place)
            segment.note(key)
        self._trim()

    def _current(self) -> _Segment:
        if not self._segments or self._segments[-1].size >= self._segment_bytes:
            number = self._segments[-1].number + 1 if self._segments else 1
            path = self._folder / _NAME.format(number)
            self._segments.append(_Segment(number, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)))
            _sync_folder(self._folder)
        return self._segments[-1]

    def _unwritable(self, error: OSError) -> Exception:
        why = error.strerror or str(error)
        return refuse("log-write", f"the delta log in {self._folder} cannot be written: {why}; free disk space or check permissions")

    def close(self) -> None:
        """Sync and close the files."""
        with self._lock:
            for segment in self._segments:
                os.fsync(segment.file)
                os.close(segment.file)
            self._segments.clear()
            self._index = LogIndex()

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, key: Key) -> bytes | None:
        with self._lock:
            place = self._index.get(key)
            if not isinstance(place, _Place):
                return None
            record = os.pread(place.segment.file, _HEAD.size + place.length, place.offset)
            body = _checked_body(record, key)
            if body is None:
                self._index.drop(key)
                self.notices.append(f"the delta log has a damaged record in {place.segment.path.name}; it is fetched from others if needed")
            return body

    @property
    def size_bytes(self) -> int:
        """Disk taken."""
        with self._lock:
            return sum(segment.size for segment in self._segments)

    # -- retention -----------------------------------------------------------------------------------------------------

    def hold(self, stream_key: bytes, seq: int) -> None:
        with self._lock:
            self._hold[stream_key] = seq

    def _trim(self) -> None:
        """Drop segments that are expired, wherever they lie (a dead author's last packets must not keep all that follows); then, while the
        log is too large, the oldest that is not held."""
        for segment in [s for s in self._segments[:-1] if self._expired(s) and not self._held(s)]:
            self._drop(segment)
        excess = sum(segment.size for segment in self._segments) - self._max_bytes
        for segment in [s for s in self._segments[:-1] if not self._held(s)]:
            if excess <= 0:
                return
            excess -= segment.size
            self._drop(segment)

    def _held(self, segment: _Segment) -> bool:
        return any(segment.newest.get(stream, 0) >= seq for stream, seq in self._hold.items())

    def _expired(self, segment: _Segment) -> bool:
        return all(newest <= self._index.latest(stream) - self._retain for stream, newest in segment.newest.items())

    def _drop(self, segment: _Segment) -> None:
        self._segments.remove(segment)
        for key in segment.keys:
            place = self._index.get(key)
            if isinstance(place, _Place) and place.segment is segment:
                self._index.drop(key)
        os.close(segment.file)
        segment.path.unlink(missing_ok=True)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open_all(self) -> None:
        found = sorted(self._folder.glob("deltas-*.log"))
        for path in found:
            number = path.stem.removeprefix("deltas-")
            if not number.isdigit():
                raise refuse("log-damaged", f"{path} is not a file of the delta log; move it away")
            self._segments.append(_Segment(int(number), path, os.open(path, os.O_RDWR)))
        for segment in self._segments:
            self._scan(segment, newest=segment is self._segments[-1])

    def _scan(self, segment: _Segment, newest: bool) -> None:
        """Fill the index from one file. Bodies are checked only in the newest, where a crash may have torn the tail."""
        length = os.fstat(segment.file).st_size
        for key, place in _records(segment, length, check=newest):
            self._index.put(key, place)
            segment.note(key)
            segment.size = place.offset + _HEAD.size + place.length
        if segment.size == length:
            return
        lost = length - segment.size
        if newest:
            os.ftruncate(segment.file, segment.size)
            self.notices.append(f"{lost} bytes at the end of the delta log were torn by a crash and cut off; nothing published is lost")
        else:
            segment.size = length
            self.notices.append(f"{lost} bytes of {segment.path.name} in the delta log are damaged; others have these packets if needed")


def _record(body: bytes, key: Key) -> bytes:
    bare = _HEAD.pack(_MAGIC, len(body), key[0], key[1], key[2], b"")
    return _HEAD.pack(_MAGIC, len(body), key[0], key[1], key[2], _checksum(bare, body)) + body


def _checksum(bare_head: bytes, body: bytes) -> bytes:
    hasher = blake3(bare_head)
    hasher.update(body)
    return hasher.digest(length=8)


def _checked_body(record: bytes, key: Key) -> bytes | None:
    """The body if the record is whole and about `key`."""
    body = record[_HEAD.size :]
    return body if len(record) >= _HEAD.size and record == _record(body, key) else None


def _records(segment: _Segment, length: int, check: bool) -> Iterator[tuple[Key, _Place]]:
    """Records from the start of a file to the first that is not whole."""
    offset = 0
    while offset + _HEAD.size <= length:
        magic, size, stream, seq, chunk, _ = _HEAD.unpack(os.pread(segment.file, _HEAD.size, offset))
        end = offset + _HEAD.size + size
        if magic != _MAGIC or end > length:
            return
        key = (stream, seq, chunk)
        if check and _checked_body(os.pread(segment.file, end - offset, offset), key) is None:
            return
        yield key, _Place(segment, offset, size)
        offset = end


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
