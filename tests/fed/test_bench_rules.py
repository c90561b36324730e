"""The rules bench: its meetings are the swarm's own exchange bit by bit, its engine is the engine, its files add up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tscale_fed.bench.rules_codecs import UNIT, FlatMap, codec_of, rice_bits
from tscale_fed.bench.rules_engine import EngineMachine
from tscale_fed.bench.rules_meeting import Meeting, OwnedMeeting
from tscale_fed.bench.rules_peers import PlainMachine
from tscale_fed.bench.rules_results import closed, crossing, gap, speed_up
from tscale_fed.bench.rules_rows import Row, parse_rows
from tscale_fed.bench.rules_run import Plan, Ran, RowRun, grid_start, meeting_of
from tscale_fed.bench.rules_text import FRAGMENT_START, VOCAB, RulesText
from tscale_fed.cli import main
from tscale_fed.engine.build import build_engine
from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.precision import choose_precision
from tscale_fed.model.shape import ModelShape
from tscale_fed.new_run import tensor_specs
from tscale_fed.optimizer.rule import OptimizerSettings
from tscale_net.errors import Refused
from tscale_net.identity import Identity, verify
from tscale_net.ports import SystemClock
from tscale_peers.assembly import RunTerms
from tscale_peers.codec import codec_named
from tscale_peers.exchange import Exchange, Signer
from tscale_peers.layout import Layout
from tscale_peers.manifest import RuleSpec, RunManifest
from tscale_peers.packet import Packet
from tscale_peers.packet_log import MemoryLog

SHAPE = ModelShape.parse("e128h1d2w16", VOCAB)
FLAT = FlatMap.of(SHAPE)
PEERS = 3


def the_row(text: str) -> Row:
    return parse_rows([text])[0]


def moved(weights: Tensor, meeting: int) -> None:
    """Stands for local training."""
    generator = torch.Generator().manual_seed(meeting)
    weights += torch.randn(weights.shape, generator=generator) * 0.01 * torch.rand(weights.shape[1], generator=generator)


# -- meetings ----------------------------------------------------------------------------------------------------------


def exchanges(row: Row, start: Tensor) -> list[Exchange]:
    """Real peers with one tensor per chunk, so that codecs see whole matrices."""
    part = "one" if row.kind == "avg" else "share"
    manifest = RunManifest(
        name="bench", tensors=tensor_specs(SHAPE), start_hash=bytes(32), created_unix=0.0, trainer={}, codec=row.codec,
        rule=RuleSpec(row.scale, part, part), admin_keys=[bytes(32)],
        chunk_params=1 << 16 if row.codec == "exact" else 1 << 20,
    ).check()  # fmt: skip
    run, found = RunTerms.of(manifest), []
    for peer in range(PEERS):
        identity = Identity.from_seed(bytes([peer + 1]) * 32)
        replica = run.new_replica()
        replica.set_start(start)
        signer = Signer(identity.public_key, identity.sign)
        found.append(Exchange(replica, start.clone(), run.rule(), signer, 1, MemoryLog(), run.terms, SystemClock()))
    return found


def real_meetings(row: Row, start: Tensor, meetings: int) -> tuple[Tensor, Tensor]:
    """(weights [P, n], basepoint int32 [n] of a peer that has everything): packets arrive one meeting after they were made."""
    peers = exchanges(row, start)
    under_way: list[list[Packet]] = [[] for _ in peers]
    for meeting in range(meetings):
        weights = torch.stack([peer.weights for peer in peers])
        moved(weights, meeting)
        for peer, changed in zip(peers, weights, strict=True):
            peer.weights.copy_(changed)
            peer.mark_trained()
            peer.receive([packet for packets in under_way for packet in packets])
        bodies = [peer.publish(5 * (meeting + 1), 1.0 / PEERS).packets for peer in peers]
        under_way = [[Packet.open(body, peers[0].terms, verify) for body in each] for each in bodies]
    weights = torch.stack([peer.weights for peer in peers])
    peers[0].receive([packet for packets in under_way for packet in packets])
    return weights, peers[0].replica.basepoint


@pytest.mark.parametrize("text", ["sum sign", "avg sign", "sum none", "avg none", "avg topk-sign"])
def test_a_meeting_is_the_exchange_of_real_peers_bit_by_bit(text: str) -> None:
    row = the_row(text)
    start = grid_start(SHAPE, 1, torch.device("cpu"))
    weights = start.expand(PEERS, -1).clone()
    meeting = meeting_of(row, weights, start, FLAT)
    for index in range(3):
        moved(weights, index)
        meeting.meet([True] * PEERS, [1.0 / PEERS] * PEERS)
    real = dataclasses.replace(row, codec="exact") if row.codec == "none" else row
    wanted, basepoint = real_meetings(real, start, 3)
    assert torch.equal(weights, wanted)
    meeting.settle()
    assert torch.equal(meeting.basepoint, basepoint)


CONSERVING = (
    "sum sign", "avg topk-64", "avg sign lag=3", "avg sign leak=0.6", "sum sign late=1:2", "owners sum sign/topk-256",
    "owners avg topk-64/sign", "owners avg sign credit=no",
)  # fmt: skip


@pytest.mark.parametrize("text", CONSERVING)
def test_work_is_conserved(text: str) -> None:
    """B + sum of d * c / leak moves by training alone, once everything is delivered and what owners still hold is counted."""
    row = the_row(text)
    start = grid_start(SHAPE, 1, torch.device("cpu"))
    weights = start.expand(PEERS, -1).clone()
    meeting = meeting_of(row, weights, start, FLAT)
    training = torch.zeros_like(start, dtype=torch.float64)
    leak_over_share = 1.0 if row.leak is None else row.leak * PEERS
    for index in range(5):
        before = weights.clone()
        moved(weights, index)
        training += (weights - before).double().sum(0) / leak_over_share
        meeting.meet([True] * PEERS, [1.0 / PEERS] * PEERS)
    meeting.settle()
    if isinstance(meeting, OwnedMeeting):
        meeting.settle()
    d = weights - meeting.model()
    left = d.double().sum(0) / leak_over_share
    owed = meeting.accumulator.double() * UNIT if isinstance(meeting, OwnedMeeting) else torch.zeros_like(left)
    total = meeting.model().double() + left + owed - start
    assert not bool(meeting.ahead.any())
    assert (total - training).abs().max() < 1e-5
    assert meeting.model().sub(start).abs().max() > 1e-3


def test_who_does_not_publish_keeps_all_and_receives() -> None:
    row = the_row("avg none")
    start = grid_start(SHAPE, 1, torch.device("cpu"))
    weights = start.expand(PEERS, -1).clone()
    meeting = Meeting(row, weights, start, codec_of("none", FLAT))
    moved(weights, 0)
    own = (weights[2] - start).clone()
    meeting.meet([True, True, False], [0.5, 0.4, 0.1])
    meeting.settle()
    arrived = meeting.model() - start
    assert (weights[2] - start - arrived - own).abs().max() < 1e-5
    assert arrived.abs().max() > 1e-3


def test_outer_momentum_repeats_a_part_of_the_last_move() -> None:
    start = grid_start(SHAPE, 1, torch.device("cpu"))
    weights = start.expand(PEERS, -1).clone()
    meeting = meeting_of(the_row("diloco"), weights, start, FLAT)
    weights += 0.01
    meeting.meet([True] * PEERS, [1.0 / PEERS] * PEERS)
    first = meeting.model() - start
    assert torch.allclose(first, torch.full_like(first, 0.7 * 1.9 * 0.01), atol=2e-6)
    meeting.meet([True] * PEERS, [1.0 / PEERS] * PEERS)
    second = meeting.model() - start - first
    assert torch.allclose(second, torch.full_like(second, 0.7 * 0.81 * 0.01), atol=2e-6)
    assert (weights - meeting.model()).abs().max() < 1e-6


# -- codecs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "fp16", "sign", "topk-64", "topk-2bit", "topk-2bit-256", "int8", "int4"])
def test_a_codec_loses_less_than_all(name: str) -> None:
    d = torch.randn(2, FLAT.size, generator=torch.Generator().manual_seed(3)) * 0.01
    codec = codec_of(name, FLAT)
    for coefficient in (1.0, 0.125):
        steps = codec.encode(d, coefficient)
        left = d - steps.float() * UNIT / coefficient
        assert left.square().sum() < 0.97 * d.square().sum()
        assert torch.equal(codec.encode(d[1:], coefficient), steps[1:])


def test_two_magnitudes_lose_less_than_one() -> None:
    d = torch.randn(1, FLAT.size, generator=torch.Generator().manual_seed(3)) * 0.01
    lost = [(d - codec_of(name, FLAT).encode(d, 1.0) * UNIT).square().sum() for name in ("topk-64", "topk-2bit-64")]
    assert lost[1] < lost[0]


@pytest.mark.parametrize("name", ["sign", "topk-sign-64", "topk-2bit-256", "int8", "int4"])
def test_a_codec_decodes_to_what_a_packet_of_it_does(name: str) -> None:
    """Two peers, the second with a stretch of zeros; one chunk holds the whole model."""
    d = torch.randn(2, FLAT.size, generator=torch.Generator().manual_seed(4)) * 0.01
    d[1, 33024 + 32896 : 33024 + 32896 + 4096 * 2] = 0.0
    codec, chunk = codec_named(name.removesuffix("-64")), Layout.build(tensor_specs(SHAPE), 1 << 20).chunks[0]
    for peer, decoded in zip(d, codec_of(name, FLAT).encode(d, 0.125), strict=True):
        payload = codec.encode(peer, chunk, 0.125)
        wanted = torch.zeros(FLAT.size, dtype=torch.int32)
        codec.open(payload, chunk).add_to(wanted)
        assert torch.equal(decoded, wanted)
        size = len(payload) / FLAT.size / codec_of(name, FLAT).bytes_per_value
        assert 0.97 < size < 1.03 or (size < 1.03 and "2bit" in name)


def test_sizes_are_those_of_packets() -> None:
    assert rice_bits(64) == pytest.approx(7.53, abs=0.01)
    assert codec_of("topk-64", FLAT).bytes_per_value == pytest.approx(0.0169, abs=2e-4)
    with pytest.raises(Refused, match="topk-0"):
        codec_of("topk-0", FLAT)


# -- machines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> RulesText:
    ids = torch.randint(97, 123, (20_000,), generator=torch.Generator().manual_seed(1)).repeat_interleave(2).to(torch.uint8)
    return RulesText(ids, 36_000, "0" * 64)


def test_the_engine_machine_is_the_engine(text: RulesText) -> None:
    """Two peers in one lane, two steps each, against two engines."""
    precision, _ = choose_precision(torch.device("cpu"), "int8")
    machine = EngineMachine(SHAPE, text, 2, 2, 64, precision, backend="ref")
    start = grid_start(SHAPE, 1, torch.device("cpu"))
    machine.reset(start, 5)
    places = text.positions(1, 2, 2, 2, 64, False)
    for step in range(2):
        machine.step([0, 1], places[:, step], 0.02)
    assert not machine.failed()
    settings = OptimizerSettings()
    for peer in range(2):
        engine = build_engine(
            SHAPE, start, text.bias2(), device="cpu", precision="int8", fragments=2, tokens=64, settings=settings, backend="ref"
        )
        for step in range(2):
            seed = (5 * 1_000_003 + peer) * 1_000_003 + step
            engine.step(StepBatch.make(SHAPE, *text.batch(places[peer, step], 64), step=step, seed=seed), 0.02)
        assert torch.equal(machine.state.weights[peer], engine.weights)


def test_both_machines_agree_on_losses_and_joint_steps(text: RulesText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tscale_fed.bench.rules_engine.EVALUATED_AT_ONCE", 4)
    precision, _ = choose_precision(torch.device("cpu"), "bfloat16")
    start = grid_start(SHAPE, 1, torch.device("cpu"))
    places = text.positions(1, 2, 2, 2, 64, False)
    losses = []
    for machine in (PlainMachine(SHAPE, text, 2, 2, 64), EngineMachine(SHAPE, text, 2, 2, 64, precision, backend="ref")):
        machine.reset(start, 5)
        for step in range(2):
            machine.joint_step(places[:, step], 0.02)
        losses.append([machine.loss(weights, 4) for weights in (start, machine.state.weights[0])])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0][1] < losses[0][0] - 0.1


def test_everybody_reads_the_same_in_every_row(text: RulesText) -> None:
    more = text.positions(1, 3, 6, 2, 64, False)
    assert torch.equal(text.positions(1, 2, 6, 2, 64, False), more[:2])
    own = text.positions(1, 4, 6, 2, 64, True)
    assert all(int(own[k].min()) >= 9000 * k and int(own[k].max()) + 64 < 9000 * (k + 1) for k in range(4))
    batch, target = text.batch(more[0, 0], 64)
    assert (batch[:, 0] == FRAGMENT_START).all() and (target[:, 0] == -1).all()
    assert torch.equal(batch[:, 2:], target[:, 1:-1])


# -- rows and files ----------------------------------------------------------------------------------------------------


def test_a_row_is_known_by_its_words() -> None:
    rows = parse_rows(["avg topk-64 H=5 lr=.02,.04 decay", "owners sum sign/topk-256", "one x=8", "sum s=4 keep=1 speeds=1:4:10"])
    assert [row.name for row in rows] == [
        "avg topk-64 H=5 lr=0.02 decay", "avg topk-64 H=5 lr=0.04 decay", "owners sum sign/topk-256 H=5 lr=0.02", "one lr=0.02 x=8",
        "sum sign H=5 lr=0.02 s=4 keep=1 speeds=1:4:10",
    ]  # fmt: skip
    assert all(parse_rows([row.name]) == [row] for row in rows)


@pytest.mark.parametrize(
    "words", ["", "none", "avg sign lr=x", "avg what=1", "sum sign/sign", "owners one", "avg lr=-1", "sum speeds=0.5", "owners avg lag=2"]
)
def test_words_that_mean_nothing_are_refused(words: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_rows([words])
    assert refused.value.code == "bad-bench"


def test_the_rate_rises_and_falls_with_the_ticks() -> None:
    plan = Plan(SHAPE, 2, 2, 64, 100, 4, 4)
    row = the_row("sync lr=.02 decay")
    rates = [plan.rate(row, tick) for tick in range(100)]
    assert rates[0] == pytest.approx(0.02 / 12) and rates[11] == pytest.approx(0.02) == rates[69]
    assert rates[85] == pytest.approx(0.01) and rates[99] == pytest.approx(0.02 / 30)


def test_slow_peers_step_and_publish_less_often(text: RulesText) -> None:
    plan = Plan(SHAPE, 3, 2, 64, 20, 4, 4)
    machine, start = PlainMachine(SHAPE, text, 3, 2, 64), grid_start(SHAPE, 1, text.ids.device)
    run = RowRun(the_row("sum sign H=2 speeds=1:4:10"), 1, plan, machine, text, start)
    ran = run.run(lambda line: None)
    assert run._done == [20, 5, 2]
    assert ran.received_bytes == pytest.approx((10 + 2 + 1) * codec_of("sign", FLAT).bytes_per_value * FLAT.size * 2 / 3)


def test_meetings_after_the_last_step_leave_less_behind(text: RulesText) -> None:
    plan, machine, start = Plan(SHAPE, 2, 2, 64, 8, 4, 4), PlainMachine(SHAPE, text, 2, 2, 64), grid_start(SHAPE, 1, text.ids.device)
    left, received = [], []
    for words in ("avg topk-256 H=4", "avg topk-256 H=4 drain=3"):
        run = RowRun(the_row(words), 1, plan, machine, text, start)
        received.append(run.run(lambda line: None).received_bytes)
        left.append(float((machine.state.weights - run._model()).square().sum()))
    assert left[1] < 0.7 * left[0]
    assert received[1] == pytest.approx(2.5 * received[0])


def test_a_run_that_diverges_is_a_result(text: RulesText) -> None:
    plan = Plan(SHAPE, 2, 2, 64, 24, 4, 4)
    machine = PlainMachine(SHAPE, text, 2, 2, 64)
    ran = RowRun(the_row("sum none s=2 lr=5e3 H=1"), 1, plan, machine, text, grid_start(SHAPE, 1, text.ids.device)).run(lambda line: None)
    assert ran.failure and not ran.losses


def result(name: str, kind: str, curve: list[tuple[int, float, float]], ticks: int = 100) -> Ran:
    return Ran(name, 1, kind, 0.02, 0.0, ticks, losses={"last": curve[-1][1], "ema": curve[-1][2]}, curve=curve)


def test_what_is_read_off() -> None:
    one = result("one", "one", [(50, 3.0, 3.2), (100, 2.0, 2.1)])
    long = result("one x=8", "one", [(100, 2.0, 2.1), (500, 1.5, 1.6), (800, 1.2, 1.3)], 800)
    sync = result("sync", "sync", [(50, 2.0, 2.0), (100, 1.0, 1.1)])
    swarm = result("avg", "avg", [(50, 2.0, 2.5), (100, 1.6, 1.5)])
    runs = [one, long, sync, swarm]
    assert gap(runs, swarm) == pytest.approx(0.5) and closed(runs, swarm) == pytest.approx(0.5)
    assert speed_up(runs, swarm) == (5.0, True)
    assert speed_up(runs, sync) == (8.0, False)
    assert crossing(swarm, 1.75) == 75.0 and crossing(swarm, 1.0) is None


def test_calls_add_up_to_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--size", "tiny", "--bytes", "2e3", "--peers", "2", "--fragments", "2", "--held-out", "8"]
    words = ["bench", "rules", *sizes, "--out", str(tmp_path / "r.json")]
    assert main([*words, "--rows", "one"]) == 0
    assert main([*words, "--rows", "one", "avg topk-64 H=2"]) == 0
    values = json.loads((tmp_path / "r.json").read_text())
    assert [run["name"] for run in values["runs"]] == ["one lr=0.02", "avg topk-64 H=2 lr=0.02"]
    assert [run["settings"]["call"] for run in values["runs"]] == [0, 1] and len(values["calls"]) == 2
    assert (tmp_path / "r.csv").read_text().count("\n") > 3
    assert "avg topk-64 H=2" in capsys.readouterr().out
    (tmp_path / "r.json").write_text("{}")
    assert main([*words, "--rows", "one"]) != 0
