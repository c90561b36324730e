"""The home directory: default place, private, one peer at a time."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tscale_fed.home import Home, HomeLock, default_home, make_private
from tscale_net.errors import Refused


def test_default_places() -> None:
    assert default_home({"TSCALE_HOME": "/x"}, "linux") == Path("/x")
    assert default_home({"XDG_DATA_HOME": "/data"}, "linux") == Path("/data/tscale-fed")
    assert default_home({"XDG_DATA_HOME": "relative"}, "linux") == Path.home() / ".local/share/tscale-fed"
    assert default_home({}, "darwin") == Path.home() / "Library/Application Support/tscale-fed"


def test_a_new_home_is_private(tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    make_private(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    make_private(home)


def test_an_empty_open_directory_is_closed_a_full_one_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o755)
    make_private(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    (home / "file").touch()
    home.chmod(0o750)
    with pytest.raises(Refused, match="chmod 700"):
        make_private(home)


def test_a_file_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Refused, match="is not a directory"):
            make_private(path)


def test_one_peer_per_home_and_freed_by_death(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    child = (
        "import sys, pathlib; from tscale_fed.home import Home, HomeLock; lock = HomeLock(Home(pathlib.Path(sys.argv[1])));"
        "lock.__enter__(); print('held', flush=True); sys.stdin.read()"
    )
    paths = [path for path in sys.path if path]
    with subprocess.Popen(
        [sys.executable, "-c", child, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(paths)}
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(Refused, match=f"process {holder.pid}") as refusal, HomeLock(home):
            pass
        assert refusal.value.code == "home-in-use"
        holder.kill()
    with HomeLock(home) as held:
        assert held is home
