"""The numbers of this package, with units and reasons."""

from __future__ import annotations

from tscale_net.limits import CLOCK_WINDOW_S

GIB = 1 << 30
MIB = 1 << 20

DISK_FAIL_BYTES = 1 * GIB
"""Less does not hold two checkpoints of a small model."""
DISK_WARN_BYTES = 20 * GIB
"""Three checkpoints of a model of 1.5e9 weights take about this (guess)."""
DISK_SLOW_BYTES_PER_S = 50 * MIB
"""Below this a checkpoint of 1.5e9 weights takes minutes."""
DISK_SAMPLE_BYTES = 32 * MIB
"""Written and synced to measure the disk: under a second on any disk worth using."""
MEMORY_FAIL_BYTES = 1 * GIB
MEMORY_WARN_BYTES = 4 * GIB
"""torch alone takes 0.5 GiB; a small model and its shards fit into the rest."""
MTU_WARN_BYTES = 1280
"""The smallest that IPv6 allows; below it, tunnels are set wrongly."""
CLOCK_FAIL_S = CLOCK_WINDOW_S
"""Peers refuse a HELLO beyond this."""
CLOCK_WARN_S = 5.0
"""A clock that is kept by NTP is within a second."""
ROUND_TRIP_WARN_S = 0.3
"""Half-way around the earth; beyond it something is slow."""
