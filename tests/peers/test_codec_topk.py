"""Codecs topk-sign and topk-2bit: a second encoder written from the protocol's text, contraction, limits of the decoder, one spelling."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import LAYOUT
from tscale_kernels import delta_topk
from tscale_net.errors import Refused
from tscale_peers.codec import codec_named
from tscale_peers.codec_topk import TopkCodec
from tscale_peers.layout import Chunk, Layout, TensorSpec
from tscale_peers.limits import rice_max_parameter
from tscale_peers.rice import best_parameter, is_best_parameter

STRETCH = 4096
RUGGED = Layout.build(
    (TensorSpec("vector", 1, 24, -20), TensorSpec("flat", 3, 200, -18), TensorSpec("long", 9, 1024, -22)), 1 << 14
).chunks[0]
"""Stretches of 24, 600, 4096, 4096 and 1024 values, of three units."""
NAMES = ("topk-sign", "topk-2bit", "topk-sign-8", "topk-2bit-200")
TAILS = ("gauss", "heavy", "few", "zero")


def codec_of(name: str) -> TopkCodec:
    codec = codec_named(name)
    assert isinstance(codec, TopkCodec)
    return codec


def displacement(chunk: Chunk = RUGGED, seed: int = 0, tail: str = "gauss", size: float = 1e-3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    d = torch.randn(chunk.size, generator=g)
    if tail == "heavy":
        d *= torch.randn(chunk.size, generator=g).mul_(2).exp_()
    if tail == "few":
        d *= torch.rand(chunk.size, generator=g) < 0.002
    return torch.zeros(chunk.size) if tail == "zero" else d * size


def added(codec: TopkCodec, payload: bytes, chunk: Chunk = RUGGED) -> torch.Tensor:
    units = torch.zeros(chunk.size, dtype=torch.int32)
    codec.open(payload, chunk).add_to(units)
    return units


# -- a second encoder: from picks to bytes, bit by bit, as the protocol says ---------------------------------------------


def bit_string(bits: list[int]) -> bytes:
    filled = bits + [0] * (-len(bits) % 8)
    return bytes(sum(bit << at for at, bit in enumerate(filled[first : first + 8])) for first in range(0, len(filled), 8))


def spelling(units: torch.Tensor, chunk: Chunk, two_sizes: bool, r: int | None = None) -> bytes:
    """The payload of a decoded delta."""
    exponents: list[int] = []
    gaps: list[int] = []
    negative: list[int] = []
    shape: list[list[int]] = [[], []]
    large: list[int] = []
    for s in chunk.segments:
        for part in units[s.start : s.stop].split(STRETCH):
            places = part.nonzero().flatten().tolist()
            steps = [int(part[place]) for place in places]
            sizes = sorted({abs(step) for step in steps})
            exponent = -1 if not sizes else int(math.log2(sizes[0] // 3 if sizes[0] % 3 == 0 else sizes[0]))
            exponents.append(exponent)
            assert all(size in (1 << exponent, 3 << exponent if two_sizes else 0) for size in sizes)
            gaps += [place - before - 1 for before, place in zip([-1, *places], places, strict=False)]
            negative += [int(step < 0) for step in steps]
            is_large = [int(abs(step) == 3 << exponent) for step in steps if exponent >= 0]
            shape[0].append(int(1 in is_large))
            shape[1].append(int(0 in is_large))
            large += is_large if 0 < sum(is_large) < len(is_large) else []
    return written(exponents, gaps, shape if two_sizes else [], [negative, large] if two_sizes else [negative], r)


def written(exponents: list[int], gaps: list[int], shape: list[list[int]], planes_of_picks: list[list[int]], r: int | None = None) -> bytes:
    """r None: the one that makes the payload shortest, counted in bits, the least of several."""
    if r is None:
        r = min(range(rice_max_parameter + 1), key=lambda r: (len(gaps) * (1 + r) + sum(gap >> r for gap in gaps), r))
    exponent_planes = [(e + 1) >> plane & 1 for plane in range(5) for e in exponents] + [bit for plane in shape for bit in plane]
    planes = [gap >> plane & 1 for plane in range(r) for gap in gaps] + [bit for plane in planes_of_picks for bit in plane]
    unary = [bit for gap in gaps for bit in [0] * (gap >> r) + [1]]
    return bytes([r]) + bit_string(exponent_planes) + bit_string(planes) + bit_string(unary)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(TAILS), st.integers(0, 1 << 30), st.floats(0.02, 1.0), st.sampled_from([1e-9, 1e-3, 1e4]))
def test_payloads_are_spelt_as_the_protocol_says(name: str, tail: str, seed: int, coefficient: float, size: float) -> None:
    codec, d = codec_of(name), displacement(seed=seed, tail=tail, size=size)
    payload = codec.encode(d, RUGGED, coefficient)
    assert len(payload) <= codec.max_payload_bytes(RUGGED)
    assert payload == spelling(added(codec, payload), RUGGED, codec.two_sizes)


@pytest.mark.parametrize("name", ["topk-sign", "topk-sign-8"])
@pytest.mark.parametrize("tail", TAILS)
def test_signs_decode_to_what_the_kernels_room_adds(name: str, tail: str) -> None:
    codec, d = codec_of(name), displacement(tail=tail)
    wanted = torch.zeros(RUGGED.size, dtype=torch.int32)
    for s in RUGGED.segments:
        delta_topk.apply(s.matrix(wanted), *delta_topk.encode(s.matrix(d), 0.3, s.unit_exponent, codec.k), codec.k)
    assert torch.equal(added(codec, codec.encode(d, RUGGED, 0.3)), wanted)


@pytest.mark.parametrize("tail", TAILS)
def test_two_sizes_are_the_best_pair_for_the_same_picks(tail: str) -> None:
    """Against every exponent there is: at most as much error, in units, as the best."""
    d = displacement(tail=tail)
    signs, both = (added(codec_of(name), codec_of(name).encode(d, RUGGED, 0.5)) for name in ("topk-sign", "topk-2bit"))
    assert torch.equal(signs.sign(), both.sign())
    for s in RUGGED.segments:
        for part, got in zip(d[s.start : s.stop].split(STRETCH), both[s.start : s.stop].split(STRETCH), strict=True):
            picked = got.nonzero().flatten()
            units = torch.round(part[picked].abs() * (0.5 * 2.0**-s.unit_exponent)).double()
            error = float((units - got[picked].abs().double()).square().sum())
            tried = [torch.minimum((units - 2.0**e).square(), (units - 3 * 2.0**e).square()).sum() for e in range(23)]
            assert not len(picked) or error == float(min(tried))


# -- what is left --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(TAILS), st.integers(0, 1 << 30), st.floats(0.02, 1.0))
def test_it_contracts(name: str, tail: str, seed: int, coefficient: float) -> None:
    """||d - q||^2 <= ||d||^2 - 8/9 * sum over stretches of k * mean|picks|^2, up to half a unit (one, for values below it) per pick."""
    codec, d = codec_of(name), displacement(seed=seed, tail=tail).double()
    left = d.clone()
    codec.open(codec.encode(d, RUGGED, coefficient), RUGGED).take_from(left, coefficient)
    allowed = 0.0
    for s in RUGGED.segments:
        for part in d[s.start : s.stop].split(STRETCH):
            largest = part.abs().topk(min(codec.k, len(part))).values
            unit = s.unit / coefficient
            gain = max(0.0, float(largest.mean()) - unit) ** 2
            allowed += float(part.square().sum()) - 8 / 9 * len(largest) * gain + len(largest) * unit * (unit + float(largest.max()))
    assert float(left.square().sum()) <= allowed


def test_two_sizes_never_leave_more_than_one() -> None:
    for tail in ("gauss", "heavy", "few"):
        sizes = []
        for name in ("topk-sign", "topk-2bit"):
            left = displacement(tail=tail, size=1.0).double()
            codec_of(name).open(codec_of(name).encode(left, RUGGED, 1.0), RUGGED).take_from(left)
            sizes.append(float(left.norm()))
        assert sizes[1] < sizes[0]


@pytest.mark.parametrize("name", ["topk-sign-200", "topk-2bit-200"])
@pytest.mark.parametrize("coefficient", [0.25, 1.0])
def test_error_feedback_drains_a_displacement_that_nothing_refills(name: str, coefficient: float) -> None:
    """200 of 4096 move at once."""
    chunk = Layout.build((TensorSpec("matrix", 4, 1024, -22),), STRETCH).chunks[0]
    codec, d = codec_of(name), displacement(chunk)
    start = float(d.norm())
    for _ in range(round(120 / coefficient)):
        codec.open(codec.encode(d, chunk, coefficient), chunk).take_from(d)
    assert float(d.norm()) < 0.05 * start


@pytest.mark.parametrize("name", NAMES)
def test_zero_is_spelt_without_picks(name: str) -> None:
    payload = codec_of(name).encode(torch.zeros(RUGGED.size), RUGGED, 0.5)
    assert payload == bytes(1 + math.ceil(5 * (7 if codec_of(name).two_sizes else 5) / 8))
    assert codec_of(name).open(payload, RUGGED).largest_step == 0


def test_bytes_per_parameter_with_header_and_signature() -> None:
    """The figure that the default K was chosen for; a header and a signature take about 190 bytes."""
    chunk = Layout.build((TensorSpec("matrix", 819, 1280, -22),), 1 << 20).chunks[0]
    payload = codec_of("topk-sign").encode(displacement(chunk), chunk, 0.1)
    assert (len(payload) + 190) / chunk.size <= 0.0170


# -- Rice parameter ------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, STRETCH - 1)), max_size=40))
def test_the_parameter_is_the_least_of_the_shortest(listed: list[int]) -> None:
    gaps = np.array(listed, dtype=np.int64)
    cost = [len(listed) * (1 + r) + sum(gap >> r for gap in listed) for r in range(14)]
    assert best_parameter(gaps) == cost.index(min(cost)) <= rice_max_parameter
    assert [r for r in range(rice_max_parameter + 1) if is_best_parameter(gaps, r)] == [cost.index(min(cost))]


# -- what is refused -----------------------------------------------------------------------------------------------------


def refusal(codec: TopkCodec, payload: bytes, chunk: Chunk = RUGGED) -> str:
    with pytest.raises(Refused) as caught:
        codec.open(payload, chunk)
    return caught.value.code


@pytest.mark.parametrize("name", NAMES)
def test_spellings_that_no_encoder_writes(name: str) -> None:
    codec = codec_of(name)
    payload = codec.encode(displacement(), RUGGED, 0.5)
    r, exponents_end = payload[0], 1 + math.ceil((35 if codec.two_sizes else 25) / 8)
    one_stretch = torch.zeros(RUGGED.size, dtype=torch.int32)  # a short payload: no other parameter makes it longer than the bound
    one_stretch[624 : 624 + 20 * codec.k : 20] = 1
    good = spelling(one_stretch, RUGGED, codec.two_sizes)
    assert torch.equal(added(codec, good), one_stretch)
    for wrong in {*range(rice_max_parameter + 1)} - {good[0]}:
        assert refusal(codec, spelling(one_stretch, RUGGED, codec.two_sizes, wrong)) == "packet-payload", "another Rice parameter"
    assert refusal(codec, bytes([12]) + payload[1:]) == "packet-payload", "a parameter out of range"
    assert refusal(codec, bytes([r | 16]) + payload[1:]) == "packet-payload", "a high bit beside the parameter"
    filled = bytes([payload[exponents_end - 1] | 0x80])
    assert refusal(codec, payload[: exponents_end - 1] + filled + payload[exponents_end:]) == "packet-payload", "filling"
    assert refusal(codec, payload + b"\0") == "packet-oversized"
    assert refusal(codec, payload + b"\1") == "packet-oversized"
    assert refusal(codec, payload + bytes(1 << 20)) == "packet-oversized"
    for end in (0, 1, exponents_end - 1, exponents_end, len(payload) // 2, len(payload) - 1):
        assert refusal(codec, payload[:end]) == "packet-truncated"


@pytest.mark.parametrize(("name", "most"), [("topk-sign", 24), ("topk-2bit", 22)])
def test_exponents_above_the_largest_step(name: str, most: int) -> None:
    codec, units = codec_of(name), torch.zeros(RUGGED.size, dtype=torch.int32)
    units[:24] = 1 << most
    assert codec.open(spelling(units, RUGGED, codec.two_sizes), RUGGED).largest_step == 1 << most
    units[:24] = 1 << (most + 1)
    assert refusal(codec, spelling(units, RUGGED, codec.two_sizes)) == "packet-scale"


def test_picks_beyond_the_end_of_their_stretch() -> None:
    """Of the second stretch, 600 values that are a matrix of their own: after 7 picks, 592 values can be skipped before the last one."""
    codec, exponents = codec_of("topk-sign-8"), [-1, 0, -1, -1, -1]
    units = added(codec, written(exponents, [0] * 7 + [592], [], [[0] * 8]))
    assert units.nonzero().flatten().tolist() == [*range(24, 31), 623]
    assert refusal(codec, written(exponents, [0] * 7 + [593], [], [[0] * 8])) == "packet-payload"
    assert refusal(codec, written(exponents, [0] * 7 + [1 << 15], [], [[0] * 8], 11)) == "packet-payload"


def test_sizes_that_no_encoder_writes() -> None:
    """Small and large are said once per stretch where all picks are alike, and only where there are picks."""
    codec, zeros, gaps, signs = codec_of("topk-2bit-8"), [0] * 5, [0] * 8, [0] * 8
    exponents, here = [-1, 3, -1, -1, -1], [0, 1, 0, 0, 0]
    for shape, size in (([zeros, here], 8), ([here, zeros], 24)):
        assert added(codec, written(exponents, gaps, shape, [signs])).tolist()[24:32] == [size] * 8
    assert codec.open(written(exponents, gaps, [here, here], [signs, [0, 1] * 4]), RUGGED).largest_step == 24
    assert refusal(codec, written(exponents, gaps, [zeros, zeros], [signs])) == "packet-payload"
    assert refusal(codec, written(exponents, gaps, [here, [1] * 5], [signs, [0, 1] * 4])) == "packet-payload"
    for alike in ([0] * 8, [1] * 8):
        assert refusal(codec, written(exponents, gaps, [here, here], [signs, alike])) == "packet-payload"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(TAILS), st.data())
def test_whatever_is_accepted_has_its_one_spelling(name: str, tail: str, data: st.DataObject) -> None:
    """Payloads with changed bytes are refused, or are exactly what the second encoder writes for the delta they decode to."""
    codec = codec_of(name)
    payload = bytearray(codec.encode(displacement(seed=data.draw(st.integers(0, 3)), tail=tail), RUGGED, 0.5))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        units = added(codec, bytes(payload))
    except Refused as refused:
        assert refused.code in ("packet-payload", "packet-scale", "packet-truncated", "packet-oversized")
        return
    assert bytes(payload) == spelling(units, RUGGED, codec.two_sizes)


@given(st.sampled_from(NAMES), st.binary(max_size=400))
def test_garbage_is_refused(name: str, garbage: bytes) -> None:
    codec = codec_of(name)
    try:
        units = added(codec, garbage)
    except Refused as refused:
        assert refused.code in ("packet-payload", "packet-scale", "packet-truncated", "packet-oversized")
        return
    assert garbage == spelling(units, RUGGED, codec.two_sizes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite(name: str, bad: float) -> None:
    d = displacement()
    d[5000] = bad
    with pytest.raises(Refused) as caught:
        codec_of(name).encode(d, RUGGED, 0.5)
    assert caught.value.code == "not-finite"


# -- devices -------------------------------------------------------------------------------------------------------------


def test_the_triton_kernel_writes_the_same_bytes() -> None:
    """In Triton's interpreter, in a process of its own: the switch is read when a kernel is defined."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / part) for part in (".", "net", "kernels", "peers"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    script = str(Path(__file__).with_name("interpreted_codec_topk.py"))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["same"] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_every_device_writes_and_adds_the_same(name: str) -> None:
    codec = codec_of(name)
    for chunk in (RUGGED, *LAYOUT.chunks):
        d = displacement(chunk, tail="heavy")
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
