"""On a CUDA device: the same replica, displacement and weights, bit for bit, as on the CPU, whatever happens in whatever order.

Own packets are compared for codecs whose encoders give the same bytes everywhere; the one-bit codec's steps depend on the order of a sum,
so there the packets of others, applied on both, are.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.peers.core_kit import opened, terms
from tests.peers.exchange_kit import History, bits, exchange_on, train
from tscale_peers import limits
from tscale_peers.average import RunningAverage
from tscale_peers.exchange import Exchange, OuterRule
from tscale_peers.layout import Layout, TensorSpec

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

SUM, AVERAGE, GRID = OuterRule(), OuterRule(own_leak="one", momentum_keep="one"), OuterRule(grid_displacement=True)
rules = pytest.mark.parametrize("rule", [SUM, AVERAGE, GRID], ids=["sum", "average", "grid"])
LARGE = Layout.build((TensorSpec("wide", 96, 1280, -22), TensorSpec("small", 3, 40, -18), TensorSpec("tall", 4096, 64, -20)), 1 << 15)


def assert_equal(one: Exchange, two: Exchange) -> None:
    assert one.replica.state() == two.replica.state()
    assert torch.equal(one.replica.basepoint.cpu(), two.replica.basepoint.cpu())
    assert torch.equal(bits(one.displacement()), bits(two.displacement()))
    assert torch.equal(bits(one.weights), bits(two.weights))


CASES = {
    "exact-kept-sum": ("exact", True, SUM),
    "exact-implied-sum": ("exact", False, SUM),
    "exact-implied-average": ("exact", False, AVERAGE),
    "exact-kept-grid": ("exact", True, GRID),
    "int8-implied-sum": ("int8", False, SUM),
    "topk-implied-sum": ("topk-sign", False, SUM),
    "topk-kept-average": ("topk-sign", True, AVERAGE),
    "lowrank-implied-sum": ("lowrank", False, SUM),
    "sign-kept-sum": ("sign", True, SUM),
    "sign-implied-sum": ("sign", False, SUM),
}


@pytest.mark.parametrize(("codec", "keep", "rule"), CASES.values(), ids=CASES.keys())
def test_any_history_gives_the_bits_of_the_cpu(codec: str, keep: bool, rule: OuterRule) -> None:
    t = terms(codec, layout=LARGE)
    history = History(t, seed=3, events=12)
    if codec in ("sign", "lowrank"):  # encoders that add in an order of their own
        history.events = [event for event in history.events if event[0] != "publish"]
    on_cpu, on_cuda = (exchange_on(1, t, rule=rule, keep=keep, device=device) for device in ("cpu", "cuda"))
    states: list[tuple[bytes, bytes]] = []
    bodies = history.play(on_cpu, lambda event: states.append(on_cpu.replica.state()))
    checked: list[bool] = []
    assert history.play(on_cuda, lambda event: checked.append(on_cuda.replica.state() == states[event])) == bodies
    assert all(checked)
    assert_equal(on_cpu, on_cuda)


@rules
def test_weights_on_the_device_and_the_rest_on_the_host(rule: OuterRule) -> None:
    t = terms("exact", layout=LARGE)
    history = History(t, seed=4, events=12)
    on_cpu, split = exchange_on(1, t, rule=rule), exchange_on(1, t, rule=rule)
    split = Exchange(split.replica, torch.empty(LARGE.size, device="cuda"), rule, split.signer, split.stream, split.log, t, split._clock)
    assert history.play(on_cpu) == history.play(split)
    assert_equal(on_cpu, split)


@pytest.mark.parametrize("codec", ["exact", "topk-sign"])
def test_publications_made_beside_steps_are_those_made_at_once(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training stream is kept busy, so that whatever waits for the wrong stream would read old or new values."""
    monkeypatch.setattr(limits, "draft_slice_values", 1)
    monkeypatch.setattr(limits, "draft_slices", 3)
    t = terms(codec, layout=LARGE)
    heavy = torch.randn(4096, 4096, device="cuda")
    with ThreadPoolExecutor(1) as helper:
        beside, at_once = exchange_on(1, t, device="cuda", keep=False, helper=helper), exchange_on(1, t, keep=False)
        for number in range(4):
            train(beside, number)
            train(at_once, number)
            drafting = beside.begin_publication(number, 0.5)
            while (published := drafting.advance()) is None:
                for _ in range(4):
                    heavy = torch.tanh(heavy @ heavy)  # a step that leaves the weights alone
            assert published == at_once.publish(number, 0.5)
            beside.wait()
            assert_equal(beside, at_once)


def test_the_state_is_read_beside_steps_and_packets() -> None:
    t = terms("sign", layout=LARGE)
    exchange, other = exchange_on(1, t, device="cuda", keep=False), exchange_on(2, t)
    with ThreadPoolExecutor(1) as helper:
        for number in range(6):
            train(other, number)
            packets = [exchange.prepared(packet) for packet in opened(other.publish(number, 0.5).packets, t)]
            want = exchange.replica.state()
            reading = exchange.replica.begin_reading()
            future = helper.submit(exchange.replica.read_state, reading)
            exchange.receive(packets)
            assert future.result() == want
        assert exchange.replica.state() == other.replica.state()


def test_the_running_average_has_the_bits_of_the_cpu() -> None:
    t = terms("exact", layout=LARGE)
    history = History(t, seed=6, events=12)
    history.events = [event for event in history.events if event[0] != "load"]
    begin = 1_700_000_000 // 40 * 40.0  # all packets are dated here
    hashes = []
    for device in ("cpu", "cuda"):
        exchange = exchange_on(1, t, device=device, keep=False)
        average = RunningAverage(exchange.replica, 40.0, 4, lambda key: None)
        exchange.replica.watcher = average
        average.take_due_cuts(begin - 100)
        history.play(exchange, lambda event, average=average: average.take_due_cuts(begin + 10.0 * event) and None)  # type: ignore[misc]
        hashes.append(average.hash())
    assert hashes[0] == hashes[1] != b""
