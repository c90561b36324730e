"""What is going on with one linked peer: what it has, what it is still to be told and sent, and how much it may ask for. Pure state."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from tscale_peers import limits
from tscale_peers.allowance import Allowance
from tscale_peers.packet import Key


@dataclass(slots=True)
class Neighbour:
    """One linked peer. All of it is bounded; what is forgotten comes up again when sets are compared."""

    announced: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    """Keys it has or was sent: it need not be told again."""
    to_tell: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    """Keys that the next announcement names."""
    to_send: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    """Keys it asked for."""
    pushed: set[Key] = field(default_factory=set)
    """Keys that it was sent unasked and has not shown to hold yet."""
    takes_part: bool = False
    """It has said anything about packets yet."""
    set_from: bytes = b""
    """Where the next part of our set begins, if that is told in parts."""
    keys: Allowance = field(default_factory=lambda: Allowance(limits.keys_per_s, limits.keys_burst))
    sets_told: Allowance = field(default_factory=lambda: Allowance(limits.sets_told_per_s, limits.sets_told_burst))
    sets_heard: Allowance = field(default_factory=lambda: Allowance(limits.sets_heard_per_s, limits.sets_heard_burst))

    def has(self, key: Key) -> None:
        """It has this packet, or it is on its way there."""
        _remember(self.announced, key)

    def tell(self, key: Key) -> None:
        """Name this packet in the next announcement."""
        _remember(self.to_tell, key)

    def ask(self, key: Key) -> None:
        """It wants this packet. More than an honest peer asks for is taken no notice of."""
        if len(self.to_send) < limits.asked_keys:
            self.to_send[key] = None

    def next_told(self) -> list[Key]:
        """Take the keys of the next announcement."""
        count = min(len(self.to_tell), limits.keys_told_per_tick)
        return [self.to_tell.popitem(last=False)[0] for _ in range(count)]


def _remember(keys: OrderedDict[Key, None], key: Key) -> None:
    keys[key] = None
    if len(keys) > limits.neighbour_keys:
        keys.popitem(last=False)
