"""What is in a data directory, and what a run tells its peers about data.

Enters: bytes of manifest.json, or the plain dictionary in a run manifest, possibly from a stranger. Leaves: checked, frozen structs.

A directory holds (names are derived from the manifest, never taken from it, so a manifest cannot point outside its directory):

    manifest.json                       `DataManifest`
    train-00000.tokens, ...             token ids, little-endian, 2 bytes each (4 if the vocabulary is above 65536)
    test-00000.tokens, ...              the held-out part: other files, so that training cannot read them by mistake
    train.starts, test.starts           uint64 positions of the document-start tokens, ascending
    unigrams.counts                     int64 [vocab], how often each token occurs in train: the model's fixed output bias comes from it
    tokenizer.json                      only for tokenizers of kind "file"
    import.json                         only where it was imported: how to make it again. Local, never sent.

Every file but the two .json of ours is named in the manifest by size and blake3, so the hash of the manifest names the whole content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta

from tscale_fed.data import limits
from tscale_net.errors import Refused

MANIFEST_FILE = "manifest.json"
IMPORT_FILE = "import.json"
TOKENIZER_FILE = "tokenizer.json"
UNIGRAMS_FILE = "unigrams.counts"
VERSION: Literal[1] = 1
UNIGRAM_BYTES = 8
START_BYTES = 8

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
TokenizerKind = Literal["bytes", "gpt2", "file"]
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""blake3, 256 bits, in hex."""
TokenId = Annotated[int, Meta(ge=0, lt=limits.MAX_VOCAB)]
SplitTokens = Annotated[int, Meta(ge=0, le=limits.MAX_SPLIT_TOKENS)]


class TokenizerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tokenizer as peers must agree on it."""

    kind: TokenizerKind
    hash: Hash
    vocab: Annotated[int, Meta(ge=2, le=limits.MAX_VOCAB)]
    """Of the model: fragment start and document start included."""
    doc_start: TokenId
    fragment_start: TokenId
    file_bytes: Annotated[int, Meta(ge=0, le=limits.MAX_TOKENIZER_BYTES)] = 0
    """Size of tokenizer.json; 0 where no file travels."""

    def __post_init__(self) -> None:
        if max(self.doc_start, self.fragment_start) >= self.vocab or self.doc_start == self.fragment_start:
            raise ValueError("special tokens outside the vocabulary, or equal")
        if (self.kind == "file") != (self.file_bytes > 0):
            raise ValueError("a tokenizer of kind file needs file_bytes, others have none")

    @property
    def token_bytes(self) -> int:
        """Bytes of one id on disk."""
        return 2 if self.vocab <= limits.NARROW_VOCAB else 4


class SplitRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The training part or the held-out part. All shards but the last hold `shard_tokens`."""

    tokens: SplitTokens
    text_bytes: Annotated[int, Meta(ge=0, le=8 * limits.MAX_SPLIT_TOKENS)]
    """Bytes of text behind the tokens: turns loss per token into bits per byte, comparable across tokenizers."""
    documents: SplitTokens
    """Number of document-start tokens."""
    shard_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_SPLIT_TOKENS)]
    shards: Annotated[list[Hash], Meta(max_length=limits.MAX_SHARDS)]
    starts: Hash

    def __post_init__(self) -> None:
        if len(self.shards) != -(-self.tokens // self.shard_tokens):
            raise ValueError("the number of shards does not fit the number of tokens")
        if self.documents > self.tokens:
            raise ValueError("more documents than tokens")

    def shard_sizes(self) -> list[int]:
        """Tokens of each shard."""
        return [min(self.shard_tokens, self.tokens - i * self.shard_tokens) for i in range(len(self.shards))]


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a data directory as others can ask for it: blob name `data/<hash>`."""

    name: str
    size: int
    hash: str

    @property
    def blob(self) -> str:
        return f"data/{self.hash}"


class DataManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a data directory."""

    version: Literal[1]
    tokenizer: TokenizerRecord
    train: SplitRecord
    test: SplitRecord
    unigrams: Hash

    @property
    def hash(self) -> str:
        """Names the whole content, 64 hex digits."""
        return blake3(msgspec.json.encode(self)).hexdigest()

    def split(self, split: Split) -> SplitRecord:
        return self.train if split == "train" else self.test

    def files(self) -> list[DataFile]:
        """Every file that another peer needs to have the same data, in a fixed order."""
        return [*self.vocabulary_files(), *(file for split in SPLITS for file in self._split_files(split))]

    def vocabulary_files(self) -> list[DataFile]:
        """What even a peer with text of its own needs: the run's unigram counts, and the tokenizer if it is a file."""
        files = [DataFile(UNIGRAMS_FILE, self.tokenizer.vocab * UNIGRAM_BYTES, self.unigrams)]
        if self.tokenizer.kind == "file":
            files.append(DataFile(TOKENIZER_FILE, self.tokenizer.file_bytes, self.tokenizer.hash))
        return files

    def _split_files(self, split: Split) -> Iterator[DataFile]:
        part = self.split(split)
        for index, (tokens, digest) in enumerate(zip(part.shard_sizes(), part.shards, strict=True)):
            yield DataFile(shard_name(split, index), tokens * self.tokenizer.token_bytes, digest)
        yield DataFile(starts_name(split), part.documents * START_BYTES, part.starts)


class DataRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The data section of a run manifest: everything a joining peer must know."""

    data: DataManifest
    served: bool
    """True: the creator serves the shards, a joiner may fetch them. False: bring text of your own, made with the same tokenizer
    (unigram counts and tokenizer file are served all the same)."""

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values, for the run manifest."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @staticmethod
    def from_plain(plain: object) -> DataRecipe:
        """Strict: unknown fields, wrong types, sizes beyond limits.py are Refused("bad-data-recipe")."""
        try:
            return msgspec.convert(plain, DataRecipe)
        except msgspec.ValidationError as error:
            detail = f"The run's data section is malformed ({error}): it comes from a broken or hostile peer."
            raise Refused("bad-data-recipe", detail) from error

    def files(self) -> list[DataFile]:
        """What a joiner that has nothing fetches: all files if served, else the vocabulary files."""
        return self.data.files() if self.served else self.data.vocabulary_files()

    def check_own_data(self, own: DataManifest) -> None:
        """A peer that brings text of its own must have made it with the run's tokenizer. Raises Refused("wrong-tokenizer")."""
        wanted = self.data.tokenizer
        if own.tokenizer != wanted:
            detail = (
                f"Your data was made with tokenizer {own.tokenizer.kind} {own.tokenizer.hash[:12]}, the run uses {wanted.kind} "
                f"{wanted.hash[:12]}: import your text again with the run's tokenizer."
            )
            raise Refused("wrong-tokenizer", detail)


def shard_name(split: Split, index: int) -> str:
    return f"{split}-{index:05d}.tokens"


def starts_name(split: Split) -> str:
    return f"{split}.starts"


def read_manifest(directory: Path) -> DataManifest:
    """The manifest of a data directory. Raises Refused: "no-data" (no such directory or no manifest), "bad-data" (damaged)."""
    path = directory / MANIFEST_FILE
    try:
        if path.stat().st_size > limits.MAX_MANIFEST_BYTES:
            raise Refused("bad-data", f"{path} is larger than {limits.MAX_MANIFEST_BYTES // limits.MIB} MB: not a manifest of ours.")
        return msgspec.json.decode(path.read_bytes(), type=DataManifest)
    except (FileNotFoundError, NotADirectoryError):
        raise Refused("no-data", f"No token data in {directory}: make it with `tscale data import TEXT --out {directory}`.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused("bad-data", f"{path} is damaged ({error}): import the text again.") from error


def encode_manifest(manifest: DataManifest) -> bytes:
    """As it stands in manifest.json."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
