"""Tokens to text as they come: whole characters only, and nothing of a stop string.

Enters: token ids, one by one. Leaves: pieces of text that may be shown. Bytes that end inside a character wait for the rest; text that may
be the beginning of a stop string waits until it is or is not one. Bytes that are no UTF-8 become U+FFFD at the end or where it is certain.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from tscale_fed.data.huggingface import HuggingFaceTokenizer
from tscale_fed.data.tokenizer import Tokenizer
from tscale_fed.data.word_tokenizer import WordDecoder, WordTokenizer


class TokenBytes:
    """Bytes of one token after the other."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._finish: Callable[[], bytes] = bytes
        if isinstance(tokenizer, WordTokenizer):
            decoder = WordDecoder(tokenizer)
            self.feed: Callable[[int], bytes] = decoder.feed
            self._finish = decoder.finish
        elif isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.byte_level:
            self.feed = _ByDifference(tokenizer).feed
        else:
            self.feed = lambda token: tokenizer.decode([token])

    def finish(self) -> bytes:
        return self._finish()


class _ByDifference:
    """For tokenizers whose text of a token depends on the one before: what the last tokens read with and without the newest."""

    _REMEMBERED = 8
    """More than any decoder looks back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._last: list[int] = []
        self._waiting = 0
        """Of the last tokens, those whose text is not out yet."""

    def feed(self, token: int) -> bytes:
        self._last = [*self._last, token][-(self._REMEMBERED + self._waiting) :]
        self._waiting += 1
        known = self._tokenizer.decode(self._last[: -self._waiting])
        whole = self._tokenizer.decode(self._last)
        if whole.decode("utf-8", "replace").endswith("\ufffd"):  # a part of a character: the rest comes
            return b""
        self._waiting = 0
        return whole[len(known) :]


class Piecer:
    """Text of one answer. `stopped`: a stop string has come; nothing follows it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._bytes = TokenBytes(tokenizer)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """What can be shown now."""
        return self._release(self._characters.decode(self._bytes.feed(token)), final=False)

    def finish(self) -> str:
        """The rest, when the answer is over."""
        return self._release(self._characters.decode(self._bytes.finish(), final=True), final=True)

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [at for each in self._stop if (at := self._held.find(each)) >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = 0 if final else self._possible_beginning()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def _possible_beginning(self) -> int:
        """How many characters at the end may begin a stop string."""
        longest = 0
        for each in self._stop:
            for size in range(min(len(each) - 1, len(self._held)), longest, -1):
                if self._held.endswith(each[:size]):
                    longest = size
                    break
        return longest
