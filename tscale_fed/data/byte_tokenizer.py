"""The byte tokenizer: every byte is its own token, so any file can be learnt and every text comes back exactly.

Ids: 0-255 the bytes, 256 fragment start, 257 document start; vocabulary 258 (the layout of the original's byte tokenizer).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from blake3 import blake3

from tscale_fed.data.manifest import TokenizerRecord
from tscale_fed.data.tokenizer import Tokens
from tscale_net.errors import Refused

BYTE_VALUES = 256
FRAGMENT_START = BYTE_VALUES
DOC_START = BYTE_VALUES + 1
VOCAB = BYTE_VALUES + 2


class ByteTokenizer:
    """See the module. Implements `Tokenizer`."""

    name = "bytes"
    vocab = VOCAB
    doc_start = DOC_START
    fragment_start = FRAGMENT_START
    hash = blake3(b"tscale-fed/tokenizer/bytes/1").hexdigest()

    @property
    def record(self) -> TokenizerRecord:
        return TokenizerRecord("bytes", self.hash, VOCAB, DOC_START, FRAGMENT_START)

    def encode(self, text: bytes | str) -> Tokens:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> bytes:
        wide = np.fromiter((int(i) for i in ids), np.int64)
        if wide.size and (wide.min() < 0 or wide.max() >= VOCAB):
            raise Refused("bad-token", f"Token ids of the byte tokenizer are 0 to {VOCAB - 1}.")
        return wide[wide < BYTE_VALUES].astype(np.uint8).tobytes()
