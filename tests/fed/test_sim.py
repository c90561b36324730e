"""`tscale-peer sim`: flags, reproducible traces, mishaps that stop nobody, output for people and programs, Ctrl+C."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest

from tscale_fed.cli import peer_main
from tscale_fed.commands import sim
from tscale_fed.sim import figure
from tscale_fed.sim.curves import AXES, chart_lines, csv_text
from tscale_fed.sim.objective import objective_of
from tscale_fed.sim.outcome import Outcome, Sample
from tscale_fed.sim.scenario import Partition, Scenario
from tscale_fed.sim.simulate import simulate
from tscale_net.ports import SystemClock


def simulated(tmp_path: Path, **changes: object) -> Outcome:
    scenario = Scenario(**{"peers": 6, "minutes": 4.0, "interval_s": 15.0} | changes)  # type: ignore[arg-type]
    return simulate(scenario, objective_of(scenario, tmp_path, SystemClock()))


# -- what happens to a swarm -----------------------------------------------------------------------------------------------


def test_a_seed_has_one_trace_and_the_swarm_learns(tmp_path: Path) -> None:
    first, again, other = simulated(tmp_path), simulated(tmp_path), simulated(tmp_path, seed=2)
    assert first.trace == again.trace != other.trace
    assert first.samples == again.samples
    assert first.ending is not None and first.ending.hashes == 1 and first.ending.replicas == 6
    assert first.samples[-1].loss < 0.5 * first.samples[0].loss
    assert first.samples[-1].tokens > 0 and first.samples[-1].bytes_per_peer > 0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"kill": 0.3, "rejoin_s": 10.0}, id="kills"),
        pytest.param({"replace_per_hour": 15.0}, id="replaced"),
        pytest.param({"partition": Partition(1.0, 2.5), "minutes": 5.0}, id="partition"),
        pytest.param({"speeds": (1.0, 4.0, 10.0), "lags": (1.0, 1.0, 10.0)}, id="speeds"),
        pytest.param({"stall_s": 5.0, "disk_ms": 200.0, "loss": 0.02, "rate_mbit": 5.0}, id="slow"),
        pytest.param({"dial_only": 0.6, "bad_clock_s": 40.0, "uneven": 0.5}, id="hidden"),
        pytest.param({"kill": 0.2, "spread": "owners"}, id="owners"),
    ],
)
def test_mishaps_stop_nobody(tmp_path: Path, changes: dict[str, object]) -> None:
    outcome = simulated(tmp_path, **changes)
    assert outcome.ending is not None
    assert outcome.ending.hashes == 1 and outcome.ending.replicas == 6, "all replicas are one in the end"
    assert outcome.false_deaths == 0
    stall_s = float(str(outcome.scenario["stall_s"]))
    for row in outcome.speeds:
        assert row.longest_gap_s <= row.step_s + 2 * stall_s + 3.0, f"a peer of speed {row.speed} waited"
        assert row.published > 0
    assert outcome.samples[-1].loss < outcome.samples[0].loss
    assert outcome.kills > 0 or not outcome.scenario["kill"]
    assert outcome.replaced > 2 or not outcome.scenario["replace_per_hour"]
    assert max(sample.states for sample in outcome.samples) > 1


def test_fast_peers_are_not_slowed_by_slow_ones(tmp_path: Path) -> None:
    outcome = simulated(tmp_path, minutes=2.0, speeds=(1.0, 4.0, 10.0), rate_mbit=0.2, lags=(10.0, 1.0, 1.0))
    for row in outcome.speeds:
        assert row.longest_gap_s == pytest.approx(row.step_s, rel=0.02), f"no step of a peer of speed {row.speed} waited for anybody"


# -- flags -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--peers", "0"], "--peers 0: must lie between 1 and 256"),
        (["--peers", "1000"], "--peers 1000"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--kill", "1.5"], "--kill 1.5: must lie between 0 and 1"),
        (["--loss", "-1"], "--loss -1"),
        (["--speeds", "1,0"], "--speeds 0"),
        (["--codec", "zip"], "codec 'zip' is not known here; known:"),
        (["--partition", "5-2"], "--partition 5-2"),
        (["--partition", "1-2", "--peers", "1"], "a single peer cannot be divided"),
        (["--model", "tiny", "--uneven", "1"], "--uneven goes with --model none"),
    ],
)
def test_a_scenario_that_cannot_be_is_one_sentence(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert peer_main(["sim", *flags]) == 1
    out, err = capsys.readouterr()
    assert says in err and err.startswith("tscale-peer sim: ") and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("flags", ["--speeds fast", "--partition early", "--model huge", "--peers many", "--nonsense"])
def test_flags_that_are_none_are_a_wrong_command_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        peer_main(["sim", *flags.split()])
    assert ended.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def test_every_flag_reaches_the_scenario() -> None:
    words = """--peers 7 --minutes 3 --rate-mbit 8 --latency-ms 20 --loss 0.01 --kill 0.25 --rejoin 9 --replace-per-hour 2
        --partition 1-2:0.25 --speeds 1:4:10 --lags 1,2 --dial-only 0.5 --bad-clock 30 --stall 5 --slow-disk 80 --uneven 0.1
        --codec int8 --spread flood --interval 12 --model none --signatures real --seed 9""".split()
    assert sim.scenario_of(sim.sim_parser().parse_args(words)) == Scenario(
        peers=7, minutes=3, rate_mbit=8, latency_ms=20, loss=0.01, kill=0.25, rejoin_s=9, replace_per_hour=2,
        partition=Partition(1, 2, 0.25), speeds=(1, 4, 10), lags=(1, 2), dial_only=0.5, bad_clock_s=30, stall_s=5, disk_ms=80, uneven=0.1,
        codec="int8", spread="flood", interval_s=12, model="none", signatures="real", seed=9,
    )  # fmt: skip


# -- output ----------------------------------------------------------------------------------------------------------------

SMALL = ["sim", "--peers", "3", "--minutes", "1", "--interval", "10"]


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "can_draw", lambda: False)
    assert peer_main([*SMALL, "--signatures", "real", "--plot", str(tmp_path / "curves")]) == 0
    out = capsys.readouterr().out
    for word in ("3 peers, 1 minutes", "received", "loss", "one and the same in all 3 replicas", "trace", "megabytes received per peer"):
        assert word in out
    assert "matplotlib is missing" in out and "[plot]" in out
    rows = list(csv.DictReader((tmp_path / "curves" / "simulation.csv").open()))
    assert len(rows) > 10 and set(rows[0]) == set(Sample.__struct_fields__)
    assert float(rows[-1]["minute"]) == pytest.approx(1.0)


def test_picture_where_there_is_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure.write_figure(samples(), "nats", "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert peer_main([*SMALL, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ending"]["hashes"] == 1 and shown["scenario"]["peers"] == 3 and len(shown["samples"]) > 10


def test_ctrl_c_prints_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    show = sim._Watch.show

    def interrupted(self: sim._Watch, sample: Sample) -> bool:
        if sample.minute > 5:
            os.kill(os.getpid(), signal.SIGINT)
        return show(self, sample)

    monkeypatch.setattr(sim._Watch, "show", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert peer_main(["sim", "--peers", "3", "--minutes", "600", "--interval", "600"]) == 130
    out = capsys.readouterr().out
    assert "(stopped early)" in out and "3 peers, 10." in out and "not looked at" in out
    assert signal.getsignal(signal.SIGINT) is before


def samples() -> list[Sample]:
    return [Sample(n / 2, loss=4.0 / (1 + n), bytes_per_peer=1e6 * n, tokens=1000 * n, living=3, training=3, states=1) for n in range(9)]


def test_chart_of_characters() -> None:
    lines = chart_lines(samples(), AXES[0])
    assert lines[1].startswith("    4.0000 |*") and lines[-1].strip() == "virtual minutes"
    assert all(line.isascii() and len(line) < 80 for line in lines)
    assert csv_text(samples()).splitlines()[1] == "0.0,4.0,0.0,0,3,3,1"
