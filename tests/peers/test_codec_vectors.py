"""Payloads of the codecs as frozen bytes, shown in docs/protocol.md. A change here is a change of the protocol: a codec with a new name.

`python tests/peers/test_codec_vectors.py` prints the bytes of this program.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tscale_peers.codec import codec_named
from tscale_peers.layout import Layout, TensorSpec

CHUNK = Layout.build([TensorSpec("embedding", 2, 8, -20), TensorSpec("final", 1, 16, -18)], 1024).chunks[0]
COEFFICIENT = 0.5

FROZEN = {
    "sign": "00200020228040000100",
    "topk-sign-4": "00e7001242f801",
    "topk-2bit-4": "00e634120642f801",
    "int8": "a00120040027000000008a000000007627000000847c7c7c7c7c7c7c7c7c7c7c7c7c7c7c",
    "int4": "801b404920000009007002007977777777777777",
}

STEPS = {
    "topk-sign-4": {1: 1024, 6: -1024, 11: 1024, 12: 1024, 16: -4096, 17: 4096, 18: 4096, 19: 4096},
    "topk-2bit-4": {1: 512, 6: -1536, 11: 1536, 12: 512, 16: -4096, 17: 4096, 18: 4096, 19: 4096},
}
"""Place -> units."""


def displacement() -> torch.Tensor:
    """Four values of `embedding` move, by 512 and 1536 units at c = 1/2; all of `final` do, by 4099 units."""
    d = torch.zeros(CHUNK.size)
    d[1], d[6], d[11], d[12] = 2.0**-10, -3 * 2.0**-10, 3 * 2.0**-10, 2.0**-10
    d[16:] = 4099 * 2.0**-17
    d[16] *= -1
    return d


def payload(name: str) -> bytes:
    return codec_named(name).encode(displacement(), CHUNK, COEFFICIENT)


@pytest.mark.parametrize("name", FROZEN)
def test_payload_is_frozen(name: str) -> None:
    assert payload(name).hex() == FROZEN[name]


@pytest.mark.parametrize("name", STEPS)
def test_frozen_payloads_move_what_the_page_says(name: str) -> None:
    moved = torch.zeros(CHUNK.size, dtype=torch.int32)
    codec_named(name).open(bytes.fromhex(FROZEN[name]), CHUNK).add_to(moved)
    assert {place: step for place, step in enumerate(moved.tolist()) if step} == STEPS[name]


def test_the_page_shows_these_bytes() -> None:
    page = "".join((Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text().split())
    for name, value in FROZEN.items():
        assert f"{name}{value}" in page, f"docs/protocol.md does not show the payload of {name}"


if __name__ == "__main__":
    for title in FROZEN:
        print(f'    "{title}": "{payload(title).hex()}",')
