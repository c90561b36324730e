"""Codecs: sizes known beforehand, one spelling, the same integers for all, contraction, error feedback that drains."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import LAYOUT
from tscale_kernels.limits import max_step
from tscale_net.errors import Refused
from tscale_peers.codec import FAMILIES, Codec, codec_named
from tscale_peers.layout import Chunk

VARIABLE = ("topk-sign", "topk-2bit")
"""Codecs whose payloads may be shorter than their bound."""


@pytest.fixture(params=sorted(FAMILIES))
def codec(request: pytest.FixtureRequest) -> Codec:
    return codec_named(request.param)


@pytest.fixture(params=LAYOUT.chunks, ids=lambda chunk: f"chunk{chunk.index}")
def chunk(request: pytest.FixtureRequest) -> Chunk:
    return request.param


def displacement(chunk: Chunk, seed: int = 0) -> torch.Tensor:
    return torch.randn(chunk.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul_(1e-3)


def test_payload_has_the_size_that_layout_and_codec_say(codec: Codec, chunk: Chunk) -> None:
    size = len(codec.encode(displacement(chunk), chunk, 0.5))
    assert size <= codec.max_payload_bytes(chunk) if codec.name in VARIABLE else size == codec.max_payload_bytes(chunk)


def test_decoded_integers_are_added_and_taken_back(codec: Codec, chunk: Chunk) -> None:
    delta = codec.open(codec.encode(displacement(chunk), chunk, 0.5), chunk)
    start = torch.arange(chunk.size, dtype=torch.int32)
    got = start.clone()
    delta.add_to(got)
    assert int((got - start).abs().max()) == delta.largest_step > 0
    delta.add_to(got, sign=-1)
    assert torch.equal(got, start)


def test_the_author_gives_up_what_receivers_gain(codec: Codec, chunk: Chunk) -> None:
    delta = codec.open(codec.encode(displacement(chunk), chunk, 0.5), chunk)
    gained = torch.zeros(chunk.size, dtype=torch.int32)
    delta.add_to(gained)
    lost = torch.zeros(chunk.size, dtype=torch.float64)
    delta.take_from(lost)
    for s in chunk.segments:
        assert torch.equal(-lost[s.start : s.stop], gained[s.start : s.stop].double() * s.unit)
    halved = torch.zeros(chunk.size, dtype=torch.float64)
    delta.take_from(halved, 0.5)
    assert torch.equal(halved, lost * 2)


def test_sign_payload_is_codes_then_bits(chunk: Chunk) -> None:
    d = displacement(chunk)
    payload = codec_named("sign").encode(d, chunk, 0.5)
    bits = np.frombuffer(payload[2 * chunk.rows :], dtype=np.uint8)
    assert np.array_equal(np.unpackbits(bits, bitorder="little").astype(bool), d.numpy() < 0)


@pytest.mark.parametrize("delta", [-1, 1, -(10**6)])
def test_payloads_of_another_size_are_refused(codec: Codec, chunk: Chunk, delta: int) -> None:
    payload = codec.encode(displacement(chunk), chunk, 0.5)
    wrong = payload + b"\0" if delta == 1 else payload[:delta]
    with pytest.raises(Refused) as caught:
        codec.open(wrong, chunk)
    assert caught.value.code == ("packet-oversized" if delta == 1 else "packet-truncated")


@pytest.mark.parametrize("code", [0xFFFF, 1, (1023 << 5) | 3, (2047 << 5) | 31, (1025 << 5) | 14])
def test_scale_codes_that_no_encoder_writes_are_refused(code: int) -> None:
    chunk = LAYOUT.chunks[0]
    payload = bytearray(codec_named("sign").encode(displacement(chunk), chunk, 0.5))
    payload[2:4] = code.to_bytes(2, "little")
    with pytest.raises(Refused, match="row 1 ") as caught:
        codec_named("sign").open(bytes(payload), chunk)
    assert caught.value.code == "packet-scale"


@pytest.mark.parametrize("step", [max_step + 1, -max_step - 1, -(2**31), 2**31 - 1])
def test_exact_steps_above_the_largest_are_refused(step: int) -> None:
    chunk = LAYOUT.chunks[0]
    payload = bytearray(codec_named("exact").encode(displacement(chunk), chunk, 0.5))
    payload[4:8] = step.to_bytes(4, "little", signed=True)
    with pytest.raises(Refused) as caught:
        codec_named("exact").open(bytes(payload), chunk)
    assert caught.value.code == "packet-scale"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_make_no_packet(codec: Codec, bad: float) -> None:
    chunk = LAYOUT.chunks[0]
    d = displacement(chunk)
    d[5] = bad
    with pytest.raises(Refused) as caught:
        codec.encode(d, chunk, 0.5)
    assert caught.value.code == "not-finite"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("topk-sign-", "known: exact, "),
        ("topk-sign-08", "known: exact, "),
        ("topk-sign--8", "known: exact, "),
        ("topk-sign-8-8", "known: exact, "),
        ("sign-8", "known: exact, "),
        ("topk-sign-4096", "K must lie in 1..2048"),
        ("topk-2bit-64", "is written 'topk-2bit'"),
    ],
)
def test_a_codec_has_one_name(name: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        codec_named(name)
    assert codec_named("topk-sign-8").name == "topk-sign-8"


def test_unknown_codec_lists_the_known() -> None:
    with pytest.raises(Refused, match="sign"):
        codec_named("zip")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0.05, 1.0))
def test_one_bit_contracts_by_its_formula(seed: int, coefficient: float) -> None:
    """||d - q||^2 = ||d||^2 - sum over rows of ||d_r||_1^2 / n, up to the rounding of the steps."""
    for chunk in LAYOUT.chunks:
        d = displacement(chunk, seed)
        left = d.clone()
        codec = codec_named("sign")
        codec.open(codec.encode(d, chunk, coefficient), chunk).take_from(left, coefficient)
        for s in chunk.segments:
            rows = s.matrix(d)
            ideal = rows.square().sum(1) - rows.abs().sum(1).square() / s.cols
            rounding = 0.51 * s.unit / coefficient + rows.abs().mean(1) * 2.0**-11
            assert torch.all((s.matrix(left).square().sum(1) - ideal).abs() <= s.cols * rounding.square() + 1e-15)


@pytest.mark.parametrize("coefficient", [0.25, 1.0])
def test_error_feedback_drains_a_displacement_that_nothing_refills(coefficient: float) -> None:
    """The sum rule published again and again: d shrinks geometrically until the grid is reached."""
    codec = codec_named("sign")
    for chunk in LAYOUT.chunks:
        d = displacement(chunk)
        sizes = [float(d.norm())]
        for _ in range(round(160 / coefficient)):
            codec.open(codec.encode(d, chunk, coefficient), chunk).take_from(d)
            sizes.append(float(d.norm()))
        assert sizes[20] < 0.7 * sizes[0]
        assert sizes[-1] < 0.02 * sizes[0]
