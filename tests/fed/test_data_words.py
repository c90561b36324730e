"""Word tokenizers: TScale's rules by example, any bytes there and back, training, files of both formats."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_fed.data.tokenizer import load_tokenizer
from tscale_fed.data.word_file import encode_vocabulary, read_original, read_word_file, tokenizer_of, write_original
from tscale_fed.data.word_tokenizer import CAPITAL, WORD_KINDS, WordDecoder, WordKind, WordTokenizer, WordVocabulary
from tscale_fed.data.word_training import count_words, train_words
from tscale_net.errors import Refused

WORDS = ("there", "cat", "cats", "привет", "п", "é", "и", "при", "th", "ing")


def made(kind: WordKind, words: tuple[str, ...] = WORDS) -> WordTokenizer:
    return tokenizer_of(WordVocabulary(kind, words), "words.json")


def spelled(tokenizer: WordTokenizer, text: str) -> list[str]:
    """Spellings of a text's tokens, "^" for the mark of a capital."""
    capital = tokenizer.vocabulary.has_capital
    return ["^" if i == CAPITAL and capital else tokenizer.spelling(int(i)).decode("latin-1") for i in tokenizer.encode(text)]


def as_latin(*pieces: str) -> list[str]:
    return [piece.encode().decode("latin-1") for piece in pieces]


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_characters_have_tokens_above_ascii_only() -> None:
    assert spelled(made("char"), "cat é") == as_latin("c", "a", "t", " ", "é")
    assert spelled(made("char"), "ü") == ["\xc3", "\xbc"]


def test_a_word_is_whole_or_letters_and_the_beginning_of_a_word_is_no_word() -> None:
    assert spelled(made("word"), "there cats") == ["there", " ", "cats"]
    assert spelled(made("word"), "the") == ["t", "h", "e"]
    assert spelled(made("word"), "Cat") == ["C", "a", "t"]


def test_a_capital_in_front_is_a_mark_and_one_further_in_is_not() -> None:
    assert spelled(made("word-capital"), "Cat") == ["^", "cat"]
    assert spelled(made("word-capital"), "CAT") == ["C", "A", "T"]
    assert spelled(made("word-capital"), "Привет") == ["^", *as_latin("привет")]
    assert spelled(made("greedy-capital"), "Thing") == ["^", "th", "ing"]
    assert spelled(made("greedy-capital"), "caTS") == ["c", "a", "T", "S"]


def test_greedy_takes_the_longest_piece_and_sees_no_further_than_beginnings() -> None:
    assert spelled(made("greedy"), "catsing") == ["cats", "ing"]
    assert spelled(made("greedy"), "thered") == ["there", "d"]
    assert spelled(made("greedy"), "ther") == ["th", "e", "r"]
    assert spelled(made("greedy"), "приветп") == as_latin("привет", "п")
    # "й" is no word itself, so nothing longer that begins with it is looked for.
    assert spelled(made("greedy", ("йод",)), "йод") == ["\xd0", "\xb9", "\xd0", "\xbe", "\xd0", "\xb4"]


def test_digits_and_signs_stand_alone() -> None:
    assert spelled(made("greedy"), "cat2cat, 17") == ["cat", "2", "cat", ",", " ", "1", "7"]


# -- there and back ----------------------------------------------------------------------------------------------------

LETTERS = st.text(alphabet="catshereing TCIA.2приветПЁё é\u0130ß🐈", max_size=60).map(str.encode)


@settings(max_examples=300, deadline=None)
@given(raw=st.one_of(st.binary(max_size=60), LETTERS), kind=st.sampled_from(WORD_KINDS))
def test_any_bytes_come_back(raw: bytes, kind: WordKind) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(raw)
    assert tokenizer.decode(ids) == raw
    decoder = WordDecoder(tokenizer)
    assert b"".join([*(decoder.feed(int(i)) for i in ids), decoder.finish()]) == raw


def test_any_ids_can_be_decoded() -> None:
    tokenizer = made("word-capital")
    rng = np.random.default_rng(1)
    for _ in range(200):
        tokenizer.decode(rng.integers(0, tokenizer.vocab, 30))
    for wrong in (-1, tokenizer.vocab):
        with pytest.raises(Refused, match="0 to"):
            tokenizer.decode([wrong])


def test_a_mark_raises_the_character_that_comes_even_in_parts() -> None:
    tokenizer = made("word-capital")
    assert tokenizer.decode([CAPITAL, 0xD0, 0xB1, ord("a")]) == "Бa".encode()
    assert tokenizer.decode([CAPITAL, CAPITAL, ord("a")]) == b"A"
    assert tokenizer.decode([CAPITAL, 0xD0]) == b"\xd0" and tokenizer.decode([CAPITAL, tokenizer.doc_start, ord("a")]) == b"a"


# -- training ----------------------------------------------------------------------------------------------------------

TEXT = b"The cat saw the other cats. Then THE cats saw a cat; the thing sang. " * 3


def test_words_are_counted_with_or_without_capitals() -> None:
    assert count_words([TEXT], capitals=False)["The"] == 3 and count_words([TEXT], capitals=False)["THE"] == 3
    merged = count_words([TEXT], capitals=True)
    assert merged["the"] == 9 and "THE" not in merged and "The" not in merged


def test_the_commonest_words_come_first_and_ties_go_by_bytes() -> None:
    found = train_words([b"bb aa cc cc x"], "word", 3)
    assert found.words == ("cc", "aa", "bb")


def test_pieces_grow_to_what_shortens_the_text() -> None:
    few = tokenizer_of(train_words([TEXT], "greedy-capital", 8), "few")
    many = tokenizer_of(train_words([TEXT], "greedy-capital", 40), "many")
    assert len(TEXT) > few.encode(TEXT).size > many.encode(TEXT).size
    assert "cat" in many.vocabulary.words and "the" in many.vocabulary.words
    assert train_words([TEXT], "greedy-capital", 40) == many.vocabulary


@pytest.mark.parametrize("kind", WORD_KINDS)
def test_every_kind_can_be_trained_and_bad_bytes_are_no_words(kind: WordKind) -> None:
    vocabulary = train_words([TEXT, "где кот, Кот".encode(), b"\xff\xfe cat\xff"], kind, 30)
    assert 0 < len(vocabulary.words) <= 30
    tokenizer = tokenizer_of(vocabulary, "x")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_text_without_words_is_refused() -> None:
    with pytest.raises(Refused, match="nothing to make a vocabulary"):
        train_words([b"1 2 3 a"], "word", 10)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WORD_KINDS)
def test_both_formats_keep_a_vocabulary(kind: WordKind, tmp_path: Path) -> None:
    tokenizer = made(kind)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(encode_vocabulary(tokenizer.vocabulary))
    again = load_tokenizer(path)
    assert again.record == tokenizer.record and again.encode("Thing там").tolist() == tokenizer.encode("Thing там").tolist()
    original = tmp_path / "tokenizer.bin"
    original.write_bytes(write_original(tokenizer.vocabulary))
    assert load_tokenizer(original).record == tokenizer.record


def test_a_damaged_original_is_refused_at_every_length() -> None:
    data = write_original(WordVocabulary("greedy", WORDS))
    for end in range(0, len(data), 7):
        with pytest.raises(Refused, match="not a tokenizer file of TScale"):
            read_original(data[:end], "x.bin")
    with pytest.raises(Refused, match="bytes follow its end"):
        read_original(data + b"\0", "x.bin")
    with pytest.raises(Refused, match="claims"):
        read_original(data[:12] + struct.pack("<q", 1 << 60) + data[20:], "x.bin")
    with pytest.raises(Refused, match="its type is 9"):
        read_original(struct.pack("<i", 9) + data[4:], "x.bin")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{", "not a word tokenizer"),
        (b'{"format": "tscale-fed/word-tokenizer", "version": 1, "kind": "greedy", "words": ["ab", "ab"]}', "twice"),
        (b'{"format": "tscale-fed/word-tokenizer", "version": 1, "kind": "greedy", "words": ["a"]}', "fewer than two bytes"),
        (b'{"format": "tscale-fed/word-tokenizer", "version": 1, "kind": "odd", "words": []}', "kind"),
    ],
)
def test_a_wrong_word_file_is_refused(text: bytes, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        read_word_file(text, Path("words.json"))
