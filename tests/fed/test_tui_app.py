"""The status screen: what it shows at several sizes, its keys, and a peer that goes away and comes back."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot

from tscale_fed.commands.status import run, status_parser
from tscale_fed.control import ControlServer
from tscale_fed.limits import CONFIRM_S
from tscale_fed.status import PeerRow, Status, decode
from tscale_fed.status_text import peer_cells
from tscale_fed.tui import app as app_module
from tscale_fed.tui import peer_table
from tscale_fed.tui.app import StatusApp
from tscale_fed.tui.peer_table import SORTS, PeerTable, arrange
from tscale_fed.tui.testing import FakePeer
from tscale_net.errors import Refused
from tscale_net.ports import Clock, SystemClock

SIZES = [(80, 24), (120, 40), (200, 60)]
KEYS = ("q quit", "s sort", "/ filter", "p pause", "x leave")


class HandClock(SystemClock):
    """Differences of time are the test's, waiting is real."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds


def server_of(home: Path, fake: FakePeer) -> ControlServer:
    return ControlServer(home, fake.snapshot, {"pause": fake.pause, "resume": fake.resume, "stop": fake.stop}, interval_s=0.3)


@asynccontextmanager
async def screen(
    home: Path, fake: FakePeer, size: tuple[int, int], clock: Clock | None = None
) -> AsyncIterator[tuple[StatusApp, Pilot[None]]]:
    server = server_of(home, fake)
    await server.start()
    try:
        app = StatusApp(home, clock=clock)
        async with app.run_test(size=size, notifications=True) as pilot:
            await shows(app, pilot, "brave-otter")
            yield app, pilot
    finally:
        await server.close()


def frozen(snapshot: Status) -> Callable[[], Status]:
    return lambda: snapshot


def picture(app: StatusApp) -> list[str]:
    return [strip.text for strip in app.screen._compositor.render_strips()]


async def shows(app: StatusApp, pilot: Pilot[None], pattern: str) -> str:
    """Wait until the screen shows `pattern` (the test's time limit ends a vain wait); returns the whole picture."""
    while not re.search(pattern, text := "\n".join(picture(app))):
        await pilot.pause(0.02)
    return text


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "h"
    path.mkdir(mode=0o700)
    return path


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
async def test_everything_is_on_the_screen(home: Path, size: tuple[int, int]) -> None:
    fake = FakePeer(5)
    for _ in range(30):
        fake.snapshot()
    fake.snapshot = frozen(fake.snapshot())  # type: ignore[method-assign]
    async with screen(home, fake, size) as (app, pilot):
        text = await shows(app, pilot, "calm-heron")
        rows = text.split("\n")
        assert len(rows) == size[1] and all(len(row) <= size[0] for row in rows)
        for word in ("made-up-run", "training", "tok/s", "4/5 agree", "B/param", "direct: others reach", "bad-signature 3"):
            await shows(app, pilot, word)
        for word in ("peers: 4 live, 1 suspect", "loss: train and swarm", "━ train", "delta 4 is in", "12.0k", *KEYS):
            await shows(app, pilot, word)
        text = "\n".join(picture(app))
        assert re.search(r"[\u2801-\u28ff]{3}", text), "the curve is drawn"


async def test_figures_move_and_a_resize_is_followed(home: Path) -> None:
    async with screen(home, FakePeer(8), (80, 24)) as (app, pilot):
        first = re.search(r"step (\S+)", "\n".join(picture(app)))
        await shows(app, pilot, rf"step (?!{first.group(1)}\b)\d" if first else "step")
        for size in ((120, 40), (60, 15), (20, 5), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause(0.05)
            assert len(picture(app)) == size[1]
        await shows(app, pilot, "calm-heron")


async def test_sort_and_filter_keys(home: Path) -> None:
    async with screen(home, FakePeer(8), (80, 24)) as (app, pilot):
        seen = set()
        for _ in SORTS:
            await pilot.press("s")
            seen.add(app.query_one(PeerTable).sort_name)
        assert seen == set(SORTS)
        await pilot.press("slash", *"MAGPIE")
        await shows(app, pilot, "only 'MAGPIE'")
        assert app.query_one(PeerTable).row_count == 1
        await pilot.press("enter", "s")
        assert app.query_one(PeerTable).wanted == "MAGPIE"
        await pilot.press("slash", "escape")
        await pilot.pause()
        assert app.query_one(PeerTable).row_count == 8


async def test_pause_zoom_and_leave(home: Path) -> None:
    fake, clock = FakePeer(2), HandClock()
    async with screen(home, fake, (100, 30), clock) as (app, pilot):
        await pilot.press("p")
        await shows(app, pilot, r"\(peer\)  paused")
        await pilot.press("p")
        await shows(app, pilot, r"\(peer\)  training")
        await pilot.press("z")
        await shows(app, pilot, "last half")
        await pilot.press("y")
        await pilot.press("x")
        await shows(app, pilot, "press y to make the peer")
        clock.seconds += CONFIRM_S + 1
        await pilot.press("y")
        await pilot.pause()
        assert not fake.stopped, "without the question, or long after it, y does nothing"
        await pilot.press("x", "y")
        await shows(app, pilot, "leaving")
        assert fake.stopped


async def test_a_peer_that_goes_away_and_comes_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "RECONNECT_INTERVAL_S", 0.02)
    fake = FakePeer(3)
    server = server_of(home, fake)
    await server.start()
    app = StatusApp(home, first=fake.snapshot())
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(app, pilot, "training")
        await server.close()
        text = await shows(app, pilot, "the peer is gone")
        assert "calm-heron" in text, "the last figures stay"
        server = server_of(home, fake)
        await server.start()
        await shows(app, pilot, "training  up")
        await pilot.press("q")
    await server.close()


async def test_closing_the_screen_leaves_the_peer_alone(home: Path) -> None:
    fake = FakePeer(3)
    async with screen(home, fake, (80, 24)) as (app, pilot):
        await pilot.press("q")
        while app.is_running:
            await pilot.pause(0.01)
    assert not fake.stopped and not fake.paused


async def test_table_follows_peers_that_come_and_go_and_draws_only_what_is_visible(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PeerRow(id=f"id{index:03d}", name=f"n{index:03d}", lag=0, state="left" if index % 2 else "live") for index in range(200)]
    async with screen(home, FakePeer(0), (80, 24)) as (app, pilot):
        app.workers.cancel_all()
        table = app.query_one(PeerTable)
        drawn: set[str] = set()
        monkeypatch.setattr(peer_table, "peer_cells", lambda peer: drawn.add(peer.name) or peer_cells(peer))
        table.show(rows)
        await shows(app, pilot, "n004 .*live")
        assert table.row_count == 200 and 4 < len(drawn) < 24
        table.scroll_end(animate=False)
        await shows(app, pilot, "n199 .*left")
        table.show(rows[:3])
        await shows(app, pilot, "n002")
        assert table.row_count == 3 and "n199" not in "\n".join(picture(app))


def test_arrange_sorts_unknown_last_and_filters_any_field() -> None:
    peers = [
        PeerRow(id="b", name="beta", rtt_ms=None, share=0.5, lag=None, path="direct"),
        PeerRow(id="a", name="Alpha", rtt_ms=50.0, share=None, lag=3, state="dead"),
        PeerRow(id="c", name="gamma", rtt_ms=10.0, share=0.1, lag=9, last_delta_s=2.0),
    ]

    def order(sort: str, wanted: str = "") -> str:
        return "".join(peer.id for peer in arrange(peers, sort, wanted))

    assert (order("name"), order("rtt"), order("share"), order("lag"), order("last delta")) == ("abc", "cab", "bca", "cab", "cab")
    assert order("state") == "bca" and order("name", "DEAD") == "a" and order("name", "direct") == "b" and order("name", "zzz") == ""


def test_foreign_markup_is_shown_as_text() -> None:
    class Hostile(FakePeer):
        def _row(self, index: int) -> PeerRow:
            return PeerRow(id=f"id{index}", name="[red]x[/]", path="\x1b[2J", address="[link=y]")

    async def once(home: Path) -> str:
        async with screen(home, Hostile(2), (80, 24)) as (app, pilot):
            return await shows(app, pilot, r"\[red\]x\[/\]")

    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        assert "\x1b" not in asyncio.run(once(Path(directory)))


async def test_without_a_terminal_one_page_or_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = server_of(home, FakePeer(2))
    await server.start()
    try:
        for words in ([], ["--text"]):
            assert await asyncio.to_thread(run, status_parser().parse_args([*words, "--home", str(home)])) == 0
            assert "brave-otter" in capsys.readouterr().out
        assert await asyncio.to_thread(run, status_parser().parse_args(["--json", "--home", str(home)])) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert decode(line.encode()).name == "brave-otter"
    finally:
        await server.close()
    with pytest.raises(Refused, match="no peer runs with the home"):
        run(status_parser().parse_args(["--home", str(home)]))


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed: the screen is not tried on a real terminal")
def test_on_a_real_terminal(home: Path, tmp_path: Path) -> None:
    """Both programs as real processes, the screen inside tmux: drawn at 80x24, follows a resize, and `q` ends it with code 0."""
    environment = {
        "PYTHONPATH": ":".join(path for path in sys.path if path),
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
    }
    tmux = ["tmux", "-u", "-S", str(tmp_path / "tmux")]
    start = shlex.quote("import sys; from tscale_fed.cli import status_main; sys.exit(status_main())")
    program = f"{shlex.quote(sys.executable)} -c {start} --home {shlex.quote(str(home))}"
    ended = tmp_path / "ended"

    def captured() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p"], env=environment, capture_output=True, text=True, check=True).stdout

    def until(pattern: str) -> str:
        while not re.search(pattern, text := captured()):
            pass
        return text

    peer = subprocess.Popen([sys.executable, "-m", "tscale_fed.tui.testing", str(home)], env=environment, stdout=subprocess.PIPE)
    try:
        assert peer.stdout is not None and b"made-up peer at" in peer.stdout.readline()
        command = f"{program}; echo $? > {shlex.quote(str(ended))}; sleep 60"
        subprocess.run([*tmux, "new-session", "-d", "-x", "80", "-y", "24", command], env=environment, check=True)
        until("calm-heron")
        text = until("q quit")
        assert "brave-otter" in text and "q quit" in text and max(map(len, text.split("\n"))) <= 80
        subprocess.run([*tmux, "resize-window", "-x", "130", "-y", "40"], env=environment, check=True)
        assert any(len(line) > 100 for line in until("calm-heron.*│").split("\n"))
        subprocess.run([*tmux, "send-keys", "q"], env=environment, check=True)
        while not ended.exists() or not ended.read_text():
            pass
        assert ended.read_text().strip() == "0" and peer.poll() is None
    finally:
        subprocess.run([*tmux, "kill-server"], env=environment, check=False, capture_output=True)
        peer.kill()
        peer.wait()
