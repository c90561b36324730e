"""What tests of this room and of the rooms above use: a network in memory, virtual time, and the suite that every transport passes.

    from tscale_net.testing import MemoryNetwork, run_virtual

    async def scene(clock, rng):
        network = MemoryNetwork(rng, clock)
        one = network.transport(Identity.from_seed(bytes(31) + b"1"), "one")
        ...

    run_virtual(scene, seed=7)
"""

from __future__ import annotations

from tscale_net.conformance import CASES, Arena, transport_conformance
from tscale_net.memory_network import MemoryNetwork
from tscale_net.memory_transport import MemoryTransport
from tscale_net.virtual_time import Deadlock, VirtualClock, VirtualLoop, run_virtual

__all__ = [
    "CASES",
    "Arena",
    "Deadlock",
    "MemoryNetwork",
    "MemoryTransport",
    "VirtualClock",
    "VirtualLoop",
    "run_virtual",
    "transport_conformance",
]
