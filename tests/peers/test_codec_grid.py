"""Codecs int8 and int4: contraction and drain, spellings that no encoder writes, the device of the displacement does not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import LAYOUT
from tscale_net.errors import Refused
from tscale_peers.codec_grid import INT4, INT8, GridCodec
from tscale_peers.layout import Chunk, Layout, TensorSpec

CODECS = {"int8": GridCodec("int8", INT8), "int4": GridCodec("int4", INT4)}
RUGGED = Layout.build((TensorSpec("vector", 1, 24, -20), TensorSpec("flat", 3, 200, -18), TensorSpec("square", 40, 40, -22)), 4096).chunks[
    0
]
"""Segments that end inside a block, of three units."""


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> GridCodec:
    return CODECS[request.param]


def displacement(chunk: Chunk, seed: int = 0, size: float = 1e-3) -> torch.Tensor:
    return torch.randn(chunk.size, generator=torch.Generator().manual_seed(seed)).mul_(size)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(CODECS)), st.integers(0, 1 << 30), st.floats(0.02, 1.0), st.sampled_from([1e-8, 1e-5, 1e-3, 1.0, 1e9]))
def test_a_round_trip_leaves_at_most_half_a_step(name: str, seed: int, coefficient: float, size: float) -> None:
    codec, d = CODECS[name], displacement(RUGGED, seed, size).double()
    delta = codec.open(codec.encode(d, RUGGED, coefficient), RUGGED)
    left = d.clone()
    delta.take_from(left, coefficient)
    for s in RUGGED.segments:
        blocks = list(
            zip(d[s.start : s.stop].split(codec.width.grid.values), left[s.start : s.stop].split(codec.width.grid.values), strict=True)
        )
        for before, after in blocks:
            peak = float(before.abs().max())
            reach = codec.width.grid.most_units * s.unit / coefficient
            half_a_step = 0.5005 * max(s.unit / coefficient, min(peak, reach) / codec.width.grid.largest_code + s.unit / coefficient)
            assert float(after.abs().max()) <= half_a_step + max(0.0, peak - 0.999 * reach)
    assert left.norm() <= d.norm() + max(s.unit for s in RUGGED.segments) / coefficient * RUGGED.size**0.5


@pytest.mark.parametrize("coefficient", [0.25, 1.0])
def test_error_feedback_drains_a_displacement_to_the_grid(codec: GridCodec, coefficient: float) -> None:
    d = displacement(RUGGED)
    for _ in range(round(24 / coefficient)):
        codec.open(codec.encode(d, RUGGED, coefficient), RUGGED).take_from(d)
    for s in RUGGED.segments:
        assert float(d[s.start : s.stop].abs().max()) <= 0.51 * s.unit / coefficient


@pytest.mark.parametrize("name", sorted(CODECS))
def test_zero_is_a_payload_of_zeros(name: str) -> None:
    payload = CODECS[name].encode(torch.zeros(RUGGED.size), RUGGED, 0.5)
    assert payload == bytes(CODECS[name].max_payload_bytes(RUGGED))
    assert CODECS[name].open(payload, RUGGED).largest_step == 0


def test_bytes_per_value() -> None:
    whole = Layout.build((TensorSpec("matrix", 64, 1280, -20),), 64 * 1280).chunks[0]
    assert CODECS["int8"].max_payload_bytes(whole) == whole.size * 65 // 64
    assert CODECS["int4"].max_payload_bytes(whole) == whole.size * 17 // 32


def refusal(codec: GridCodec, payload: bytes, chunk: Chunk = RUGGED) -> str:
    with pytest.raises(Refused) as caught:
        codec.open(payload, chunk)
    return caught.value.code


def changed(codec: GridCodec, change: dict[int, int]) -> bytes:
    payload = bytearray(codec.encode(displacement(RUGGED), RUGGED, 0.5))
    for place, byte in change.items():
        payload[place] = byte
    return bytes(payload)


def test_steps_that_no_encoder_writes(codec: GridCodec) -> None:
    assert refusal(codec, changed(codec, {0: 0xFF, 1: 0xFF})) == "packet-scale"
    assert refusal(codec, changed(codec, {0: 0x01, 1: 0x00})) == "packet-scale"
    too_large = (1025 << 5) | (7 if codec.name == "int8" else 11)
    assert refusal(codec, changed(codec, {0: too_large & 0xFF, 1: too_large >> 8})) == "packet-scale"


def test_codes_that_no_encoder_writes(codec: GridCodec) -> None:
    """The least code; a step of 0 over codes that are not; codes that are 0 under a step that is not."""
    first = 2 * sum(codec.width.blocks(s) for s in RUGGED.segments)
    assert refusal(codec, changed(codec, {first + 3: 0x80})) == "packet-payload"
    assert refusal(codec, changed(codec, {0: 0, 1: 0})) == "packet-payload"
    vector = codec.width.code_bytes(RUGGED.segments[0])
    assert refusal(codec, changed(codec, {first + at: 0 for at in range(vector)})) == "packet-payload"


def test_payloads_of_another_size(codec: GridCodec) -> None:
    payload = codec.encode(displacement(RUGGED), RUGGED, 0.5)
    assert refusal(codec, payload + b"\0") == "packet-oversized"
    assert refusal(codec, payload[:-1]) == "packet-truncated"
    assert refusal(codec, b"") == "packet-truncated"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_device_writes_and_adds_the_same(codec: GridCodec) -> None:
    for chunk in (RUGGED, *LAYOUT.chunks):
        d = displacement(chunk)
        payload = codec.encode(d, chunk, 0.37)
        assert codec.encode(d.cuda(), chunk, 0.37) == payload
        here, there = codec.open(payload, chunk), codec.open(payload, chunk)
        b, left = torch.arange(chunk.size, dtype=torch.int32), d.clone()
        b_there, left_there = b.cuda(), d.cuda()
        here.add_to(b)
        here.take_from(left, 0.37)
        there.add_to(b_there)
        there.take_from(left_there, 0.37)
        assert torch.equal(b_there.cpu(), b)
        assert torch.equal(left_there.cpu(), left)
