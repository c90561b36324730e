"""Weights on a CUDA device: the same replica, displacement and weights, bit for bit, as with weights on the CPU."""

import pytest
import torch

from tests.peers.core_kit import STREAM, StillClock, author, new_exchange, new_replica, opened, terms
from tscale_peers.delta_log import MemoryLog
from tscale_peers.exchange import Exchange, OuterRule

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.parametrize("rule", [OuterRule(), OuterRule(own_leak="one", momentum_keep="one"), OuterRule(grid_displacement=True)])
def test_the_device_of_the_weights_does_not_matter(rule: OuterRule) -> None:
    on_cpu, other = new_exchange(1, rule), new_exchange(2, rule)
    who = author(1)
    weights = torch.empty(on_cpu.weights.shape, device="cuda")
    on_cuda = Exchange(new_replica(terms()), weights, rule, (who.public_key, who.sign), STREAM, MemoryLog(), terms(), StillClock())
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        move = torch.randn(on_cpu.weights.shape, generator=generator) * 1e-3
        bodies = other.publish(step, 0.5).packets
        for exchange in (on_cpu, on_cuda, other):
            exchange.weights.add_(move.to(exchange.weights.device))
            exchange.mark_trained()
            exchange.receive(opened(bodies))
        assert on_cpu.publish(step, 0.5) == on_cuda.publish(step, 0.5)
        assert on_cpu.replica.state() == on_cuda.replica.state()
        assert torch.equal(on_cpu.displacement().view(torch.int32), on_cuda.displacement().view(torch.int32))
        assert torch.equal(on_cpu.weights.view(torch.int32), on_cuda.weights.cpu().view(torch.int32))
