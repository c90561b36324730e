"""Files of word vocabularies: our own (JSON, readable by people) and TScale's binary one.

Enters: a file. Leaves: a `WordTokenizer`; or a vocabulary as bytes of either format.

Our own: {"format": "tscale-fed/word-tokenizer", "version": 1, "kind": "greedy-capital", "words": [...]}, words in the order of their ids.
TScale's (little-endian, no magic): i32 type | i64 number of tokens | i64 n, n x i32 ids of the 256 bytes | i64 n, n strings, n x i32 ids
(-1: only the beginning of a word) | i64 n, n strings: spelling of every id, empty for special tokens | i32 document start, i32 capital,
i32 fragment start. A string is i32 length and bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal

import msgspec
from blake3 import blake3

from tscale_fed.data import limits
from tscale_fed.data.manifest import TokenizerRecord
from tscale_fed.data.word_tokenizer import (
    BYTE_VALUES,
    CAPITAL,
    DOC_START,
    FRAGMENT_START,
    WordKind,
    WordTokenizer,
    WordVocabulary,
)
from tscale_net.errors import Refused

FORMAT = "tscale-fed/word-tokenizer"
_ORIGINAL_KINDS: tuple[WordKind, ...] = ("char", "word", "word-capital", "greedy", "greedy-capital")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: Literal["tscale-fed/word-tokenizer"]
    version: Literal[1]
    kind: Literal["char", "word", "word-capital", "greedy", "greedy-capital"]
    words: list[str]


def is_word_file(source: bytes) -> bool:
    """Does this look like one of ours, as against a Hugging Face tokenizer.json?"""
    return FORMAT.encode() in source[:256]


def encode_vocabulary(vocabulary: WordVocabulary) -> bytes:
    """Our own format; equal vocabularies give equal bytes."""
    file = _File("tscale-fed/word-tokenizer", 1, vocabulary.kind, list(vocabulary.words))
    return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"


def tokenizer_of(vocabulary: WordVocabulary, name: str) -> WordTokenizer:
    """A tokenizer, as it would come from the vocabulary's own file."""
    source = encode_vocabulary(vocabulary)
    record = TokenizerRecord("file", blake3(source).hexdigest(), vocabulary.size, DOC_START, FRAGMENT_START, len(source))
    return WordTokenizer(vocabulary, record, name, source)


def read_word_file(source: bytes, path: Path) -> WordTokenizer:
    """Our own format. Raises Refused("bad-tokenizer") naming the file and what is wrong with it."""
    try:
        found = msgspec.json.decode(source, type=_File)
        vocabulary = WordVocabulary(found.kind, tuple(found.words))
        if vocabulary.size > limits.MAX_VOCAB:
            raise ValueError(f"{vocabulary.size} tokens are more than {limits.MAX_VOCAB}")
    except (ValueError, UnicodeEncodeError) as error:  # msgspec's errors are ValueErrors
        raise Refused("bad-tokenizer", f"{path} is not a word tokenizer ({error}).") from None
    record = TokenizerRecord("file", blake3(source).hexdigest(), vocabulary.size, DOC_START, FRAGMENT_START, len(source))
    return WordTokenizer(vocabulary, record, path.name, source)


# -- TScale's binary format --------------------------------------------------------------------------------------------


class _Reader:
    """Checked reading: every length is held against what is left before anything is made of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size < 0 or size > len(self._data) - self._at:
            raise ValueError(f"it ends at byte {len(self._data)}, inside something of {size} bytes that begins at byte {self._at}")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def count(self, least_bytes: int) -> int:
        """A number of items of at least so many bytes each."""
        n = self.number("<q")
        if not 0 <= n <= (len(self._data) - self._at) // least_bytes:
            raise ValueError(f"it claims {n} items before byte {self._at}, which do not fit")
        return n

    def numbers(self, n: int) -> tuple[int, ...]:
        return struct.unpack(f"<{n}i", self.take(4 * n))

    def strings(self, n: int) -> list[bytes]:
        return [self.take(self.number("<i")) for _ in range(n)]

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes follow its end at byte {self._at}")


def read_original(data: bytes, name: str) -> WordTokenizer:
    """TScale's binary file. Raises Refused("bad-tokenizer") naming the byte where it stops making sense."""
    try:
        return tokenizer_of(_original_vocabulary(_Reader(data)), name)
    except ValueError as error:
        raise Refused("bad-tokenizer", f"{name} is not a tokenizer file of TScale: {error}.") from None


def _original_vocabulary(reader: _Reader) -> WordVocabulary:
    type_number, tokens = reader.number("<i"), reader.number("<q")
    if not 0 <= type_number < len(_ORIGINAL_KINDS):
        raise ValueError(f"its type is {type_number}; known are 0 to {len(_ORIGINAL_KINDS) - 1}")
    kind = _ORIGINAL_KINDS[type_number]
    if reader.numbers(reader.count(4)) != tuple(range(BYTE_VALUES)):
        raise ValueError("its bytes have other ids than 0 to 255 (made by make_char_dataset?); import that text with --tokenizer bytes")
    n = reader.count(8)
    strings = reader.strings(n)
    ids = dict(zip(strings, reader.numbers(n), strict=True))
    spellings = reader.strings(reader.count(4))
    special = (reader.number("<i"), reader.number("<i"), reader.number("<i"))
    reader.end()
    first = CAPITAL + 1 if kind.endswith("-capital") else CAPITAL
    if special != (DOC_START, CAPITAL if kind.endswith("-capital") else -1, FRAGMENT_START) or tokens != len(spellings):
        raise ValueError(f"its special tokens are {special} and its tokens {tokens} of {len(spellings)}, which no version writes")
    words = spellings[first:]
    if any(ids.get(word) != first + n for n, word in enumerate(words)):
        raise ValueError("its two lists of words differ")
    return WordVocabulary(kind, tuple(word.decode() for word in words))


def write_original(vocabulary: WordVocabulary) -> bytes:
    """TScale's binary file of a vocabulary, for use there."""
    first = vocabulary.first_word
    spellings = [*(bytes([n]) for n in range(BYTE_VALUES)), *[b""] * (first - BYTE_VALUES), *(word.encode() for word in vocabulary.words)]
    ids = {word.encode(): first + n for n, word in enumerate(vocabulary.words)}
    for word in vocabulary.words:
        for end in range(1, len(word)):
            beginning = word[:end].encode()
            if len(beginning) > 1:
                ids.setdefault(beginning, -1)
    capital = CAPITAL if vocabulary.has_capital else -1
    parts: list[Any] = [
        struct.pack("<iq", _ORIGINAL_KINDS.index(vocabulary.kind), len(spellings)),
        struct.pack(f"<q{BYTE_VALUES}i", BYTE_VALUES, *range(BYTE_VALUES)),
        struct.pack("<q", len(ids)),
        *(struct.pack("<i", len(word)) + word for word in ids),
        struct.pack(f"<{len(ids)}i", *ids.values()),
        struct.pack("<q", len(spellings)),
        *(struct.pack("<i", len(word)) + word for word in spellings),
        struct.pack("<iii", DOC_START, capital, FRAGMENT_START),
    ]
    return b"".join(parts)
