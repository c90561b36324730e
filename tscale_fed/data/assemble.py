"""Data that came from other peers: check every byte, then put a data directory together.

Enters: a manifest (already strictly decoded) and files fetched by hash. Leaves: a directory like an imported one. What is checked, since
a stranger may have made it: each file's size and blake3; that no token id is outside the vocabulary (it would crash a GPU kernel); that
starts ascend and stay inside; that unigram counts are counts of this many tokens.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tscale_fed.data import limits
from tscale_fed.data.manifest import (
    MANIFEST_FILE,
    UNIGRAMS_FILE,
    DataFile,
    DataManifest,
    Split,
    encode_manifest,
    read_manifest,
    shard_name,
    starts_name,
)
from tscale_fed.data.shards import token_type
from tscale_net.errors import Refused

EMPTY_HASH = blake3(b"").hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a small new file; it is on the disk when this returns."""
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def staging_directory(out_dir: Path) -> Iterator[Path]:
    """A new directory on the disk of `out_dir`, to be filled and renamed; what is left of it at the end is deleted."""
    parent = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".making", dir=out_dir.parent))
    try:
        staging = parent / "data"
        staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def hash_of(path: Path) -> str:
    """blake3 of a file, 64 hex digits, on as many cores as there are."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def file_matches(path: Path, file: DataFile) -> bool:
    """Whether `path` has the size and blake3 of `file`."""
    return path.is_file() and path.stat().st_size == file.size and hash_of(path) == file.hash


def missing_files(directory: Path, files: list[DataFile]) -> list[DataFile]:
    """Those of `files` that `directory` does not hold intact under their names; for going on with a broken-off fetch."""
    return [file for file in files if not file_matches(directory / file.name, file)]


def verify_directory(directory: Path) -> DataManifest:
    """Read every byte of a data directory and check it against its manifest; returns the manifest.

    Raises Refused: "no-data", "bad-data" (with the file).
    """
    manifest = read_manifest(directory)
    for file in manifest.files():
        if not file_matches(directory / file.name, file):
            raise Refused("bad-data", f"{directory / file.name} is missing or damaged: import the text again or fetch the data anew.")
    _check_content(directory, manifest)
    return manifest


def assemble(out_dir: Path, manifest: DataManifest, fetched: Mapping[str, Path]) -> DataManifest:
    """Make `out_dir` from fetched files: `fetched` maps each name of `manifest.files()` (empty files may be left out) to where it
    lies. The files are moved, unless a check refuses them.

    If `out_dir` already holds this very manifest it is checked and kept. Raises Refused: "bad-data" (a file is missing, damaged or lies),
    "data-exists" (`out_dir` holds something else).
    """
    if out_dir.exists() and any(out_dir.iterdir()):
        if (out_dir / MANIFEST_FILE).is_file() and read_manifest(out_dir) == manifest:
            return verify_directory(out_dir)
        raise Refused("data-exists", f"{out_dir} holds other data: choose another directory or remove it yourself.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # All are checked before any is moved: a refusal must not cost a long fetch.
    for file in manifest.files():
        source = fetched.get(file.name)
        intact = file_matches(source, file) if file.size and source else file.size == 0 and file.hash == EMPTY_HASH
        if not intact:
            detail = f"{file.name} is missing or does not have the content that the run promises: fetch it from another peer."
            raise Refused("bad-data", detail)
    with staging_directory(out_dir) as staging:
        for file in manifest.files():
            if file.size:
                shutil.move(fetched[file.name], staging / file.name)
            else:
                write_durably(staging / file.name, b"")
        _check_content(staging, manifest)
        write_durably(staging / MANIFEST_FILE, encode_manifest(manifest))
        if out_dir.exists():
            out_dir.rmdir()
        staging.rename(out_dir)
    return manifest


def _check_content(directory: Path, manifest: DataManifest) -> None:
    """What hashes cannot say. All files exist with the right sizes."""
    train_counts = _count_tokens(directory, manifest, "train")
    _count_tokens(directory, manifest, "test")
    stated = np.fromfile(directory / UNIGRAMS_FILE, "<i8")
    if not np.array_equal(stated, train_counts):
        raise Refused("bad-data", f"{directory / UNIGRAMS_FILE} does not count the training tokens: fetch the data from another peer.")


def _count_tokens(directory: Path, manifest: DataManifest, split: Split) -> npt.NDArray[np.int64]:
    """Occurrences of each id in one split, int64 [vocab]; checks ids and document starts on the way."""
    vocab = manifest.tokenizer.vocab
    counts = np.zeros(vocab, np.int64)
    part = manifest.split(split)
    starts = _Starts(directory / starts_name(split), part.tokens)
    begin = 0
    for index in range(len(part.shards)):
        path = directory / shard_name(split, index)
        shard = np.memmap(path, token_type(manifest.tokenizer.token_bytes), "r")
        for offset in range(0, shard.size, limits.VERIFY_BLOCK_TOKENS):
            ids = shard[offset : offset + limits.VERIFY_BLOCK_TOKENS]
            if int(ids.max()) >= vocab:
                raise Refused("bad-data", f"{path} has token ids outside the vocabulary of {vocab}: fetch it from another peer.")
            counts += np.bincount(ids, minlength=vocab)
            if not bool((ids[starts.within(begin, begin + ids.size)] == manifest.tokenizer.doc_start).all()):
                raise Refused("bad-data", f"{starts.path} names positions that start no document: fetch it from another peer.")
            begin += ids.size
    return counts


class _Starts:
    """The document starts of one split, mapped."""

    def __init__(self, path: Path, tokens: int) -> None:
        """Raises Refused("bad-data") unless the positions ascend and lie in 0 <= position < tokens."""
        self.path = path
        # An empty file cannot be mapped.
        self._positions = np.memmap(path, "<u8", "r") if path.stat().st_size else np.zeros(0, "<u8")
        size = self._positions.size
        for offset in range(0, size, limits.VERIFY_BLOCK_TOKENS):
            block = self._positions[offset : offset + limits.VERIFY_BLOCK_TOKENS + 1]
            if not bool((block[1:] > block[:-1]).all()):
                raise Refused("bad-data", f"{path} does not ascend: fetch it from another peer.")
        if size and int(self._positions[-1]) >= tokens:
            raise Refused("bad-data", f"{path} points behind the last token: fetch it from another peer.")

    def within(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Positions in begin <= position < end, relative to `begin`."""
        first, last = np.searchsorted(self._positions, np.array([begin, end], np.uint64))
        return self._positions[first:last].astype(np.int64) - begin
