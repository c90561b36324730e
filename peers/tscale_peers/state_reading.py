"""Reading the state of one moment while the replica moves on: chunks are copied only if they change before they were hashed.

Enters: the applied digest and the known chunk hashes of the moment. Leaves: (digest, hash) of that moment, or None.
A chunk whose hash is known, or that has not changed since, costs nothing. One that is about to change is copied first, on its device; such
copies are bounded by `limits.reading_copies_bytes`, beyond which the reading is spoilt and another one is begun later.
Not thread-safe: the replica guards its readings by its lock.
"""

from __future__ import annotations

from blake3 import blake3
from torch import Tensor

from tscale_peers import limits

State = tuple[bytes, bytes]
"""(applied digest, basepoint hash), 32 bytes each, of one moment."""


class StateReading:
    """See the module's head. hashes: of each chunk, b"" where it must be found."""

    def __init__(self, digest: bytes, hashes: list[bytes]) -> None:
        self._digest = digest
        self._hashes = hashes
        self._unread = {index for index, known in enumerate(hashes) if not known}
        self._copies: dict[int, Tensor] = {}
        self._copied_bytes = 0
        self._changed: set[int] = set()
        self._spoilt = False

    def before_change(self, index: int, values: Tensor) -> None:
        """The chunk will change at once; `values`: as it still is."""
        self._changed.add(index)
        if self._spoilt or index not in self._unread or index in self._copies:
            return
        self._copied_bytes += values.numel() * values.element_size()
        if self._copied_bytes > limits.reading_copies_bytes:
            self.spoil()
        else:
            self._copies[index] = values.clone()

    def spoil(self) -> None:
        """Give up: the moment cannot be held any more."""
        self._spoilt = True
        self._copies.clear()

    def next(self) -> int | None:
        """A chunk to hash; None if there is none, or no use."""
        if self._spoilt:
            return None
        return next(iter(self._copies or self._unread), None)  # copies first: they take memory

    def take(self, index: int, now: Tensor) -> Tensor | None:
        """The chunk's values at the moment; `now`: its values now. None if the reading was spoilt meanwhile."""
        if self._spoilt:
            return None
        self._unread.discard(index)
        copy = self._copies.pop(index, None)
        if copy is None:
            return now
        self._copied_bytes -= copy.numel() * copy.element_size()
        return copy

    def note(self, index: int, value: bytes) -> bool:
        """A chunk's hash was found. True if the chunk is still as it was."""
        self._hashes[index] = value
        return index not in self._changed

    def state(self) -> State | None:
        """The result, once `next` has none left."""
        return None if self._spoilt else (self._digest, blake3(b"".join(self._hashes)).digest())
