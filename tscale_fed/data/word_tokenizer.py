"""TScale's tokenizers: characters, whole words, greedy pieces of words, with or without a token for capitals; the decoder that it lacks.

Enters: a vocabulary (word_file.py, word_training.py), text. Leaves: ids and back, any bytes exactly.

A word is a longest run of ASCII letters and characters above ASCII; every other character stands alone, digits too. Ids: 0-255 the bytes,
256 fragment start, 257 document start, then (kinds "-capital") 258 the mark of a capital, then the words. How a word is written:

    char             each character above ASCII by its own token if it has one, all else by bytes ("letters" below)
    word             the word's token, else letters
    greedy           from the left, the longest piece that the vocabulary has; a byte where it has none. Pieces grow character by
                     character as long as they begin some word; a first character above ASCII that is no word itself is written by bytes
    word-capital     like word; a word whose only capital comes first is the mark and then the word in small letters; with capitals
    greedy-capital   further in, word-capital writes letters and greedy-capital greedy pieces of the word as it stands

Bytes that are not UTF-8 are written as bytes (TScale drops the rest of the text), and a word that is only the beginning of another one is
not taken for a word (there it gives an id of -1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tscale_fed.data.letter_case import case_of, with_capital_first, with_small_first
from tscale_fed.data.manifest import TokenizerRecord
from tscale_fed.data.tokenizer import Tokens
from tscale_net.errors import Refused

WordKind = Literal["char", "word", "word-capital", "greedy", "greedy-capital"]
WORD_KINDS: tuple[WordKind, ...] = get_args(WordKind)
BYTE_VALUES = 256
FRAGMENT_START = 256
DOC_START = 257
CAPITAL = 258
CACHED_WORDS = 1 << 18
"""Words whose ids are remembered: a language's common ones, some 60 MB."""
_WORD = re.compile(r"[A-Za-z\x80-\U0010ffff]+|.", re.DOTALL)
_LONGEST_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class WordVocabulary:
    """Words in the order of their ids, each of at least two bytes of UTF-8. Raises ValueError for one twice, or shorter."""

    kind: WordKind
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.words)) != len(self.words):
            raise ValueError("a word stands in the vocabulary twice")
        if any(len(word.encode()) < 2 for word in self.words):
            raise ValueError("a word of the vocabulary has fewer than two bytes, which have tokens of their own")

    @property
    def has_capital(self) -> bool:
        return self.kind.endswith("-capital")

    @property
    def first_word(self) -> int:
        """Id of the first word."""
        return CAPITAL + 1 if self.has_capital else CAPITAL

    @property
    def size(self) -> int:
        return self.first_word + len(self.words)


class WordTokenizer:
    """See the module. Implements `Tokenizer`."""

    doc_start = DOC_START
    fragment_start = FRAGMENT_START

    def __init__(self, vocabulary: WordVocabulary, record: TokenizerRecord, name: str, source: bytes) -> None:
        """`source`: the vocabulary's file, of which `record` holds the hash; joining peers fetch it."""
        self.vocabulary = vocabulary
        self.record = record
        self.name = name
        self.source = source
        self.vocab = vocabulary.size
        self.hash = record.hash
        self._ids = {word: vocabulary.first_word + n for n, word in enumerate(vocabulary.words)}
        self._beginnings = {word[:end] for word in vocabulary.words for end in range(1, len(word))}
        self._spellings = [*(bytes([n]) for n in range(BYTE_VALUES)), *[b""] * (vocabulary.first_word - BYTE_VALUES)]
        self._spellings += [word.encode() for word in vocabulary.words]
        self._encode_word: Callable[[str], list[int]] = {
            "char": self._letters,
            "word": self._whole,
            "word-capital": self._whole_capital,
            "greedy": self._pieces,
            "greedy-capital": self._pieces_capital,
        }[vocabulary.kind]
        self._known: dict[str, list[int]] = {}
        self._type: np.dtype[np.unsignedinteger[Any]] = np.dtype(np.uint16 if record.token_bytes == 2 else np.uint32)

    # -- text to ids -------------------------------------------------------------------------------------------------

    def encode(self, text: bytes | str) -> Tokens:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")  # a byte that is not UTF-8 becomes a character that no word contains
        known, ids = self._known, []
        for word in _WORD.findall(text):
            found = known.get(word)
            if found is None:
                found = self._learn(word)
            ids += found
        return np.array(ids, self._type)

    def encode_batch(self, texts: Sequence[bytes]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def _learn(self, word: str) -> list[int]:
        if len(self._known) >= CACHED_WORDS:
            self._known.clear()
        found = self._known[word] = self._encode_word(word)
        return found

    def _letters(self, word: str) -> list[int]:
        ids: list[int] = []
        for character in word:
            own = self._ids.get(character)
            if own is None:
                ids += character.encode("utf-8", "surrogateescape")
            else:
                ids.append(own)
        return ids

    def _whole(self, word: str) -> list[int]:
        own = self._ids.get(word)
        return self._letters(word) if own is None else [own]

    def _whole_capital(self, word: str) -> list[int]:
        case = case_of(word)
        if case == "mixed":
            return self._letters(word)
        return self._whole(word) if case == "lower" else [CAPITAL, *self._whole(with_small_first(word))]

    def _pieces(self, word: str) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(word):
            first = word[at]
            own = self._ids.get(first)
            if own is None and not first.isascii():
                ids += first.encode("utf-8", "surrogateescape")
                at += 1
                continue
            found, end = (ord(first) if own is None else own), at + 1
            for stop in range(at + 2, len(word) + 1):
                piece = word[at:stop]
                longer = self._ids.get(piece)
                if longer is not None:
                    found, end = longer, stop
                elif piece not in self._beginnings:
                    break
            ids.append(found)
            at = end
        return ids

    def _pieces_capital(self, word: str) -> list[int]:
        if case_of(word) == "capital":
            return [CAPITAL, *self._pieces(with_small_first(word))]
        return self._pieces(word)

    # -- ids to text -------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int]) -> bytes:
        decoder = WordDecoder(self)
        return b"".join([*(decoder.feed(int(i)) for i in ids), decoder.finish()])

    def spelling(self, token: int) -> bytes:
        """Bytes of one token; none for the special ones. Raises Refused("bad-token")."""
        if not 0 <= token < self.vocab:
            raise Refused("bad-token", f"Token ids of {self.name} are 0 to {self.vocab - 1}.")
        return self._spellings[token]


class WordDecoder:
    """Ids to text one by one, as a sampler makes them: `feed` gives what is certain so far."""

    def __init__(self, tokenizer: WordTokenizer) -> None:
        self._tokenizer = tokenizer
        self._capital = tokenizer.vocabulary.has_capital
        self._held: bytes | None = None
        """After the mark of a capital: bytes of the character that it belongs to, as far as they have come."""

    def feed(self, token: int) -> bytes:
        """Text that this token adds. Raises Refused("bad-token")."""
        piece = self._tokenizer.spelling(token)
        if token == CAPITAL and self._capital:
            told, self._held = self.finish(), b""
            return told
        if self._held is None:
            return piece
        if not piece:
            return self.finish()
        self._held += piece
        return self._raised()

    def finish(self) -> bytes:
        """What was held back."""
        held, self._held = self._held, None
        return held or b""

    def _raised(self) -> bytes:
        """The held bytes with a capital, once their first character is whole, or cannot become so."""
        held = self._held
        assert held is not None
        need = _character_bytes(held[0])
        if len(held) < need:
            return b""
        self._held = None
        try:
            first = held[:need].decode()
        except UnicodeDecodeError:
            return held
        return with_capital_first(first).encode() + held[need:]


def _character_bytes(first: int) -> int:
    """Bytes of the UTF-8 character that begins with this byte; 1 if none does."""
    if first < 0xC0:
        return 1
    return 2 if first < 0xE0 else 3 if first < 0xF0 else _LONGEST_CHARACTER_BYTES if first < 0xF8 else 1
