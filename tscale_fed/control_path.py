"""Where the control socket of a home lies, and whose process is at its other end.

Enters: a home directory. Leaves: the path of a unix socket, private to the user. A unix socket path has room for about 100 bytes;
for longer homes the socket lies in `$XDG_RUNTIME_DIR` (or the temporary directory) and the home keeps a small file that says where.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tscale_fed.limits import CONTROL_PATH_BYTES
from tscale_net.errors import Refused

SOCKET_NAME = "control.sock"
POINTER_NAME = "control.path"
_POINTER_BYTES = 4096


def choose_path(home: Path, environment: Mapping[str, str]) -> Path:
    """The socket path a new server of `home` uses; its directory is made, 0700 and checked to be ours.

    Raises Refused("control-directory") if the short directory belongs to somebody else or is open to others.
    """
    direct = home.resolve() / SOCKET_NAME
    pointer = home / POINTER_NAME
    if len(os.fsencode(direct)) <= CONTROL_PATH_BYTES:
        pointer.unlink(missing_ok=True)
        return direct
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    directory = Path(runtime) / "tscale-fed" if os.path.isabs(runtime) else Path(tempfile.gettempdir()) / f"tscale-fed-{os.getuid()}"
    _private_directory(directory)
    short = directory / f"{hashlib.sha256(os.fsencode(direct)).hexdigest()[:16]}.sock"
    temporary = pointer.with_suffix(".new")
    temporary.write_text(str(short))
    temporary.replace(pointer)
    return short


def _private_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise Refused("control-directory", f"{directory} is not a directory of yours alone: remove it, or use a --home with a shorter path")


def find_path(home: Path) -> Path:
    """The socket path of the peer that runs (or ran) with `home`. Raises Refused("no-peer") if there is none, or it is not ours."""
    path = home.resolve() / SOCKET_NAME
    pointer = home / POINTER_NAME
    try:
        with pointer.open("rb") as file:
            path = Path(os.fsdecode(file.read(_POINTER_BYTES)))
    except FileNotFoundError:
        pass
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_peer(home) from error
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        raise Refused("not-ours", f"{path} is not a control socket of this user: run tscale-status as the user that runs the peer")
    return path


def no_peer(home: Path) -> Refused:
    """The sentence for a home without a running peer."""
    return Refused("no-peer", f"no peer runs with the home {home}: start one with tscale-peer, or name its home with --home DIR")


def peer_uid(connection: socket.socket) -> int | None:
    """User id of the process at the other end, from the kernel; None where the system has no such call (file modes protect us there)."""
    if hasattr(socket, "SO_PEERCRED"):
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[1])
    if sys.platform == "darwin":
        sol_local, local_peercred, xucred = 0, 1, "IIh16I"
        credentials = connection.getsockopt(sol_local, local_peercred, struct.calcsize(xucred))
        return int(struct.unpack(xucred, credentials)[1])
    return None
