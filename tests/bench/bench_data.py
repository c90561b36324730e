"""How fast text is imported and batches are drawn, each beside a baseline measured in the same run.

Run: python tests/bench/bench_data.py [--mb 32]. Prints a table; asserts nothing. Import baselines: reading the file and writing the ids
without anything else (bytes), `encode_batch_fast` of the tokenizers library on the same pieces (gpt2). Batch baseline: copying the same
stretches out of an array in memory.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "net")]

from tscale_fed.data.importer import import_text  # noqa: E402
from tscale_fed.data.sampling import batch_positions  # noqa: E402
from tscale_fed.data.sources import DEMO, SourceFile, find_sources, piece_bytes_for, read_pieces  # noqa: E402
from tscale_fed.data.token_data import TokenData  # noqa: E402
from tscale_fed.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

MB = 1e6
FRAGMENTS, LENGTH = 16, 128
DRAWS = 2000
REPEATS = 3


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def best_seconds(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Fastest of REPEATS; other programs can only slow a run down."""
    times = []
    for _ in range(REPEATS):
        before()
        times.append(seconds(action))
    return min(times)


def write_source(path: Path, size_bytes: int) -> SourceFile:
    """The demo text over and over."""
    text = b"".join(file.path.read_bytes() for file in find_sources([DEMO]))
    path.write_bytes((text * (size_bytes // len(text) + 1))[:size_bytes])
    return SourceFile(path, path.name, size_bytes)


def copy_as_ids(source: Path, target: Path) -> None:
    """The least that a byte import could do."""
    with target.open("wb") as stream:
        np.fromfile(source, np.uint8).astype("<u2").tofile(stream)


def bench_import(folder: Path, source: SourceFile) -> None:
    pieces = [piece.text for piece in read_pieces(source, piece_bytes_for(source.size), lambda _block: None)]
    for name in ("bytes", "gpt2"):
        tokenizer = load_tokenizer(name)
        if name == "bytes":
            what, baseline = "read, widen, write", lambda: copy_as_ids(source.path, folder / "plain.bin")
        else:
            what, baseline = "tokenizers encode_batch", lambda tokenizer=tokenizer: encode_all(tokenizer, pieces)
        importing = partial(import_text, [source.path], tokenizer, folder / name)
        import_s = best_seconds(importing, before=partial(shutil.rmtree, folder / name, ignore_errors=True))
        base_s, again_s = best_seconds(baseline), best_seconds(importing)
        rates = [source.size / MB / value for value in (import_s, base_s, again_s)]
        print(f"import {name:6} {rates[0]:8.1f} MB/s   baseline ({what}) {rates[1]:8.1f} MB/s   check and reuse {rates[2]:8.1f} MB/s")


def encode_all(tokenizer: Tokenizer, pieces: list[bytes]) -> None:
    """In the batches that an import makes."""
    from tscale_fed.data import limits

    per_batch = max(1, limits.ENCODE_BATCH_BYTES * len(pieces) // sum(map(len, pieces)))
    for start in range(0, len(pieces), per_batch):
        tokenizer.encode_batch(pieces[start : start + per_batch])


def bench_batches(data: TokenData, name: str) -> None:
    ids = np.concatenate([np.fromfile(path, "<u2") for path in sorted(data.directory.glob("train-*.tokens"))])
    places = data.train_tokens - LENGTH

    def baseline(step: int) -> None:
        positions = np.random.default_rng(step).integers(0, places, FRAGMENTS)
        np.stack([ids[position : position + LENGTH + 1] for position in positions]).astype(np.int64)

    def per_call_us(draw: Callable[[int], object]) -> float:
        return statistics.median(seconds(lambda step=step: draw(step)) for step in range(DRAWS)) * 1e6

    ours = per_call_us(lambda step: data.batch(1, "peer", step, FRAGMENTS, LENGTH))
    positions = per_call_us(lambda step: batch_positions(1, "peer", step, FRAGMENTS, places))
    plain = per_call_us(baseline)
    ours_text = f"{ours:6.0f} us (drawing positions {positions:.0f})"
    print(f"batch {FRAGMENTS}x{LENGTH} {name:6} {ours_text}   baseline (default_rng, array in memory) {plain:.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mb", type=int, default=32, help="size of the text (default: %(default)s)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_source(folder / "source.txt", int(parser.parse_args().mb * MB))
        bench_import(folder, source)
        for tokenizer in ("bytes", "gpt2"):
            data = TokenData.open(folder / tokenizer)
            bench_batches(data, tokenizer)
            print(f"open {tokenizer:7} {seconds(lambda tokenizer=tokenizer: TokenData.open(folder / tokenizer)) * 1e3:6.1f} ms")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB:.0f} MB")


if __name__ == "__main__":
    main()
