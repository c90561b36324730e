"""Import: text on this machine -> a data directory (manifest.py says what lies in it).

Enters: sources, a tokenizer. Leaves: the directory, complete or not at all: everything is written to a temporary directory beside it,
flushed to the disk, and renamed at the end. The same sources and tokenizer give the same bytes on every machine, so the same hashes; an
import that is there already is checked and reused.

A document-start token stands wherever the text does not continue the token before it: at the start of each document, and where a piece
went into the other split.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from tscale_fed.data import limits
from tscale_fed.data.assemble import hash_of, staging_directory, verify_directory, write_durably
from tscale_fed.data.held_out import HeldOut
from tscale_fed.data.huggingface import HuggingFaceTokenizer
from tscale_fed.data.manifest import (
    IMPORT_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    UNIGRAMS_FILE,
    VERSION,
    DataManifest,
    TokenizerRecord,
    encode_manifest,
)
from tscale_fed.data.shards import HashedFile, ShardWriter
from tscale_fed.data.sources import Piece, SourceFile, find_sources, piece_bytes_for, read_pieces
from tscale_fed.data.tokenizer import Tokenizer
from tscale_fed.data.word_tokenizer import WordTokenizer
from tscale_net.errors import Refused
from tscale_net.ports import Clock, SystemClock

Progress = Callable[[int, int, float], None]
"""Called with bytes read, bytes in all, bytes per second so far."""


class ImportedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One source as it was."""

    name: str
    bytes: int
    hash: str


class ImportRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides the result of an import; equal records give equal directories. Kept in import.json, for this machine only."""

    version: int
    tokenizer: TokenizerRecord
    held_out: float
    shard_bytes: int
    sources: list[ImportedFile]


def import_text(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    out_dir: Path,
    held_out_fraction: float = 0.05,
    progress: Progress | None = None,
    *,
    shard_bytes: int = limits.SHARD_BYTES,
    clock: Clock | None = None,
) -> DataManifest:
    """Make `out_dir` from `sources` (files, folders, or "builtin:demo"); returns its manifest.

    An earlier import in `out_dir` is reused if it is the same and intact, else replaced; anything else there is left alone.

    Raises Refused: those of `find_sources` and `read_pieces`; "bad-held-out", "small-source", "not-utf8", "data-exists" (`out_dir` holds
    something that no import made), "disk-full", "unwritable".
    """
    if not 0 <= held_out_fraction <= limits.MAX_HELD_OUT:
        raise Refused("bad-held-out", f"The held-out fraction is {held_out_fraction}; it must lie between 0 and {limits.MAX_HELD_OUT}.")
    files = find_sources(sources)
    earlier = _earlier_import(out_dir)
    if earlier is not None and _is_same(earlier, files, tokenizer, held_out_fraction, shard_bytes):
        with contextlib.suppress(Refused):  # damaged: made again below
            return verify_directory(out_dir)
    with _disk_errors(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with staging_directory(out_dir) as staging:
            job = _Import(files, tokenizer, staging, held_out_fraction, progress, shard_bytes, clock or SystemClock())
            manifest = job.run()
            _move_into_place(staging, out_dir)
            return manifest


class _Import:
    """One import, from opened sources to a finished staging directory."""

    def __init__(
        self,
        files: list[SourceFile],
        tokenizer: Tokenizer,
        staging: Path,
        held_out: float,
        progress: Progress | None,
        shard_bytes: int,
        clock: Clock,
    ) -> None:
        self._files = files
        self._tokenizer = tokenizer
        self._staging = staging
        self._fraction = held_out
        self._held_out = HeldOut(held_out)
        self._shard_bytes = shard_bytes
        self._meter = _Meter(sum(file.size for file in files), progress, clock)
        token_bytes = tokenizer.record.token_bytes
        # In the order False, True of "held out".
        self._writers = (
            ShardWriter(staging, "train", token_bytes, shard_bytes),
            ShardWriter(staging, "test", token_bytes, shard_bytes),
        )
        self._last_held: bool | None = None
        self._counts = np.zeros(tokenizer.vocab, np.int64)

    def run(self) -> DataManifest:
        try:
            imported = [self._import_file(file) for file in self._files]
            return self._finish(imported)
        finally:
            for writer in self._writers:
                writer.abandon()

    def _import_file(self, file: SourceFile) -> ImportedFile:
        hasher = blake3()

        def seen(block: bytes) -> None:
            hasher.update(block)
            self._meter.add(len(block))

        piece_bytes = piece_bytes_for(self._meter.total_bytes)
        damage = _Damage(file) if self._tokenizer.record.kind != "bytes" else None
        for batch in _batches(read_pieces(file, piece_bytes, seen)):
            if damage is not None:
                damage.inspect(batch)
            self._encode(batch)
        return ImportedFile(file.name, file.size, hasher.hexdigest())

    def _encode(self, batch: list[Piece]) -> None:
        trained = []
        for piece, ids in zip(batch, self._tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            held = self._held_out.decide(len(piece.text))
            writer = self._writers[held]
            if piece.starts_document or held != self._last_held:
                writer.start_document(self._tokenizer.doc_start)
                if not held:
                    self._counts[self._tokenizer.doc_start] += 1
            self._last_held = held
            writer.write(ids, len(piece.text))
            if not held:
                trained.append(ids)
        if trained:
            self._counts += np.bincount(np.concatenate(trained), minlength=self._counts.size)

    def _finish(self, imported: list[ImportedFile]) -> DataManifest:
        train, test = (writer.close() for writer in self._writers)
        if train.tokens == 0 or (test.tokens == 0 and self._fraction > 0):
            size = f"The sources hold {self._meter.done_bytes} bytes"
            raise Refused("small-source", f"{size}: too little to hold a part out; give more text or a held-out fraction of 0.")
        unigrams = HashedFile(self._staging / UNIGRAMS_FILE)
        unigrams.write(self._counts.astype("<i8").tobytes())
        tokenizer = self._tokenizer
        manifest = DataManifest(VERSION, tokenizer.record, train, test, unigrams.close())
        if isinstance(tokenizer, HuggingFaceTokenizer | WordTokenizer) and tokenizer.source is not None:
            write_durably(self._staging / TOKENIZER_FILE, tokenizer.source)
        record = ImportRecord(VERSION, tokenizer.record, self._fraction, self._shard_bytes, imported)
        write_durably(self._staging / IMPORT_FILE, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
        write_durably(self._staging / MANIFEST_FILE, encode_manifest(manifest))
        self._meter.finish()
        return manifest


class _Meter:
    """Counts bytes read and reports them now and then."""

    def __init__(self, total_bytes: int, progress: Progress | None, clock: Clock) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._progress = progress
        self._clock = clock
        self._started = clock.now()
        self._reported = self._started

    def add(self, size: int) -> None:
        self.done_bytes += size
        if self._clock.now() - self._reported >= limits.PROGRESS_INTERVAL_S:
            self.finish()

    def finish(self) -> None:
        """Report now."""
        self._reported = self._clock.now()
        elapsed_s = self._reported - self._started
        if self._progress is not None:
            self._progress(self.done_bytes, self.total_bytes, self.done_bytes / elapsed_s if elapsed_s > 0 else 0.0)


class _Damage:
    """Bytes of one file that are not UTF-8: a few are replaced by U+FFFD, many mean that the file is something else."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._replaced = 0

    def inspect(self, batch: list[Piece]) -> None:
        for piece in batch:
            try:
                piece.text.decode()
            except UnicodeDecodeError:
                self._replaced += piece.text.decode("utf-8", "replace").count("\ufffd") - piece.text.count("\ufffd".encode())
        if self._replaced > limits.MAX_REPLACED_FRACTION * max(self._file.size, limits.MIN_PIECE_BYTES):
            fix = "convert it (iconv -t UTF-8), or import it with --tokenizer bytes"
            raise Refused("not-utf8", f"{self._file.path} is not text in UTF-8: {fix}.")


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= limits.ENCODE_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _earlier_import(out_dir: Path) -> ImportRecord | None:
    """The record of the import in `out_dir`; None if there is nothing. Raises Refused("data-exists") if it is anything else."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    try:
        return msgspec.json.decode((out_dir / IMPORT_FILE).read_bytes(), type=ImportRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        detail = f"{out_dir} exists and was not made by an import: choose another directory or remove it yourself."
        raise Refused("data-exists", detail) from None


def _is_same(earlier: ImportRecord, files: list[SourceFile], tokenizer: Tokenizer, held_out: float, shard_bytes: int) -> bool:
    """Whether importing would give what is there; reads the sources only if their names and sizes match."""
    settings = (VERSION, tokenizer.record, held_out, shard_bytes)
    if (earlier.version, earlier.tokenizer, earlier.held_out, earlier.shard_bytes) != settings:
        return False
    if [(source.name, source.bytes) for source in earlier.sources] != [(file.name, file.size) for file in files]:
        return False
    return all(hash_of(file.path) == source.hash for file, source in zip(files, earlier.sources, strict=True))


def _move_into_place(staging: Path, out_dir: Path) -> None:
    """Rename; an earlier import steps aside first, and readers that have it mapped keep it."""
    if out_dir.exists():
        # Into the directory that is about to be deleted anyway.
        out_dir.rename(staging.parent / "replaced")
    staging.rename(out_dir)


@contextlib.contextmanager
def _disk_errors(out_dir: Path) -> Iterator[None]:
    """Turn what the disk says into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "free some space or choose another folder; nothing was left behind."
            raise Refused("disk-full", f"The disk of {out_dir.parent} is full ({error.strerror}): {fix}") from error
        raise Refused("unwritable", f"{out_dir} cannot be written ({error.strerror}): choose another folder.") from error
