"""The demo's course of events, with stand-ins for the three peers: each is a process that serves made-up snapshots on a control socket."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tscale_fed import demo as demo_module
from tscale_fed import demo_process
from tscale_fed.cli import main
from tscale_fed.demo import demo
from tscale_fed.demo_process import DemoProcess
from tscale_fed.demo_report import States, figures_line, summary, untrained_loss
from tscale_fed.status import LossPoint, RecentState, Status, Wire
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock

STAND_IN = """
import asyncio, pathlib, signal, sys
from tscale_fed.control import ControlServer
from tscale_fed.home import make_private
from tscale_fed.tui.testing import FakePeer
home = pathlib.Path(sys.argv[sys.argv.index("--home") + 1])
print(*sys.argv[1:], flush=True)
if home.name in {dying!r}:
    print("something went wrong", flush=True)
    sys.exit(3)
async def serve():
    make_private(home)
    fake, ended = FakePeer(2), asyncio.Event()
    def snapshot():
        status = fake.snapshot()
        status.addresses = ["/ip4/127.0.0.1/tcp/7/p2p/" + home.name]
        if fake.paused:
            status.applied_digest, status.basepoint_hash = "d" * 64, {hash_of}
            status.recent = []
        else:
            status.applied_digest += home.name
            status.recent = []
        return status
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    server = ControlServer(home, snapshot, {{"pause": fake.pause}})
    await server.start()
    await ended.wait()
    await server.close()
asyncio.run(serve())
"""
SAME, OWN = "'a' * 64", "home.name"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    monkeypatch.setattr(demo_module, "DEMO_POLL_S", 0.02)
    monkeypatch.setattr(demo_process, "DEMO_POLL_S", 0.02)
    monkeypatch.setattr(demo_module, "DEMO_LINE_S", 0.1)
    path = tmp_path / "d"
    path.mkdir(mode=0o700)
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, *, dying: tuple[str, ...] = (), hash_of: str = SAME) -> None:
    monkeypatch.setattr(demo_process, "PROGRAM", STAND_IN.format(dying=dying, hash_of=hash_of))


HAS_PROC = Path("/proc/self/cmdline").exists()
"""Elsewhere than on Linux nothing is found; the tests then see less, and still pass."""


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes that still use the demo's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in text:
            found.append(text)
    return found


async def test_the_whole_course(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch)
    assert await demo(Path("run.toml"), 0.5, folder) == 0
    told = capsys.readouterr().out
    for words in (
        "the seed starts the run",
        "joined through the seed",
        "through the first peer",
        "held-out loss",
        "all 3 hold the same model",
    ):
        assert words in told
    assert re.search(r"held-out loss of the basepoint: \d\.\d+ -> \d\.\d+", told)
    assert "--role seed --config run.toml" in (folder / "seed.log").read_text()
    assert "--bootstrap /ip4/127.0.0.1/tcp/7/p2p/seed " in (folder / "peer-a.log").read_text()
    assert "--bootstrap /ip4/127.0.0.1/tcp/7/p2p/peer-a " in (folder / "peer-b.log").read_text()
    assert left_behind(folder) == []


async def test_different_bits_fail(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, hash_of=OWN)
    assert await demo(Path("run.toml"), 0.1, folder) == 1
    assert "FAILED" in capsys.readouterr().out


async def test_a_process_that_dies_is_reported_with_its_last_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, dying=("peer-a",))
    with pytest.raises(Refused, match=r"the peer-a ended with code 3; its last lines:[\s\S]*something went wrong"):
        await demo(Path("run.toml"), 5.0, folder)
    assert left_behind(folder) == []


async def test_ctrl_c_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch)
    running = asyncio.create_task(demo(Path("run.toml"), 3600.0, folder))
    told = ""
    while "deltas" not in told:
        await asyncio.sleep(0.02)
        told += capsys.readouterr().out
    assert len(left_behind(folder)) == 3 or not HAS_PROC
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "Ctrl+C again kills them" in capsys.readouterr().out and left_behind(folder) == []


async def test_a_process_that_does_not_leave_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_process, "DEMO_LEAVE_S", 0.1)
    monkeypatch.setattr(demo_process, "DEMO_START_S", 0.5)
    monkeypatch.setattr(
        demo_process,
        "PROGRAM",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)",
    )
    process = DemoProcess("seed", folder, SystemClock())
    with pytest.raises(Refused, match="does not train after"):
        await process.start()
    assert await process.leave() == -signal.SIGKILL and left_behind(folder) == []


def test_a_missing_run_file_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--config", "nowhere.toml"]) == 1
    assert (
        capsys.readouterr().err
        == "tscale: nowhere.toml does not exist: run the demo from a checkout, or name a run file with --config FILE\n"
    )


def status(name: str, digest: str, value: str, loss: float | None) -> Status:
    return Status(
        version="0", run="r", peer=name, name=name, role="peer", phase="training", uptime_s=1.0, applied_digest=digest,
        basepoint_hash=value, swarm_loss=loss, wire=Wire(up_bytes=1000, bytes_per_param=0.137, deltas_sent=2, deltas_applied=4),
        losses=[LossPoint(0, None, None), LossPoint(1, 5.0, 5.5)], recent=[RecentState("old", "h")],
    )  # fmt: skip


def test_states_find_common_and_differing_ones() -> None:
    states = States()
    states.add("a", status("a", "d1", "h1", None))
    assert (states.shared, states.differing) == (0, [])
    states.add("b", status("b", "d2", "h2", None))
    assert (states.shared, states.differing) == (1, []), "the one in `recent`"
    states.add("b", status("b", "d1", "other", None))
    assert states.differing == ["d1"]


def test_figures_before_anything_is_known_and_after() -> None:
    states = States()
    assert "held-out loss -" in figures_line({"a": status("a", "", "", None)}, states)
    both = {"seed": status("x", "d", "h", 2.0), "peer-a": status("y", "d", "h", 1.5)}
    assert "held-out loss 1.500   steps 0 + 0   deltas 4 sent, 8 applied" in figures_line(both, states)
    lines = summary(untrained_loss(both["seed"]), both, states)
    assert (
        lines[0].endswith("5.500 -> 1.500 nats per token")
        and lines[-1].startswith("all 2 hold the same model")
        and "0.137 bytes" in lines[3]
    )
    both["peer-a"].applied_digest = "e"
    assert summary(None, both, states)[-1].startswith("the last deltas had not reached everybody")
