"""Any Hugging Face tokenizer.json, through the `tokenizers` library.

Enters: the file. Leaves: a `Tokenizer` whose hash is the blake3 of the file's bytes. Truncation, padding and the template that adds
special tokens are switched off: ids of the text and nothing else; the spelling of a special token inside a text is ordinary text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from blake3 import blake3

from tscale_fed.data import limits
from tscale_fed.data.manifest import TokenizerKind, TokenizerRecord
from tscale_fed.data.tokenizer import Tokens
from tscale_net.errors import Refused

DOC_START_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]", "<|endoftext|>", "</s>", "<eos>", "[EOS]")
"""Spellings that stand between documents in published tokenizers; a token that begins a text is preferred to one that ends it."""


def byte_of_character() -> dict[str, int]:
    """The printable character by which byte-level BPE writes each byte (Radford et al. 2019, GPT-2): printable Latin-1 stands for
    itself, the other 68 bytes are written as U+0100 and up, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + n): b for n, b in enumerate(others)})
    return table


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer` behind our interface; also carries GPT-2's. Implements `Tokenizer`."""

    def __init__(self, inner: tokenizers.Tokenizer, record: TokenizerRecord, name: str, source: bytes | None) -> None:
        """`source`: content of tokenizer.json, kept because joining peers fetch it; None where the ids come with the package."""
        self._inner = inner
        self.byte_level = isinstance(inner.decoder, tokenizers.decoders.ByteLevel)
        self._bytes_of: dict[int, bytes] | None = None
        self.record = record
        self.name = name
        self.source = source
        self.vocab = record.vocab
        self.hash = record.hash
        self.doc_start = record.doc_start
        self.fragment_start = record.fragment_start
        self._type: np.dtype[np.unsignedinteger[Any]] = np.dtype(np.uint16 if record.token_bytes == 2 else np.uint32)

    def encode(self, text: bytes | str) -> Tokens:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, self._type)

    def encode_batch(self, texts: Sequence[bytes]) -> list[Tokens]:
        decoded = [text.decode("utf-8", "replace") for text in texts]
        # The "fast" form leaves out character offsets, which nobody here reads.
        encodings = self._inner.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, self._type) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> bytes:
        wanted = [int(i) for i in ids]
        if any(i < 0 or i >= self.vocab for i in wanted):
            raise Refused("bad-token", f"Token ids of {self.name} are 0 to {self.vocab - 1}.")
        own = [i for i in wanted if i < self.fragment_start and i != self.doc_start]
        if self.byte_level:
            # Through bytes, not text: a fragment may begin or end inside a character.
            table = self._byte_table()
            return b"".join(table.get(i, b"") for i in own)
        return self._inner.decode(own, skip_special_tokens=True).encode()

    def _byte_table(self) -> dict[int, bytes]:
        if self._bytes_of is None:
            byte_of = byte_of_character()
            vocab = self._inner.get_vocab(with_added_tokens=False)
            self._bytes_of = {i: bytes(byte_of[c] for c in word) for word, i in vocab.items() if all(c in byte_of for c in word)}
        return self._bytes_of


def build_record(inner: tokenizers.Tokenizer, kind: TokenizerKind, digest: str, file_bytes: int, doc_start: int | None) -> TokenizerRecord:
    """Ids by the rule of tokenizer.py. Raises Refused("bad-tokenizer") for an empty or absurdly large vocabulary."""
    ids = inner.get_vocab(with_added_tokens=True).values()
    base_vocab = max(ids, default=-1) + 1
    vocab = base_vocab + (1 if doc_start is not None else 2)
    if not 0 < base_vocab or vocab > limits.MAX_VOCAB:
        raise Refused("bad-tokenizer", f"The tokenizer has {base_vocab} tokens; 1 to {limits.MAX_VOCAB - 2} can be used.")
    return TokenizerRecord(kind, digest, vocab, base_vocab + 1 if doc_start is None else doc_start, base_vocab, file_bytes)


def load_tokenizer_file(path: Path) -> HuggingFaceTokenizer:
    """Read a tokenizer.json. Raises Refused("bad-tokenizer") if it is too large or `tokenizers` cannot read it."""
    if path.stat().st_size > limits.MAX_TOKENIZER_BYTES:
        raise Refused("bad-tokenizer", f"{path} is larger than {limits.MAX_TOKENIZER_BYTES // limits.MIB} MB: not a tokenizer.json.")
    source = path.read_bytes()
    try:
        inner = tokenizers.Tokenizer.from_buffer(source)
    except ValueError as error:
        raise Refused("bad-tokenizer", f"{path} is not a Hugging Face tokenizer.json ({error}).") from error
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    added = {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    doc_start = next((added[name] for name in DOC_START_NAMES if name in added), None)
    record = build_record(inner, "file", blake3(source).hexdigest(), len(source), doc_start)
    return HuggingFaceTokenizer(inner, record, path.name, source)
