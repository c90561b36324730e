"""The tokenizer interface, and the one place that turns a tokenizer's name into a tokenizer.

Enters: "bytes", "gpt2", or the path of a tokenizer: a Hugging Face tokenizer.json, a word tokenizer of ours, a binary one of TScale.
Leaves: a `Tokenizer`.

Rule for ids (as in the original TScale: a vocabulary of 50257 becomes 50258): ids below `base_vocab` are the tokenizer's own; the
fragment-start token is `base_vocab`; the document-start token is the tokenizer's own end-of-text or begin-of-text token where it has
one, else `base_vocab + 1`. Special tokens never come out of text: "<|endoftext|>" written in a document is encoded as those characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tscale_fed.data.manifest import TokenizerRecord
from tscale_net.errors import Refused

Tokens = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids, [n]; 2 bytes each if the vocabulary allows it."""


class Tokenizer(Protocol):
    """Text to ids and back. Every implementation passes the same conformance tests."""

    @property
    def record(self) -> TokenizerRecord:
        """What a manifest says about this tokenizer: kind, hash, vocabulary, special ids."""
        ...

    @property
    def name(self) -> str:
        """As people know it: "bytes", "gpt2", "tokenizer.json"."""
        ...

    @property
    def vocab(self) -> int:
        """Vocabulary of the model: all ids are below it, fragment start and document start included."""
        ...

    @property
    def hash(self) -> str:
        """blake3 of everything that decides ids, 64 hex digits."""
        ...

    @property
    def doc_start(self) -> int: ...

    @property
    def fragment_start(self) -> int: ...

    def encode(self, text: bytes | str) -> Tokens:
        """Ids of one text, [n]. Bytes that are not UTF-8 become U+FFFD, except with the byte tokenizer."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[Tokens]:
        """`encode` of each text; on several cores where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of the ids; special tokens give nothing. Raises Refused("bad-token") for an id outside the vocabulary."""
        ...


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer named by `spec`: "bytes", "gpt2", or the path of a file; see the module.

    Raises Refused: "no-tokenizer" (no such name or file), "bad-tokenizer" (the file is not a tokenizer).
    """
    if spec == "bytes":
        from tscale_fed.data.byte_tokenizer import ByteTokenizer

        return ByteTokenizer()
    if spec == "gpt2":
        from tscale_fed.data.gpt2 import load_gpt2

        return load_gpt2()
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise Refused("no-tokenizer", f'No tokenizer "{spec}": write bytes, gpt2, or the path of a tokenizer.json or .bin.')
    return _read_tokenizer_file(path)


def _read_tokenizer_file(path: Path) -> Tokenizer:
    """By what the file begins with, whatever its name."""
    from tscale_fed.data import limits
    from tscale_fed.data.huggingface import load_tokenizer_file
    from tscale_fed.data.word_file import is_word_file, read_original, read_word_file

    if path.stat().st_size > limits.MAX_TOKENIZER_BYTES:
        raise Refused("bad-tokenizer", f"{path} is larger than {limits.MAX_TOKENIZER_BYTES // limits.MIB} MB: not a tokenizer.")
    source = path.read_bytes()
    if is_word_file(source):
        return read_word_file(source, path)
    if source[:1] not in (b"{", b"") and path.suffix == ".bin":
        return read_original(source, path.name)
    return load_tokenizer_file(path)


def open_recorded_tokenizer(record: TokenizerRecord, directory: Path) -> Tokenizer:
    """The tokenizer of a data directory; its tokenizer.json lies there if the kind is "file".

    Raises Refused("wrong-tokenizer") if what this installation has under that name gives other ids than the directory was made with.
    """
    from tscale_fed.data.manifest import TOKENIZER_FILE

    tokenizer = load_tokenizer(directory / TOKENIZER_FILE if record.kind == "file" else record.kind)
    if tokenizer.record != record:
        raise Refused(
            "wrong-tokenizer",
            f"{directory} was made with tokenizer {record.kind} {record.hash[:12]}, here it is {tokenizer.hash[:12]}: "
            "import the text again or install the version of tscale-fed that made it.",
        )
    return tokenizer
