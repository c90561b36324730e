"""What a peer is given: who it is, what it says and does, and the outside world."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from tscale_net.ports import Clock, PeerId, Rng, Transport
from tscale_net.token_bucket import TokenBucket
from tscale_net.transfer import Transfers
from tscale_peers.records import Verify


class Author(Protocol):
    """Who this peer is."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def public_key(self) -> bytes: ...

    def sign(self, domain: bytes, message: bytes) -> bytes: ...


@dataclass(slots=True)
class PeerSettings:
    """What this peer says and does, beyond the manifest."""

    name: str
    role: str = "peer"
    bootstrap: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    """Where others can dial this peer (multiaddrs); empty if it is outbound only."""
    remembered: tuple[str, ...] = ()
    """Where peers of this swarm were when this one last ran; dialled at the start, without a word if nobody is there any more."""
    max_upload_bytes_s: float | None = None
    """What the transport was told to send at most; it keeps to it by itself."""


@dataclass(slots=True)
class Outside:
    """Everything of the outside world, injected."""

    transport: Transport
    transfers: Transfers
    clock: Clock
    rng: Rng
    verify: Verify
    executor: Executor | None = None
    """Signature checks and idle meetings run here; None: on the loop (simulation)."""
    download: TokenBucket | None = None
    """Bytes per second that may be asked for, the same that `transfers` takes from; None: no limit."""
