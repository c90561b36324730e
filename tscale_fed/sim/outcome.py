"""What came of a simulation.

Enters: samples of the running swarm, and how it stood at its end. Leaves: one plain structure for the table, the JSON and the curves.
"""

from __future__ import annotations

import msgspec


class Sample(msgspec.Struct, frozen=True):
    """The swarm at one moment. Bytes and tokens since the start: bytes received by a peer on average, tokens of all peers."""

    minute: float
    loss: float
    bytes_per_peer: float
    tokens: int
    living: int
    training: int
    states: int
    """Different sets of packets among living replicas."""


class SpeedRow(msgspec.Struct, frozen=True):
    """All peers of one speed together."""

    speed: float
    peers: int
    steps: int
    published: int
    received_bytes: float
    """Per peer."""
    sent_bytes: float
    longest_gap_s: float
    """Longest time between two steps of a living peer."""
    step_s: float


class Ending(msgspec.Struct, frozen=True):
    """After training has stopped and everything was delivered."""

    settled_s: float
    """Virtual time that took; -1: it did not come about."""
    replicas: int
    digests: int
    hashes: int
    hash: str
    """Of the first replica."""
    loss: float


class Outcome(msgspec.Struct, frozen=True):
    """See the module's head."""

    scenario: dict[str, object]
    minutes: float
    """That were simulated: fewer than asked for if it was stopped."""
    stopped: bool
    real_s: float
    cpu_s: float
    messages: int
    kills: int
    replaced: int
    refused: dict[str, int]
    """Refusals by code, of all peers together."""
    false_deaths: int
    """How often a peer was taken for dead that lived and could be reached."""
    samples: list[Sample]
    speeds: list[SpeedRow]
    ending: Ending | None
    trace: str
