"""What a home's delta log says the model must be: the second opinion of the process tests.

Enters: the home of a running, paused or dead peer. Leaves: its packets, and the state that start weights plus every packet once give.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tscale_fed.assembly import model_shape, start_weights
from tscale_fed.new_run import recipe_of
from tscale_peers.applied import AppliedSet
from tscale_peers.assembly import RunTerms
from tscale_peers.delta_log import DeltaLog
from tscale_peers.manifest import RunManifest
from tscale_peers.packet import Key, Packet


def manifest_of(home: Path) -> RunManifest:
    return RunManifest.decode((home / "manifest").read_bytes())


def packets_of(home: Path, scratch: Path) -> dict[Key, bytes]:
    """Every packet in the log. Reads a copy: opening a log may cut a torn tail, which is the business of its owner."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(home / "deltas", scratch)
    log = DeltaLog(scratch)
    try:
        return {key: body for key in log.all_keys() if (body := log.get(key)) is not None}
    finally:
        log.close()


def rebuilt(home: Path, scratch: Path) -> tuple[str, str]:
    """(applied digest, basepoint hash) of the start weights plus every packet of the log, each once."""
    manifest = manifest_of(home)
    run = RunTerms.of(manifest)
    recipe, data = recipe_of(manifest)
    replica = run.new_replica()
    replica.set_start(start_weights(recipe, model_shape(recipe, data.data.tokenizer.vocab)))
    assert replica.hash() == manifest.start_hash
    for body in packets_of(home, scratch).values():
        assert replica.apply(Packet.decode(body, run.terms))
    digest, value = replica.state()
    return digest.hex(), value.hex()


def numbers_by_stream(home: Path, scratch: Path) -> dict[bytes, dict[int, list[int]]]:
    """Stream -> chunk -> sorted sequence numbers in the log."""
    numbers: dict[bytes, dict[int, list[int]]] = {}
    for stream, seq, chunk in sorted(packets_of(home, scratch)):
        numbers.setdefault(stream, {}).setdefault(chunk, []).append(seq)
    return numbers


def assert_contiguous(home: Path, scratch: Path) -> None:
    """Every author's numbers run from 1 without gaps, to the same end in every chunk."""
    for stream, chunks in numbers_by_stream(home, scratch).items():
        ends = {numbers[-1] for numbers in chunks.values()}
        assert len(ends) == 1 and len(chunks) == len(manifest_of(home).layout().chunks), f"{stream.hex()[:8]}: {ends}"
        for chunk, numbers in chunks.items():
            assert numbers == list(range(1, len(numbers) + 1)), f"{stream.hex()[:8]} chunk {chunk}"


def applied_digest(encoded: bytes, chunks: int) -> str:
    return AppliedSet.decode(encoded, chunks).digest().hex()
