"""Checkpoints: what survives a restart, bit for bit.

Enters: tensors, byte strings and plain facts (numbers, names), from `tscale train` or from a running peer. Leaves: one folder
`checkpoint-<own steps>` holding tensors.safetensors, one NAME.bin per byte string, and state.json with the facts and a BLAKE3 hash of
every file and of itself.

The rule: a checkpoint is written under a temporary name, flushed to disk, then renamed, so a folder with the final name is complete; the
newest `keep` stay. Reading verifies every hash and falls back to the previous checkpoint, saying so. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from tscale_net.errors import Refused

FORMAT_VERSION = 1
TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
STEP_DIGITS = 10
"""Zero-padded, so that names sort in the order of the steps."""
_FINISHED = re.compile(rf"checkpoint-(\d{{{STEP_DIGITS}}})(?:\.(\d+))?")
_UNFINISHED_PREFIX = ".unfinished-"
_BLOB_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Disk, quota, or the limit of a file's size."""
SPARE_BYTES = 1 << 20
"""Room asked for beyond the tensors and byte strings: headers, facts, file system blocks."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as read back. The tensors are copies in ordinary CPU memory."""

    path: Path
    tensors: dict[str, torch.Tensor]
    blobs: dict[str, bytes]
    facts: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one home directory. Not for several processes at once: the owner of the home holds its lock."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`folder` is made at the first save; the newest `keep` (at least 1) checkpoints stay."""
        if keep < 1:
            raise ValueError("keep must be at least 1")
        self.folder = folder
        self.keep = keep

    def save(
        self,
        own_steps: int,
        tensors: Mapping[str, torch.Tensor],
        blobs: Mapping[str, bytes],
        facts: Mapping[str, Any],
    ) -> Path:
        """Write one checkpoint and return its folder; older ones beyond `keep` are deleted afterwards.

        Facts must be JSON values (no NaN); floats come back with the same bits. Blob names are lower-case words. Tensors may be on any
        device and must not share memory with each other.
        Raises Refused("disk-full") or Refused("cannot-write"); the older checkpoints are then untouched and nothing new is left behind.
        """
        if any(not _BLOB_NAME.fullmatch(name) for name in blobs):
            raise ValueError(f"blob names must be lower-case words: {sorted(blobs)}")
        temporary = self.folder / f"{_UNFINISHED_PREFIX}{own_steps}-{os.getpid()}"
        try:
            self._make_room(tensors, blobs)
            temporary.mkdir()
            self._write(temporary, tensors, blobs, {"own_steps": own_steps, **facts})
            final = self._free_name(own_steps)
            temporary.rename(final)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise self._refusal(error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # renamed by now, unless something failed
        self._delete_old()
        return final

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest undamaged checkpoint (None if there is none), and one sentence for every damaged one that was passed over."""
        notes: list[str] = []
        for path in reversed(self.paths()):
            try:
                return self.load(path), notes
            except Refused as refused:
                notes.append(f"{refused.detail}; using the one before it")
        if notes:
            notes[-1] = notes[-1].replace("using the one before it", "no earlier one is left, starting anew")
        return None, notes

    def load(self, path: Path) -> Checkpoint:
        """Read one checkpoint, checking every hash.

        Raises Refused("damaged-checkpoint") naming the file that is missing or changed.
        """
        state = _read_state(path)
        for name, (size, digest) in state["files"].items():
            if _size(path / name) != size or _hash_file(path / name) != digest:
                raise Refused("damaged-checkpoint", f"checkpoint {path.name}: {name} is missing or damaged (size or hash differs)")
        try:
            tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path / TENSORS_FILE).items()}
        except (SafetensorError, OSError) as error:
            raise Refused("damaged-checkpoint", f"checkpoint {path.name}: {TENSORS_FILE} cannot be read: {error}") from None
        blobs = {name.removesuffix(".bin"): (path / name).read_bytes() for name in state["files"] if name.endswith(".bin")}
        return Checkpoint(path, tensors, blobs, state["facts"])

    def paths(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        ordered = [(order, path) for path in self.folder.iterdir() if (order := _order(path.name))]
        return [path for _, path in sorted(ordered)]

    def _make_room(self, tensors: Mapping[str, torch.Tensor], blobs: Mapping[str, bytes]) -> None:
        """Make the folder, remove what an interrupted save left, and refuse before writing if the disk clearly cannot take it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_UNFINISHED_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        needed = sum(t.numel() * t.element_size() for t in tensors.values()) + sum(map(len, blobs.values())) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")

    def _write(self, folder: Path, tensors: Mapping[str, torch.Tensor], blobs: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(ready, folder / TENSORS_FILE)
        for name, content in blobs.items():
            (folder / f"{name}.bin").write_bytes(content)
        names = [TENSORS_FILE, *(f"{name}.bin" for name in blobs)]
        for name in names:
            _flush(folder / name)
        files = {name: [_size(folder / name), _hash_file(folder / name)] for name in names}
        body = {"version": FORMAT_VERSION, "files": files, "facts": dict(facts)}
        state = json.dumps({"body": body, "hash": _hash_body(body)}, indent=1, allow_nan=False)
        (folder / STATE_FILE).write_text(state + "\n", encoding="utf-8")
        _flush(folder / STATE_FILE)
        _flush(folder)

    def _free_name(self, own_steps: int) -> Path:
        """A second checkpoint of one step (the swarm moved while this peer stood still) gets .1, .2, ... and counts as newer."""
        stem = f"checkpoint-{own_steps:0{STEP_DIGITS}d}"
        taken = [order[1] for path in self.paths() if (order := _order(path.name)) and order[0] == own_steps]
        return self.folder / (f"{stem}.{max(taken) + 1}" if taken else stem)

    def _delete_old(self) -> None:
        for path in self.paths()[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)

    def _refusal(self, error: Exception) -> Refused:
        kept = self.paths()
        held = f"the one before it ({kept[-1].name}) is kept" if kept else "there is none before it"
        number = error.errno if isinstance(error, OSError) else None
        full = number in _FULL or any(f"os error {code})" in str(error) for code in _FULL)
        if full:
            what = f"checkpoint not written, the disk of {self.folder} is full ({_reason(error)}): free some space"
            return Refused("disk-full", f"{what}; {held}")
        return Refused("cannot-write", f"checkpoint not written in {self.folder}: {_reason(error)}; check its permissions; {held}")


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of one checkpoint, without its tensors. Raises Refused("damaged-checkpoint")."""
    facts: dict[str, Any] = _read_state(path)["facts"]
    return facts


def read_tensor(path: Path, name: str, values: int) -> torch.Tensor:
    """One float tensor [values] of a checkpoint as float32, in memory of its own. The file's size is checked, its hash is not: it takes as
    long as reading all of it.

    Raises Refused("damaged-checkpoint"), before memory is taken, if it is not there or of another size.
    """
    state, file = _read_state(path), path / TENSORS_FILE
    if _size(file) != state["files"][TENSORS_FILE][0]:
        raise Refused("damaged-checkpoint", f"checkpoint {path.name}: {TENSORS_FILE} is missing or cut off (its size differs)")
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            if name not in tensors.keys() or tensors.get_slice(name).get_shape() != [values]:
                raise Refused("damaged-checkpoint", f"checkpoint {path.name}: it has no {values} {name}; it belongs to another model")
            found: torch.Tensor = tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise Refused("damaged-checkpoint", f"checkpoint {path.name}: {TENSORS_FILE} cannot be read: {error}") from None
    return found.float()


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _order(name: str) -> tuple[int, int] | None:
    found = _FINISHED.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def _read_state(path: Path) -> dict[str, Any]:
    """The body of state.json, whose own hash and form are checked.

    Raises Refused("damaged-checkpoint").
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        body, digest = state["body"], state["hash"]
        version, files, facts = body["version"], body["files"], body["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Refused("damaged-checkpoint", f"checkpoint {path.name}: {STATE_FILE} is missing or damaged") from None
    if version != FORMAT_VERSION:
        raise Refused("damaged-checkpoint", f"checkpoint {path.name}: its format is version {version}, this program reads {FORMAT_VERSION}")
    if _hash_body(body) != digest or not isinstance(files, dict) or not isinstance(facts, dict) or TENSORS_FILE not in files:
        raise Refused("damaged-checkpoint", f"checkpoint {path.name}: {STATE_FILE} is damaged (its hash differs)")
    return body


def _hash_body(body: Mapping[str, Any]) -> str:
    return blake3.blake3(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    return blake3.blake3().update_mmap(path).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _flush(path: Path) -> None:
    """Force a file's content, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
