"""Which fragments make a batch. Anybody who knows (run seed, peer id, step) draws the same ones.

Rule: the 128-bit key of a Philox-4x64-10 counter generator (Salmon et al. 2011) is blake3 of the domain string, run seed, step and peer
id; its n raw 64-bit words r give n start positions (r * places) >> 64, uniform over the places where a fragment fits (the bias is below
places / 2^64). Raw words are used because numpy promises that they never change between versions, which it does not for its ready-made
distributions. Nothing is kept between draws, so there is no data position to save or lose.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3

DOMAIN = "tscale-fed/batch/1"
KEY_BYTES = 16
WORD_BITS = 64


def batch_positions(run_seed: int, peer_id: str, step: int, fragments: int, places: int) -> list[int]:
    """`fragments` start positions in 0 <= position < places, drawn with replacement."""
    # The peer id comes last and numbers hold no bar, so no two different triples give one string.
    name = f"{DOMAIN}|{run_seed}|{step}|{peer_id}".encode()
    key = np.frombuffer(blake3(name).digest(KEY_BYTES), "<u8")
    words = np.random.Philox(key=key).random_raw(fragments)
    return [(word * places) >> WORD_BITS for word in words.tolist()]


def spread_positions(fragments: int, places: int) -> list[int]:
    """`fragments` positions at equal distances over 0 <= position < places: the fixed evaluation set."""
    return [(2 * index + 1) * places // (2 * fragments) for index in range(fragments)]
