"""`tscale-peer doctor`: each check shows each of its verdicts; the remote checks meet a real hello door on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tscale_fed.cli import peer_main
from tscale_fed.commands import doctor as command
from tscale_fed.doctor import limits, machine, network, remote, report
from tscale_fed.doctor.report import Line
from tscale_net.hello import HelloDoor
from tscale_net.identity import Identity
from tscale_net.ports import SystemClock
from tscale_net.sockets import listening_pair

HOME = Path("/somewhere")
FAST = 1e9


class WrongClock(SystemClock):
    def __init__(self, ahead_s: float) -> None:
        self.ahead_s = ahead_s

    def wall(self) -> float:
        return super().wall() + self.ahead_s


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        (machine.version_line("3.11", "2.13", None), "ok"),
        (machine.version_line("3.11", None, None), "fail"),
        (machine.device_line("card, 80 GiB", None), "ok"),
        (machine.device_line(None, None), "warn"),
        (machine.device_line(None, "a driver without torch"), "warn"),
        (machine.memory_line(limits.MEMORY_WARN_BYTES), "ok"),
        (machine.memory_line(limits.MEMORY_WARN_BYTES - 1), "warn"),
        (machine.memory_line(limits.MEMORY_FAIL_BYTES - 1), "fail"),
        (machine.disk_line(HOME, limits.DISK_WARN_BYTES, FAST), "ok"),
        (machine.disk_line(HOME, limits.DISK_WARN_BYTES - 1, FAST), "warn"),
        (machine.disk_line(HOME, limits.DISK_WARN_BYTES, limits.DISK_SLOW_BYTES_PER_S - 1), "warn"),
        (machine.disk_line(HOME, limits.DISK_FAIL_BYTES - 1, FAST), "fail"),
        (machine.disk_line(HOME, limits.DISK_WARN_BYTES, None), "fail"),
        (network.port_line(7700, []), "ok"),
        (network.port_line(7700, [7701]), "warn"),
        (network.ipv6_line(True), "ok"),
        (network.ipv6_line(False), "warn"),
        (network.mtu_line({"eth0": 1500}), "ok"),
        (network.mtu_line({"eth0": 1500, "tun0": 600}), "warn"),
        (network.mtu_line({}), "warn"),
        (network.congestion_line(["reno", "bbr"]), "ok"),
        (network.congestion_line(["reno", "cubic"]), "warn"),
        (network.congestion_line(None), "warn"),
        (network.libzmq_line((4, 3, 5), True), "ok"),
        (network.libzmq_line((4, 3, 4), True), "fail"),
        (network.libzmq_line((4, 3, 5), False), "fail"),
        (remote.clock_line(0.4), "ok"),
        (remote.clock_line(-30.0), "warn"),
        (remote.clock_line(91.0), "fail"),
        (remote.nat_line("192.0.2.7", ["192.0.2.7"]), "ok"),
        (remote.nat_line("198.51.100.1", ["192.168.1.2"]), "warn"),
        (remote.bootstrap_line("h:1", remote.Answer("n", "id", 0.1, 0.0, "h:2")), "ok"),
        (remote.bootstrap_line("h:1", remote.Answer("n", "id", 2.0, 0.0, "h:2")), "warn"),
    ],
)
def test_each_verdict_and_a_fix_with_all_but_ok(line: Line, verdict: str) -> None:
    assert line.verdict == verdict
    assert bool(line.fix) == (verdict != "ok")


def test_only_a_failure_fails_the_whole() -> None:
    good, soso, bad = (Line("a", verdict, "found", "fix") for verdict in ("ok", "warn", "fail"))
    assert report.exit_code([good, soso]) == 0
    assert report.exit_code([good, bad]) == 1
    assert json.loads(report.json_of([bad]))["ok"] is False
    assert "-> fix" in report.text_of([bad])


def test_a_taken_port_is_seen_and_a_free_one_is_free() -> None:
    links, door = listening_pair("0.0.0.0", 0)
    port = links.getsockname()[1]
    assert not network.measure_port(port)
    links.close()
    door.close()
    assert network.measure_port(port)


def test_a_place_that_cannot_be_written_has_no_speed(tmp_path: Path) -> None:
    assert machine.measure_disk(tmp_path / "missing") is None


async def _ask(ahead_s: float, pinned: str = "") -> dict[str, Line]:
    """The remote lines against a door whose clock is ahead of ours."""
    links, visitors = listening_pair("127.0.0.1", 0)
    port = links.getsockname()[1]
    identity = Identity.from_seed(bytes(range(32)))
    door = HelloDoor(identity, WrongClock(ahead_s), "other", port, lambda: b"", lambda code, detail: None)
    await door.start(visitors)
    try:
        lines = await remote.remote_lines(f"{pinned}127.0.0.1:{port}", SystemClock())
    finally:
        door.close()
        links.close()
    return {line.check: line for line in lines}


async def test_a_real_door_answers_all_remote_checks() -> None:
    lines = await _ask(0.0)
    assert {check: line.verdict for check, line in lines.items()} == {"bootstrap": "ok", "clock": "ok", "nat": "ok"}


async def test_a_wrong_clock_fails_and_says_which_way() -> None:
    lines = await _ask(1000.0)
    assert lines["clock"].verdict == "fail"
    assert "1000.0 s behind" in lines["clock"].found


async def test_another_identity_than_the_pinned_one_fails() -> None:
    lines = await _ask(0.0, pinned=f"{Identity.from_seed(bytes(32)).peer_id}@")
    assert lines["bootstrap"].verdict == "fail"


async def test_a_bootstrap_that_is_away_is_one_failed_line() -> None:
    links, visitors = listening_pair("127.0.0.1", 0)
    port = links.getsockname()[1]
    links.close()
    visitors.close()
    (line,) = await remote.remote_lines(f"127.0.0.1:{port}", SystemClock())
    assert line.verdict == "fail"
    assert line.fix
    assert str(port) in line.found


def test_command_prints_json_and_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = peer_main(["doctor", "--home", str(tmp_path / "new"), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert code == (0 if answer["ok"] else 1)
    assert [each["check"] for each in answer["checks"]][:4] == ["versions", "gpu", "memory", "disk"]
    assert not (tmp_path / "new").exists()


def test_an_address_that_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peer_main(["doctor", "--home", str(tmp_path), "--bootstrap", "nonsense"]) == 1
    captured = capsys.readouterr()
    assert "has no port" in captured.err
    assert captured.out == ""


def test_help_names_the_flags() -> None:
    assert "--bootstrap" in command.doctor_parser().format_help()
