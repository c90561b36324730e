"""The peer-to-peer rule against the original's central rule (tests/oracle/central_rule.py): 50 rounds, common clock, uncompressed."""

import pytest
import torch

from tests.oracle.central_rule import CentralRule
from tests.oracle.real_codec import RealCodec
from tests.peers.core_kit import new_exchange, opened, terms
from tscale_peers.exchange import Exchange, OuterRule
from tscale_peers.layout import Layout, TensorSpec
from tscale_peers.packet import Terms

ROUNDS = 50
BATCHES = [[3, 1, 5, 2], [1, 1, 1, 1], [8, 1, 2, 4]]
"""Batches per worker; the pattern changes from round to round."""
GRID_EXPONENT = -16


def layout(unit_exponent: int) -> Layout:
    return Layout.build([TensorSpec("a", 4, 32, unit_exponent), TensorSpec("b", 3, 16, unit_exponent)], 64)


def run_both(t: Terms, scale: float, workers: int, grid_displacement: bool):
    """Yields (round, central, exchanges) after each round; scripted local moves, the same for both."""
    rule = OuterRule(share_scale=scale, grid_displacement=grid_displacement)
    exchanges = [new_exchange(k + 1, rule, t, dtype=torch.float64) for k in range(workers)]
    central = CentralRule.start(exchanges[0].weights, workers, scale)
    generator = torch.Generator().manual_seed(5)
    done, keeps = [0] * workers, [1.0] * workers
    for number in range(1, ROUNDS + 1):
        batches = BATCHES[number % len(BATCHES)][:workers]
        moves = [torch.randn(t.layout.size, generator=generator, dtype=torch.float64) * 1e-2 for _ in range(workers)]
        central.round(moves, batches)
        bodies: list[bytes] = []
        for k, exchange in enumerate(exchanges):
            exchange.weights.add_(moves[k])
            exchange.mark_trained()
            done[k] += batches[k]
            packets, keep = exchange.publish(done[k], batches[k] / sum(batches))
            keeps[k] *= keep
            bodies += packets
        for exchange in exchanges:
            exchange.receive(opened(bodies, t))
        yield number, central, exchanges, keeps


def basepoint(exchange: Exchange) -> torch.Tensor:
    out = torch.empty(exchange.replica.layout.size, dtype=torch.float64)
    for chunk in exchange.replica.layout.chunks:
        exchange.replica.chunk_weights(chunk.index, chunk.of(out))
    return out


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_without_a_grid_it_is_the_central_rule(scale: float, workers: int) -> None:
    t = terms(RealCodec(), layout=layout(0))
    before_last: list[float] = [1.0] * workers
    for number, central, exchanges, keeps in run_both(t, scale, workers, grid_displacement=False):
        assert number <= ROUNDS
        for k, exchange in enumerate(exchanges):
            assert (basepoint(exchange) - central.model).abs().max() <= 1e-10
            assert (exchange.displacement() - central.displacements_after_merge()[k]).abs().max() <= 1e-10
            assert (exchange.weights - basepoint(exchange) - exchange.displacement()).abs().max() <= 1e-10
            # The center's word about a share comes one round later.
            assert central.workers[k].momentum == pytest.approx(before_last[k], rel=1e-12)
        before_last = list(keeps)


@pytest.mark.parametrize("grid_displacement", [False, True])
@pytest.mark.parametrize("workers", [1, 4])
def test_on_the_grid_it_stays_within_half_a_unit_per_packet(workers: int, grid_displacement: bool) -> None:
    """Each packet rounds c*d to units (half a unit at most) and the remainder stays in d. With d on the grid too, so does each capture."""
    t = terms("exact", layout=layout(GRID_EXPONENT))
    unit = 2.0**GRID_EXPONENT
    for number, central, exchanges, _ in run_both(t, 1.0, workers, grid_displacement):
        packets = number * workers
        for exchange in exchanges:
            assert (basepoint(exchange) - central.model).abs().max() <= 0.5 * unit * packets + 1e-12
    assert len({exchange.replica.state() for exchange in exchanges}) == 1
