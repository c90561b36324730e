"""Checked packets that wait for the next meeting.

Enters: keys, with their packets while there is room. Leaves: packets, part by part, so that memory stays bounded however many have piled
up. Any thread may offer; the one that meets takes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from tscale_peers import limits
from tscale_peers.gossip import Key, PacketStore
from tscale_peers.packet import Packet


class Inbox:
    """`store`: the delta log, where packets beyond `limits.inbox_bytes` are read back from and opened by `decode`."""

    def __init__(self, store: PacketStore, decode: Callable[[bytes], Packet]) -> None:
        self._store = store
        self._decode = decode
        self._waiting: deque[tuple[Key, Packet | None, int]] = deque()
        """Key; the packet, and its bytes in memory, or None and 0 if it is read back from the log."""
        self._bytes = 0
        self._lock = threading.Lock()

    def offer(self, key: Key, packet: Packet | None = None, nbytes: int = 0) -> None:
        """nbytes: what the packet takes in memory. Beyond the bound only its key is kept."""
        with self._lock:
            if packet is None or self._bytes + nbytes > limits.inbox_bytes:
                packet, nbytes = None, 0
            self._waiting.append((key, packet, nbytes))
            self._bytes += nbytes

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def half_full(self) -> bool:
        """Is it time to take some? As much more again, and packets must be read back from the log."""
        with self._lock:
            return 2 * self._bytes > limits.inbox_bytes or (bool(self._waiting) and self._waiting[-1][1] is None)

    def take(self, most: int) -> tuple[int, list[Packet]]:
        """(how many were taken, at most `most`; those of them that are neither in memory nor in the log are missing from the list), up to
        `limits.inbox_bytes`."""
        packets: list[Packet] = []
        taken = size = 0
        while taken < most and size < limits.inbox_bytes:
            with self._lock:
                key, packet, nbytes = self._waiting.popleft()
                self._bytes -= nbytes
            taken += 1
            if packet is None:
                body = self._store.get(key)
                if body is None:
                    continue
                packet, nbytes = self._decode(body), len(body)
            size += nbytes
            packets.append(packet)
        return taken, packets
