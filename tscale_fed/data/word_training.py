"""Vocabularies for word tokenizers: the commonest words, or pieces that a greedy reader finds useful.

Enters: texts, a kind, a number of words. Leaves: a `WordVocabulary`. Equal texts give equal vocabularies: ties go to the lower bytes.

Words are counted first, as the tokenizer splits text; kinds with a mark count a word with its only capital in front in small letters,
and leave out words with capitals further in. Kinds "word" then take the commonest words of at least two bytes, kind "char" the commonest
characters above ASCII. Kinds "greedy" take pieces in rounds (TScale's trainer): each word is read greedily with the pieces so far, and its
count goes to the pieces used, to each piece made one character longer, and to first characters above ASCII; the best of these are the
next round's pieces. So pieces grow by a character in each round.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from tscale_fed.data.letter_case import case_of, with_small_first
from tscale_fed.data.word_tokenizer import WordKind, WordVocabulary
from tscale_net.errors import Refused

GREEDY_ROUNDS = 20
"""Pieces of up to about so many characters: longer ones are rare in any language. (TScale's number.)"""
MAX_WORD_CHARACTERS = 64
"""A longer run is no word; it would cost time by its square."""
_WORDS = re.compile(r"[A-Za-z\x80-\U0010ffff]+")
Progress = Callable[[int, int], None]
"""(rounds done, rounds in all)."""


def train_words(texts: Iterable[bytes], kind: WordKind, size: int, progress: Progress = lambda done, total: None) -> WordVocabulary:
    """A vocabulary of at most `size` words. Raises Refused("no-words") if the texts hold none."""
    counts = count_words(texts, capitals=kind.endswith("-capital"))
    if kind == "char":
        found = _commonest(_character_counts(counts), size)
    elif kind.startswith("word"):
        found = _commonest(counts, size)
    else:
        found = _greedy_pieces(counts, size, progress)
    if not found:
        raise Refused("no-words", f"The texts hold nothing to make a vocabulary of kind {kind} from: it needs words of two bytes or more.")
    return WordVocabulary(kind, tuple(found))


def count_words(texts: Iterable[bytes], *, capitals: bool) -> Counter[str]:
    """How often each word occurs; `capitals`: see the module."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORDS.findall(text.decode("utf-8", "surrogateescape")))
    return Counter(
        {word: n for word, n in _merged(counts, capitals).items() if len(word) <= MAX_WORD_CHARACTERS and not _has_stray_bytes(word)}
    )


def _merged(counts: Counter[str], capitals: bool) -> Counter[str]:
    if not capitals:
        return counts
    merged: Counter[str] = Counter()
    for word, n in counts.items():
        if (case := case_of(word)) != "mixed":
            merged[with_small_first(word) if case == "capital" else word] += n
    return merged


def _has_stray_bytes(word: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in word)


def _character_counts(counts: Counter[str]) -> Counter[str]:
    characters: Counter[str] = Counter()
    for word, n in counts.items():
        for character in word:
            characters[character] += n
    return characters


def _commonest(counts: Counter[str], size: int) -> list[str]:
    """Of at least two bytes, the commonest first; ties by bytes."""
    long_enough = [(-n, word.encode(), word) for word, n in counts.items() if len(word) > 1 or not word.isascii()]
    return [word for _, _, word in sorted(long_enough)[:size]]


def _greedy_pieces(counts: Counter[str], size: int, progress: Progress) -> list[str]:
    pieces: list[str] = []
    words = sorted(counts.items())
    for done in range(GREEDY_ROUNDS):
        progress(done, GREEDY_ROUNDS)
        pieces = _commonest(_piece_counts(words, set(pieces)), size)
    progress(GREEDY_ROUNDS, GREEDY_ROUNDS)
    return pieces


def _piece_counts(words: list[tuple[str, int]], pieces: set[str]) -> Counter[str]:
    """What a greedy reader with these pieces uses, and what it would use if there were one more."""
    useful: Counter[str] = Counter()
    longest = max(map(len, pieces), default=1)
    for word, n in words:
        at = 0
        while at < len(word):
            end = at + 1
            for stop in range(min(len(word), at + longest), at + 1, -1):
                if word[at:stop] in pieces:
                    end = stop
                    break
            useful[word[at:end]] += n
            if end < len(word):
                useful[word[at : end + 1]] += n
            if end > at + 1 and not word[at].isascii():
                useful[word[at]] += n
            at = end
    return useful
