"""known_peers: which peer id was met first at which host:port, as ssh keeps known_hosts.

Enters: host:port and the id that answered. Leaves: nothing, or Refused("changed-id") if another id was pinned there.
The file has one line per address, `host:port peer-id unix-time`; people may edit it. It is replaced atomically.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tscale_net.address import split_host_port
from tscale_net.errors import Refused
from tscale_net.identity import public_key_of
from tscale_net.ports import PeerId

_FILE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FirstContact:
    """An id was trusted because it was the first to answer at an address; people should be told."""

    host_port: str
    peer_id: PeerId
    file: Path | None
    """Where it was written down; None if the book lives in memory."""

    def __str__(self) -> str:
        place = f" (written to {self.file})" if self.file else ""
        return f"First contact with {self.host_port}: it is {self.peer_id}; from now on another id there is refused{place}."


class AddressBook:
    """Pinned ids by host:port. With `path` None nothing is kept on disk."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._pinned: dict[str, tuple[PeerId, int]] = {}
        if path is not None:
            self._pinned = _read(path)

    def pinned(self, host_port: str) -> PeerId | None:
        """The id first met at `host_port`, if any."""
        entry = self._pinned.get(host_port.lower())
        return entry[0] if entry else None

    def check(self, host_port: str, peer_id: PeerId) -> None:
        """Raise Refused("changed-id") if another id is pinned at `host_port`."""
        known = self.pinned(host_port)
        if known is None or known == peer_id:
            return
        where = f"the line of {host_port} from {self.path}" if self.path else "the pinned id"
        raise Refused(
            "changed-id",
            f"{host_port} answers as {peer_id}, but at first contact it was {known}. Somebody may be in between, or its identity was "
            f"replaced: ask its owner, and if it was, remove {where}.",
        )

    def pin(self, host_port: str, peer_id: PeerId, unix_time: float) -> FirstContact | None:
        """Remember the id at first contact and say so; None if it was known. Raises Refused("changed-id", "known-peers-file")."""
        self.check(host_port, peer_id)
        if self.pinned(host_port) is not None:
            return None
        self._pinned[host_port.lower()] = (peer_id, int(unix_time))
        if self.path is not None:
            _write(self.path, self._pinned)
        return FirstContact(host_port, peer_id, self.path)


def _read(path: Path) -> dict[str, tuple[PeerId, int]]:
    try:
        with path.open("rb") as file:
            raw = file.read(_FILE_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Refused("known-peers-file", f"{path} cannot be read ({(error.strerror or str(error)).lower()}).") from error
    if len(raw) > _FILE_BYTES:
        raise Refused("known-peers-file", f"{path} is larger than {_FILE_BYTES} bytes. Delete old lines from it.")
    pinned: dict[str, tuple[PeerId, int]] = {}
    for number, line in enumerate(raw.decode("utf-8", errors="replace").splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            host_port, peer_id, seconds = words
            split_host_port(host_port)
            public_key_of(peer_id)
            pinned[host_port.lower()] = (peer_id, int(seconds))
        except (ValueError, Refused) as error:
            raise Refused(
                "known-peers-file", f"{path}, line {number} is not `host:port peer-id unix-time`. Fix or delete that line."
            ) from error
    return pinned


def _write(path: Path, pinned: dict[str, tuple[PeerId, int]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = "".join(f"{host_port} {peer_id} {seconds}\n" for host_port, (peer_id, seconds) in pinned.items())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Refused("known-peers-file", f"{path} cannot be written ({(error.strerror or str(error)).lower()}).") from error
