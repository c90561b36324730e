"""One conformance suite that every tokenizer passes, and what is special to each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from tscale_fed.data import limits
from tscale_fed.data.byte_tokenizer import ByteTokenizer
from tscale_fed.data.gpt2 import load_gpt2
from tscale_fed.data.huggingface import load_tokenizer_file
from tscale_fed.data.tokenizer import Tokenizer, load_tokenizer, open_recorded_tokenizer
from tscale_net.errors import Refused

BYTES = ByteTokenizer()
GPT2 = load_gpt2()


def make_tokenizer_file(path: Path, special: list[str]) -> Path:
    """A small byte-level BPE, as people train their own."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["the cat and the other cat sat on the mat "] * 20, trainer)
    inner.save(str(path))
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tokenizer_file(tmp_path_factory.mktemp("own") / "tokenizer.json", ["<pad>", "<s>"]))


@pytest.fixture(params=["bytes", "gpt2", "file"])
def tokenizer(request: pytest.FixtureRequest, own: Tokenizer) -> Tokenizer:
    return {"bytes": BYTES, "gpt2": GPT2, "file": own}[request.param]


@given(raw=st.binary(max_size=300))
def test_bytes_round_trip_any_bytes(raw: bytes) -> None:
    assert BYTES.decode(BYTES.encode(raw)) == raw


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=120))
def test_bpe_round_trip_any_text(text: str) -> None:
    assert GPT2.decode(GPT2.encode(text)) == text.encode()


def test_round_trip(tokenizer: Tokenizer) -> None:
    text = "The cat's tail: naïve 🐈\r\n\n\t<s> <|endoftext|> \x00 end "
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode([tokenizer.fragment_start, *tokenizer.encode("a"), tokenizer.doc_start]) == b"a"
    assert tokenizer.encode("").size == 0 and tokenizer.decode([]) == b""


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    texts = [b"the cat", b"", " 🐈 ".encode(), b"\n\n x"]
    batch = tokenizer.encode_batch(texts)
    assert len(batch) == len(texts)
    for ids, text in zip(batch, texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert ids.dtype == tokenizer.encode(text).dtype and ids.dtype.itemsize == tokenizer.record.token_bytes


def test_special_ids_never_come_from_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|endoftext|><s></s><pad>").tolist()
    assert ids and max(ids) < tokenizer.fragment_start
    assert tokenizer.doc_start not in ids
    assert tokenizer.fragment_start != tokenizer.doc_start and max(tokenizer.fragment_start, tokenizer.doc_start) < tokenizer.vocab
    with pytest.raises(Refused, match="0 to"):
        tokenizer.decode([tokenizer.vocab])


def test_invalid_utf8_is_replaced_by_bpe_and_kept_by_bytes() -> None:
    assert GPT2.decode(GPT2.encode(b"a\xffb")) == "a\ufffdb".encode()
    assert BYTES.decode(BYTES.encode(b"a\xffb")) == b"a\xffb"


def test_gpt2_ids_are_the_published_ones() -> None:
    assert GPT2.encode("hello world").tolist() == [31373, 995]
    assert GPT2.encode("Hello, I am a language model,").tolist() == [15496, 11, 314, 716, 257, 3303, 2746, 11]
    assert (GPT2.vocab, GPT2.doc_start, GPT2.fragment_start) == (50258, 50256, 50257)
    assert GPT2.encode("x").dtype == np.uint16


def test_byte_ids_are_the_originals() -> None:
    assert (BYTES.vocab, BYTES.fragment_start, BYTES.doc_start) == (258, 256, 257)
    assert BYTES.encode("Aa").tolist() == [65, 97]


def test_a_character_cut_in_two_comes_back_as_its_bytes() -> None:
    ids = GPT2.encode("🐈").tolist()
    assert len(ids) > 1
    assert b"".join(GPT2.decode([i]) for i in ids) == "🐈".encode()


def test_document_start_is_the_files_own_or_one_more(tmp_path: Path) -> None:
    with_own = load_tokenizer_file(make_tokenizer_file(tmp_path / "a.json", ["<pad>", "<s>"]))
    assert with_own.doc_start == 1 and with_own.vocab == with_own.fragment_start + 1
    without = load_tokenizer_file(make_tokenizer_file(tmp_path / "b.json", []))
    assert without.doc_start == without.fragment_start + 1 and without.vocab == without.fragment_start + 2
    assert with_own.hash != without.hash


def test_truncation_padding_and_template_of_the_file_are_off(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(make_tokenizer_file(tmp_path / "t.json", ["<s>"])))
    plain = inner.encode("the cat sat", add_special_tokens=False).ids
    inner.enable_truncation(2)
    inner.enable_padding(length=40)
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    inner.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").encode("the cat sat").tolist() == plain


@pytest.mark.parametrize("spec", ["nosuch", "/no/such/tokenizer.json"])
def test_unknown_tokenizer(spec: str) -> None:
    with pytest.raises(Refused, match=f'No tokenizer "{spec}": write bytes, gpt2') as refused:
        load_tokenizer(spec)
    assert refused.value.code == "no-tokenizer"


def test_bad_tokenizer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "tokenizer.json"
    bad.write_text('{"model": 3}')
    with pytest.raises(Refused, match="is not a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="is not a Hugging Face tokenizer.json"):
        load_tokenizer(bad)
    monkeypatch.setattr(limits, "MAX_TOKENIZER_BYTES", 1)
    with pytest.raises(Refused, match="is larger than"):
        load_tokenizer(bad)


def test_another_tokenizer_than_recorded_is_refused(tmp_path: Path) -> None:
    make_tokenizer_file(tmp_path / "tokenizer.json", ["<s>"])
    record = load_tokenizer(tmp_path).record
    assert open_recorded_tokenizer(record, tmp_path).hash == record.hash
    make_tokenizer_file(tmp_path / "tokenizer.json", ["<s>", "<x>"])
    with pytest.raises(Refused, match="import the text again") as refused:
        open_recorded_tokenizer(record, tmp_path)
    assert refused.value.code == "wrong-tokenizer"
