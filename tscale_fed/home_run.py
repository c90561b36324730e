"""What a home directory remembers of its run: the manifest, and the number of its author stream.

Enters: the home. Leaves: both, written once, under a temporary name and renamed. A home holds one run; one home is one author stream, so a
copy of a home must never run beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

from tscale_fed.home import Home
from tscale_net.errors import Refused
from tscale_net.ports import Rng
from tscale_peers.manifest import RunManifest

STREAM_FILE = "stream"
STREAM_BITS = 63


def known_manifest(home: Home) -> RunManifest | None:
    """The run of this home, or None. Raises Refused("home") if its file is damaged."""
    try:
        data = home.manifest.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return RunManifest.decode(data)
    except Refused as refusal:
        raise Refused("home", f"{home.manifest} is damaged ({refusal.detail}): move it away, or use another --home") from None


def remember_manifest(home: Home, manifest: RunManifest) -> None:
    """Keep the run. Raises Refused("other-run") if this home belongs to another one."""
    known = known_manifest(home)
    if known is None:
        write_whole(home.manifest, manifest.encode())
    elif known.run_id != manifest.run_id:
        raise Refused(
            "other-run",
            f"the home {home.path} belongs to run {known.name} ({known.run_id.hex()[:8]}), not to {manifest.name} "
            f"({manifest.run_id.hex()[:8]}): name another with --home DIR",
        )


def stream_number(home: Home, rng: Rng) -> int:
    """The author stream of this home; drawn at first use."""
    path = home.path / STREAM_FILE
    try:
        return int(path.read_text(), 16) & ((1 << STREAM_BITS) - 1)
    except FileNotFoundError:
        number = rng.getrandbits(STREAM_BITS)
        write_whole(path, f"{number:016x}\n".encode())
        return number
    except ValueError:
        raise Refused("home", f"{path} does not hold a number: delete it, and this home starts a new author stream") from None


def write_whole(path: Path, content: bytes) -> None:
    """All or nothing: temporary name, flush, rename. Raises Refused("home") with the reason (disk full, no permission)."""
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Refused("home", f"{path} cannot be written ({error.strerror}): make room, or use another --home") from None
