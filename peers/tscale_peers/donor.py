"""What a peer gives to newcomers: the manifest, its chunks of the basepoint, its optimizer statistics, and what the room above adds (data).

Enters: blob names asked for by linked peers. Leaves: bytes or a source to read from; None for what is not here.
Each chunk comes with its own applied entries, so nothing is frozen: two chunks from two donors need not be of one moment.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tscale_net.ports import PeerId
from tscale_net.transfer import BlobSource
from tscale_peers.peer import SwarmPeer

Extra = Callable[[str], Awaitable[bytes | BlobSource | None]]
"""Blobs of the room above, by name."""

MANIFEST = "manifest"
TRAINER_STATE = "trainer-state"
CHUNK_PREFIX = "chunk/"


def provide_from(
    peer: SwarmPeer, manifest: bytes, chunks: int, trainer_state: Callable[[], bytes | None], extra: Extra
) -> Callable[[PeerId, str], Awaitable[bytes | BlobSource | None]]:
    """The provider for `Transfers.serve`. `trainer_state` gives None while there is none to give."""

    async def provide(asker: PeerId, name: str) -> bytes | BlobSource | None:
        if name == MANIFEST:
            return manifest
        if name == TRAINER_STATE:
            return trainer_state()
        if name.startswith(CHUNK_PREFIX):
            index = name.removeprefix(CHUNK_PREFIX)
            if peer.gossip.hold or not index.isascii() or not index.isdigit() or not int(index) < chunks:
                return None
            return await peer.off_loop(lambda: peer.meeting.replica.read_chunk(int(index)))
        return await extra(name)

    return provide
