"""Which pieces of text are held out for testing.

Rule: go through the pieces in order and hold out a piece whenever the held-out bytes so far are fewer than the wanted fraction of all
bytes so far. The decision looks only at what came before the piece, so long and short documents are treated alike; held-out pieces are
spread evenly over the sources; and it does not depend on the tokenizer, so different tokenizers are tested on the same text.
"""

from __future__ import annotations


class HeldOut:
    """The running decision for one import."""

    def __init__(self, fraction: float) -> None:
        """`fraction` of the bytes, 0 holds out nothing."""
        self._fraction = fraction
        self._seen_bytes = 0
        self._held_bytes = 0

    def decide(self, size_bytes: int) -> bool:
        """True if the next piece, of this size, is held out."""
        held = self._held_bytes < self._fraction * self._seen_bytes
        self._seen_bytes += size_bytes
        if held:
            self._held_bytes += size_bytes
        return held
