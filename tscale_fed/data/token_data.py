"""`TokenData`: a data directory, open for training and evaluation.

Enters: a directory made by an import or assembled from peers. Leaves: batches `text`, `target` (int64 [B, T]) and unigram counts.

Rule for fragments (the original TScale's): a fragment of length T at position o reads T + 1 ids; text = ids[o : o+T],
target = ids[o+1 : o+T+1]; text[0] is replaced by the fragment-start token and target[0] is -1, "no target", since nothing can be known
from the start token alone. Fragments start anywhere, also inside documents. Training and held-out ids lie in different files, so a
training batch cannot hold a held-out token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tscale_fed.data.manifest import UNIGRAMS_FILE, DataFile, DataManifest, Split, read_manifest
from tscale_fed.data.sampling import batch_positions, spread_positions
from tscale_fed.data.shards import TokenStream
from tscale_fed.data.tokenizer import Tokenizer, open_recorded_tokenizer
from tscale_net.errors import Refused

NO_TARGET = -1
Batch = tuple[torch.Tensor, torch.Tensor]
"""(text, target), int64 [B, T] on the CPU."""


class TokenData:
    """See the module. Reading is thread-safe; nothing is kept between calls."""

    def __init__(self, directory: Path, manifest: DataManifest, unigrams: Path | None = None) -> None:
        """Use `open`. Raises Refused("bad-data") if a file is missing or has the wrong size; content is checked by `verify_directory`."""
        self.directory = directory
        self.manifest = manifest
        token_bytes = manifest.tokenizer.token_bytes
        self._streams: dict[Split, TokenStream] = {
            "train": TokenStream(directory, "train", manifest.train, token_bytes),
            "test": TokenStream(directory, "test", manifest.test, token_bytes),
        }
        self.unigram_counts = read_unigrams(unigrams or directory / UNIGRAMS_FILE, self.vocab)
        """int64 [vocab]: occurrences in the training part of the run's data (this data, unless `unigrams` says otherwise)."""

    @staticmethod
    def open(directory: str | Path, unigrams: Path | None = None) -> TokenData:
        """Map a data directory; milliseconds, whatever its size.

        `unigrams`: the run's counts file, for a peer that trains on text of its own: the model's output bias is one for all peers, so it
        must not come from that text. Raises Refused: "no-data", "bad-data".
        """
        return TokenData(Path(directory), read_manifest(Path(directory)), unigrams)

    @property
    def vocab(self) -> int:
        """Of the model: every id in a batch is below it."""
        return self.manifest.tokenizer.vocab

    @property
    def doc_start_token(self) -> int:
        return self.manifest.tokenizer.doc_start

    @property
    def fragment_start_token(self) -> int:
        return self.manifest.tokenizer.fragment_start

    @property
    def train_tokens(self) -> int:
        return self.manifest.train.tokens

    @property
    def test_tokens(self) -> int:
        return self.manifest.test.tokens

    @property
    def hash(self) -> str:
        """Names the whole content, 64 hex digits."""
        return self.manifest.hash

    def files(self) -> list[DataFile]:
        """What another peer fetches to have the same data."""
        return self.manifest.files()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data. Raises Refused("wrong-tokenizer") if this installation's differs."""
        return open_recorded_tokenizer(self.manifest.tokenizer, self.directory)

    def batch(self, run_seed: int, peer_id: str, step: int, fragments: int, length: int) -> Batch:
        """The training batch of one peer's step, B = `fragments`, T = `length`; any process draws the same again.

        Raises Refused("small-data") if the training part is shorter than one fragment.
        """
        places = self._places("train", length)
        return self._gather("train", batch_positions(run_seed, peer_id, step, fragments, places), length)

    def evaluation_batches(self, fragments: int, length: int, count: int, split: Split = "test") -> list[Batch]:
        """`count` fixed batches of [fragments, length], spread evenly over the held-out (or training) part.

        They overlap only if that part is shorter than all of them together. Raises Refused("small-data").
        """
        positions = spread_positions(fragments * count, self._places(split, length))
        return [self._gather(split, positions[i * fragments : (i + 1) * fragments], length) for i in range(count)]

    def _places(self, split: Split, length: int) -> int:
        """How many positions a fragment can start at."""
        tokens = self._streams[split].tokens
        if tokens <= length:
            part, fix = ("held-out", "a larger held-out fraction") if split == "test" else ("training", "more text")
            detail = f"The {part} part has {tokens} tokens, too few for a fragment of {length}: use shorter fragments or {fix}."
            raise Refused("small-data", detail)
        return tokens - length

    def _gather(self, split: Split, positions: list[int], length: int) -> Batch:
        stream = self._streams[split]
        ids = np.empty((len(positions), length + 1), np.int64)
        for row, position in zip(ids, positions, strict=True):
            stream.read(position, row)
        text, target = ids[:, :-1].copy(), ids[:, 1:].copy()
        text[:, 0] = self.fragment_start_token
        target[:, 0] = NO_TARGET
        return torch.from_numpy(text), torch.from_numpy(target)


def read_unigrams(path: Path, vocab: int) -> npt.NDArray[np.int64]:
    """int64 [vocab] from a unigrams.counts file. Raises Refused("bad-data") if it is missing, of another size, or has negative counts."""
    try:
        counts = np.fromfile(path, "<i8").astype(np.int64)
    except OSError as error:
        raise Refused("bad-data", f"{path} cannot be read ({error.strerror}): import the text again or fetch the data anew.") from error
    if counts.shape != (vocab,) or counts.min() < 0:
        raise Refused("bad-data", f"{path} is not {vocab} counts: import the text again or fetch the data anew.")
    return counts
