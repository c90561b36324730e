"""The learning bench: a swarm with 1-bit deltas learns more than one peer; its rows differ only in what they say; its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_run import make_data

from tscale_fed.assembly import prepare_data
from tscale_fed.bench.in_process_swarm import InProcessSwarm
from tscale_fed.bench.learning_rows import (
    AVERAGE,
    EXACT,
    ONE,
    SIGN,
    SYNC,
    Alone,
    JoinedBatches,
    Measured,
    Plan,
    make_learner,
    make_run,
    measure,
    run_config,
)
from tscale_fed.bench.learning_table import gap_closed, goal_met, summarise, table_lines
from tscale_fed.cli import main
from tscale_fed.config import DataSection
from tscale_fed.data.token_data import TokenData
from tscale_fed.device import choose_device
from tscale_net.errors import Refused
from tscale_net.ports import SystemClock

TINY = Plan(dims="e128h1d2w16", fragments=2, length=16, steps=10, warmup_steps=4, eval_fragments=2, eval_batches=2, mean_every_steps=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return make_data(tmp_path_factory.mktemp("learning"))


def learner(data: TokenData, row: str, plan: Plan = TINY, rate: float = 0.02) -> Alone | InProcessSwarm:
    config = run_config(plan, row, rate, seed=1)
    manifest, start = make_run(config, row, data)
    return make_learner(config, manifest, row, data, choose_device("cpu"), start, SystemClock(), plan.peers)


def swarm_of(data: TokenData, row: str = SIGN) -> InProcessSwarm:
    swarm = learner(data, row)
    assert isinstance(swarm, InProcessSwarm)
    return swarm


# -- what it is for ----------------------------------------------------------------------------------------------------

LEARNING = Plan(dims="e128h1d4w64", fragments=4, length=64, steps=100, warmup_steps=20, eval_fragments=32, eval_batches=8, curve_points=1)
LEARNING_RATE = 0.04
MARGIN = 0.08
"""Nats per token. Measured with seeds 1 and 2: one peer 2.063 and 2.043, the swarm 1.909 and 1.910."""


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_four_peers_with_one_bit_deltas_learn_more_than_one_peer(tmp_path: Path) -> None:
    """Equal steps, equal rate, real text. The figures with the rate scanned and three seeds are in docs/learning.md."""
    data = prepare_data(DataSection(), tmp_path)
    one = measure(LEARNING, data.directory, ONE, LEARNING_RATE, seed=1).last_loss
    swarm = measure(LEARNING, data.directory, SIGN, LEARNING_RATE, seed=1).last_loss
    assert one is not None and swarm is not None
    assert swarm < one - MARGIN


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [ONE, SYNC, SIGN, EXACT, AVERAGE])
def test_a_row_is_a_function_of_its_seed(tiny: TokenData, row: str) -> None:
    first, again = (measure(TINY, tiny.directory, row, 0.02, seed=1) for _ in range(2))
    other = measure(TINY, tiny.directory, row, 0.02, seed=2)
    assert first.last_loss == again.last_loss and first.mean_loss == again.mean_loss and first.curve == again.curve
    assert first.last_loss != other.last_loss


def test_all_rows_start_from_the_same_weights(tiny: TokenData) -> None:
    starts = [learner(tiny, row).basepoint() for row in (ONE, SYNC, SIGN, EXACT, AVERAGE)]
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_synchronous_training_reads_the_batches_of_all_peers(tiny: TokenData) -> None:
    ids = ["peer-0", "peer-1", "peer-2"]
    text, target = JoinedBatches(tiny, ids).batch(7, "anybody", 3, 6, 16)
    parts = [tiny.batch(7, peer, 3, 2, 16) for peer in ids]
    assert torch.equal(text, torch.cat([part[0] for part in parts]))
    assert torch.equal(target, torch.cat([part[1] for part in parts]))


def test_the_warm_up_takes_the_same_steps_in_every_row(tiny: TokenData) -> None:
    for row in (ONE, SYNC, SIGN):
        made = learner(tiny, row)
        trainers = [made.trainer] if isinstance(made, Alone) else [member.trainer for member in made.members]
        for _ in range(2 * TINY.publish_every_steps):
            made.step()
        assert [trainer.rate for trainer in trainers] == [0.02] * len(trainers)


def test_uncompressed_packets_of_one_interval_sum_to_the_mean_of_the_peers_work(tiny: TokenData) -> None:
    """One meeting, delivered: B is the start plus the mean displacement, to the grid's rounding of P packets."""
    swarm = swarm_of(tiny, EXACT)
    start = swarm.basepoint()
    trainers = [member.trainer for member in swarm.members]
    for _ in range(TINY.publish_every_steps):
        for member in swarm.members:
            member.step()
    mean = torch.stack([trainer.weights.double() for trainer in trainers]).mean(0) - start.double()
    bodies = [member.publish(1 / len(trainers)) for member in swarm.members]
    for at, member in enumerate(swarm.members):
        member.receive([body for author, packets in enumerate(bodies) if author != at for body in packets])
    moved = swarm.basepoint().double() - start.double()
    assert torch.allclose(moved, mean, rtol=0, atol=1e-6)
    assert mean.abs().max() > 1e-3


def test_packets_arrive_one_interval_later_and_then_all_replicas_are_equal(tiny: TokenData) -> None:
    swarm = swarm_of(tiny)
    streams = []
    for _ in range(2 * TINY.publish_every_steps):
        swarm.step()
        streams.append(len(swarm.members[0].replica.applied.batches))
    # Nothing before the first meeting, then the own packet, at the second meeting those of the others.
    assert streams == [0] * 4 + [1] * 5 + [TINY.peers]
    assert len({member.replica.hash() for member in swarm.members}) == TINY.peers
    swarm.settle()
    assert len({member.replica.hash() for member in swarm.members}) == 1
    assert swarm.exchanges == 2 and swarm.received_bytes == 3 * swarm.sent_bytes > 0


def test_settling_notices_replicas_that_differ(tiny: TokenData) -> None:
    swarm = swarm_of(tiny)
    for _ in range(TINY.publish_every_steps):
        swarm.step()
    swarm.members[0].replica.set_start(torch.zeros(swarm.members[0].replica.layout.size))
    with pytest.raises(AssertionError, match="different"):
        swarm.settle()


def test_a_run_that_diverges_is_a_result(tiny: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(self: Alone) -> None:
        raise Refused("loss-not-finite", "the training loss became nan")

    monkeypatch.setattr(Alone, "step", diverge)
    run = measure(TINY, tiny.directory, ONE, 0.02, seed=1)
    assert run.last_loss is None and run.mean_loss is None and run.failure == "the training loss became nan"


def test_other_refusals_are_errors(tiny: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Alone) -> None:
        raise Refused("out-of-memory", "the GPU is full")

    monkeypatch.setattr(Alone, "step", fail)
    with pytest.raises(Refused, match="GPU is full"):
        measure(TINY, tiny.directory, ONE, 0.02, seed=1)


# -- table -------------------------------------------------------------------------------------------------------------


def run_of(row: str, rate: float, seed: int, loss: float | None) -> Measured:
    return Measured(row=row, rate=rate, seed=seed, last_loss=loss, mean_loss=loss, parameters=100)


def runs_with(swarm: dict[int, float]) -> list[Measured]:
    """One peer 2.0 and 2.2, synchronous 1.0 and 1.0; the swarm as given. Rates 0.01 and 0.03 are worse everywhere."""
    runs = []
    for seed in swarm:
        for row, loss in ((ONE, {1: 2.0, 2: 2.2}[seed]), (SYNC, 1.0), (SIGN, swarm[seed])):
            runs += [run_of(row, 0.02, seed, loss), run_of(row, 0.01, seed, loss + 0.5), run_of(row, 0.03, seed, loss + 0.7)]
    return runs


def test_share_of_the_gap_is_taken_per_seed() -> None:
    summaries = summarise(runs_with({1: 1.25, 2: 1.9}), "last")
    closed = gap_closed(summaries, SIGN)
    assert closed is not None
    assert (closed.least, closed.greatest) == (pytest.approx(0.25), pytest.approx(0.75))
    assert closed.mean == pytest.approx(0.5)
    one, sync = gap_closed(summaries, ONE), gap_closed(summaries, SYNC)
    assert one is not None and sync is not None and (one.mean, sync.mean) == (0.0, 1.0)


@pytest.mark.parametrize(("loss", "met"), [(1.39, True), (1.42, False)])
def test_the_goal_is_three_fifths_of_the_gap(loss: float, met: bool) -> None:
    assert goal_met([run for run in runs_with({1: loss}) if run.seed == 1]) is met


def test_each_row_takes_its_own_best_rate_and_a_diverged_seed_rules_a_rate_out() -> None:
    runs = [run_of(ONE, 0.01, 1, 2.0), run_of(ONE, 0.01, 2, 2.0), run_of(ONE, 0.02, 1, 1.0), run_of(ONE, 0.02, 2, None)]
    runs += [run_of(SYNC, 0.02, 1, 1.0), run_of(SYNC, 0.02, 2, 1.2), run_of(EXACT, 0.02, 1, None)]
    summaries = summarise(runs, "last")
    assert summaries[ONE].rate == 0.01 and summaries[SYNC].rate == 0.02 and EXACT not in summaries
    assert summaries[SYNC].loss.mean == pytest.approx(1.1)
    lines = table_lines(TINY, runs)
    assert any("uncompressed" in line and "diverged at every rate" in line for line in lines)
    assert lines[-1].startswith("no verdict")


def test_a_best_rate_at_the_edge_of_the_scan_is_marked() -> None:
    inside = summarise(runs_with({1: 1.5}), "last")[SIGN]
    edge = summarise([run for run in runs_with({1: 1.5}) if run.rate != 0.01], "last")[SIGN]
    assert not inside.at_edge and edge.at_edge


def test_no_share_without_a_gap_or_with_other_seeds() -> None:
    level = [run_of(row, 0.02, 1, 1.0) for row in (ONE, SYNC, SIGN)]
    assert gap_closed(summarise(level, "last"), SIGN) is None
    runs = runs_with({1: 1.5, 2: 1.5})
    assert gap_closed(summarise([run for run in runs if run.row != SIGN or run.seed == 1], "last"), SIGN) is None


# -- command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[list[str]]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the peer and the swarm number {i}\n" for i in range(400)))
    yield [
        *("bench", "learning", "--text", str(text), "--dims", "e128h1d2w16", "--steps", "5", "--fragments", "2", "--length", "16"),
        *("--seeds", "1", "--rates", "0.02", "--workers", "1", "--out", str(tmp_path / "out" / "result.json")),
    ]


def test_the_command_prints_a_table_and_writes_figures_machine_and_command(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(quick)
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert code == (0 if result["goal"]["met"] else 1)
    assert "swarm: sum rule, 1 bit" in out and "100% done" in out
    assert {run["row"] for run in result["runs"]} == {"one", "sync", "sign"}
    assert all(run["last_loss"] > 0 and run["parameters"] > 0 for run in result["runs"])
    assert result["machine"]["versions"]["torch"] == torch.__version__ and result["plan"]["steps"] == 5
    assert set(result["summary"]) == {"last", "mean"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--peers", "1"], "--peers 1: a swarm needs at least 2 peers"),
        (["--steps", "3"], "--steps 3: must be at least --publish-every-steps (5)"),
        (["--dims", "e100h1d2"], "e100 is not a multiple of 128"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    quick: list[str], change: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quick, *change]) == 1
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [["--rates", "0"], ["--rates", "fast"], ["--seeds", "0"], ["--rows", "best"]])
def test_a_wrong_option_is_a_wrong_command_line(quick: list[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*quick, *words])
    assert stopped.value.code == 2
