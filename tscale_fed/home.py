"""The home directory of a peer: where it lies, what is in it, and the lock that keeps it to one process.

Enters: `--home` or the environment. Leaves: a `Home` with the path of everything in it, its directory made (0700) and locked.
One home is one author: two processes on the same home would sign different packets under the same number, so the second is refused.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tscale_net.errors import Refused

HOME_VARIABLE = "TSCALE_HOME"


@dataclass(frozen=True, slots=True)
class Home:
    """Paths inside one home directory."""

    path: Path

    @property
    def identity(self) -> Path:
        return self.path / "identity"

    @property
    def known_peers(self) -> Path:
        return self.path / "known_peers"

    @property
    def neighbours(self) -> Path:
        return self.path / "neighbours"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def contributions(self) -> Path:
        """Own contributions to owners of chunks."""
        return self.path / "contributions"

    @property
    def delta_log(self) -> Path:
        return self.path / "deltas"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"


def default_home(environment: Mapping[str, str], platform: str = sys.platform) -> Path:
    """`$TSCALE_HOME`, else `tscale-fed` under the user's data directory (XDG on Linux, Application Support on macOS)."""
    if environment.get(HOME_VARIABLE):
        return Path(environment[HOME_VARIABLE])
    if platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "tscale-fed"
    data_home = environment.get("XDG_DATA_HOME", "")
    return (Path(data_home) if os.path.isabs(data_home) else Path.home() / ".local" / "share") / "tscale-fed"


def make_private(directory: Path) -> None:
    """Make `directory` (and its parents) if missing, and see that it is ours alone.

    Raises Refused("home", sentence) if it is no directory, belongs to somebody else, or others may enter it and it is not empty.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
        if found.st_uid != os.getuid():
            raise Refused("home", f"the home {directory} belongs to another user: name your own with --home DIR")
        if stat.S_IMODE(found.st_mode) & 0o077:
            if any(directory.iterdir()):
                fix = f"run `chmod 700 {directory}` or name another with --home DIR"
                raise Refused("home", f"other users may enter the home {directory}: {fix}")
            directory.chmod(0o700)
    except (FileExistsError, NotADirectoryError) as error:
        raise Refused("home", f"the home {directory} is not a directory: name another with --home DIR") from error
    except OSError as error:
        raise Refused("home", f"the home {directory} cannot be made ({error.strerror}): name another with --home DIR") from error


class HomeLock:
    """Holds the home while a peer runs; a context manager. The system frees it when the process dies, however it dies."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._descriptor: int | None = None

    def __enter__(self) -> Home:
        """Make the home if missing and take it. Raises Refused("home-in-use") if another process has it."""
        make_private(self._home.path)
        descriptor = os.open(self._home.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            place = f"another peer (process {owner}) runs with the home {self._home.path}"
            raise Refused("home-in-use", f"{place}: look at it with tscale-status, or name another with --home DIR") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        return self._home

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
