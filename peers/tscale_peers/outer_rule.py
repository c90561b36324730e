"""What an author does at a publication, and what becomes of packets: the words of the exchange."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tscale_net.errors import Refused
from tscale_peers.packet import Key, Sign

Part = Literal["share", "one"]


@dataclass(frozen=True, slots=True)
class OuterRule:
    """What an author does at a publication. Sum rule: both "share" (the default). Averaging rule: both "one".

    Raises ValueError at construction for a scale that is not positive.
    """

    share_scale: float = 1.0
    """s in c = s * share. Measured safe up to 1; at 8 with 8 peers (c = 1) training diverges."""
    own_leak: Part = "share"
    momentum_keep: Part = "share"
    grid_displacement: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.share_scale) and self.share_scale > 0):
            raise ValueError(f"rule.share_scale must be positive, not {self.share_scale}")
        if {self.own_leak, self.momentum_keep} - {"share", "one"}:
            raise ValueError('rule.own_leak and rule.momentum_keep must be "share" or "one"')
        if self.grid_displacement and self.own_leak != "share":
            raise ValueError('rule.grid_displacement needs rule.own_leak = "share": (c*q)/c does not lie on the grid')


class Signer(NamedTuple):
    """An author: Ed25519 public key (32 bytes) and `sign(domain, message)`."""

    public_key: bytes
    sign: Sign


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one received packet. "settled": an own packet that B had and d had not paid yet."""

    key: Key
    outcome: Literal["applied", "duplicate", "settled", "refused"]
    refusal: Refused | None = None


class Published(NamedTuple):
    """Packets to spread, at most one per chunk, already durable and applied here; the factor for the trainer's momentum."""

    packets: list[bytes]
    momentum_keep: float
