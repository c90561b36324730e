"""Codec lowrank: shapes that are factored, contraction and drain whatever the directions, spellings that no encoder writes, replicas."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers.core_kit import RUN, author, new_exchange, opened
from tscale_kernels import delta_lowrank
from tscale_kernels.limits import max_step
from tscale_net.errors import Refused
from tscale_peers.codec import codec_named
from tscale_peers.codec_contract import CodecMemory
from tscale_peers.codec_grid import INT8
from tscale_peers.codec_lowrank import LowRankCodec
from tscale_peers.layout import Chunk, Layout, TensorSpec
from tscale_peers.packet import Terms

RANK = 2
CODEC = LowRankCodec("lowrank-2", RANK)
SPECS = (TensorSpec("vector", 1, 24, -20), TensorSpec("tall", 48, 32, -21), TensorSpec("few", 3, 64, -18), TensorSpec("wide", 40, 128, -22))
CHUNK = Layout.build(SPECS, 1 << 14).chunks[0]
"""vector and few are not factored. wide has two stretches."""
SQUARE = Layout.build((TensorSpec("square", 64, 64, -22),), 1 << 14).chunks[0]
FACTOR_BYTES = 2 + RANK * (48 + 32 + 40 + 128)
GRID_BYTES = INT8.payload_bytes([CHUNK.segments[0], CHUNK.segments[2]])


def displacement(chunk: Chunk = CHUNK, seed: int = 0, size: float = 1e-3) -> torch.Tensor:
    return torch.randn(chunk.size, generator=torch.Generator().manual_seed(seed)).mul_(size)


def published(d: torch.Tensor, chunk: Chunk, coefficient: float, memory: CodecMemory | None = None) -> int:
    """One publication of the sum rule: d gives up c*q. Returns the bytes."""
    payload = CODEC.encode(d, chunk, coefficient, memory)
    CODEC.open(payload, chunk).take_from(d)
    return len(payload)


# -- shapes and sizes --------------------------------------------------------------------------------------------------


def test_the_shape_alone_decides_what_is_factored() -> None:
    assert [CODEC.is_factored(s) for s in CHUNK.segments] == [False, True, False, True]
    grid = Layout.build(SPECS[:1], 1 << 14).chunks[0]
    assert CODEC.encode(displacement(grid), grid, 0.5) == codec_named("int8").encode(displacement(grid), grid, 0.5)


def test_payloads_stay_within_their_bound() -> None:
    for seed in range(5):
        assert len(CODEC.encode(displacement(seed=seed), CHUNK, 0.5)) <= CODEC.max_payload_bytes(CHUNK)
    assert len(CODEC.encode(torch.zeros(CHUNK.size), CHUNK, 0.5)) < CODEC.max_payload_bytes(CHUNK)


def test_bytes_per_value_of_a_wide_matrix() -> None:
    chunk = Layout.build((TensorSpec("matrix", 800, 1280, -22),), 1 << 20).chunks[0]
    assert codec_named("lowrank").max_payload_bytes(chunk) < 0.034 * chunk.size


def test_a_displacement_of_zeros_moves_nothing() -> None:
    delta = CODEC.open(CODEC.encode(torch.zeros(CHUNK.size), CHUNK, 0.5), CHUNK)
    moved = torch.zeros(CHUNK.size, dtype=torch.int32)
    delta.add_to(moved)
    assert delta.largest_step == 0 and not moved.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("segment", range(4))
def test_weights_that_are_not_finite_make_no_packet(bad: float, segment: int) -> None:
    d = displacement()
    d[CHUNK.segments[segment].start + 5] = bad
    memory = CodecMemory()
    with pytest.raises(Refused) as caught:
        CODEC.encode(d, CHUNK, 0.5, memory)
    assert caught.value.code == "not-finite"
    assert all(bool(torch.isfinite(warm).all()) for warm in memory.tensors.values())


# -- arithmetic --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0.02, 1.0), st.sampled_from([1e-7, 1e-4, 1e-2, 10.0, 1e12]))
def test_a_publication_never_makes_the_displacement_larger(seed: int, coefficient: float, size: float) -> None:
    d = displacement(seed=seed, size=size).double()
    delta = CODEC.open(CODEC.encode(d, CHUNK, coefficient), CHUNK)
    assert delta.largest_step <= 2 * max_step
    for s in CHUNK.segments:
        left = d.clone()
        delta.take_from(left, coefficient)
        rounding = 0.5 * s.unit / coefficient * (s.rows * s.cols) ** 0.5
        assert s.matrix(left).norm() <= s.matrix(d).norm() * (1 + 1e-6) + rounding


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0.02, 1.0))
def test_receivers_gain_what_the_author_gives_up_and_it_can_be_taken_back(seed: int, coefficient: float) -> None:
    delta = CODEC.open(CODEC.encode(displacement(seed=seed), CHUNK, coefficient), CHUNK)
    start = torch.arange(CHUNK.size, dtype=torch.int32)
    got = start.clone()
    delta.add_to(got)
    gained = got - start
    assert 0 < int(gained.abs().max()) <= delta.largest_step
    lost = torch.zeros(CHUNK.size, dtype=torch.float64)
    delta.take_from(lost)
    for s in CHUNK.segments:
        assert torch.equal(-lost[s.start : s.stop], gained[s.start : s.stop].double() * s.unit)
    delta.add_to(got, sign=-1)
    assert torch.equal(got, start)


def test_decoding_is_integer_arithmetic() -> None:
    """The payload, decoded by hand."""
    payload = CODEC.encode(displacement(), CHUNK, 0.5)
    got = torch.zeros(CHUNK.size, dtype=torch.int32)
    delta = CODEC.open(payload, CHUNK)
    for part in delta.parts[1:2]:
        part.add_to(got)
    factors = np.frombuffer(payload[2:FACTOR_BYTES], dtype=np.int8).astype(np.int64)
    at = 0
    for number, s in enumerate((CHUNK.segments[1], CHUNK.segments[3])):
        p, q = factors[at : at + RANK * s.rows].reshape(s.rows, RANK), factors[at + RANK * s.rows :][: RANK * s.cols].reshape(s.cols, RANK)
        at += RANK * (s.rows + s.cols)
        exponent = int(np.frombuffer(payload[number : number + 1], dtype=np.int8)[0])
        total = p @ q.T
        want = total << exponent if exponent >= 0 else (total + (1 << (-exponent - 1))) >> -exponent
        assert np.abs(want).max() > 0 and np.array_equal(s.matrix(got).numpy(), want)


# -- no direction is lost ----------------------------------------------------------------------------------------------


def flat_spectrum() -> torch.Tensor:
    """All 64 singular values and all magnitudes equal (Hadamard): the worst case for few directions and for the largest values."""
    signs = torch.ones(1, 1)
    while len(signs) < 64:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs.reshape(-1) * 1e-3


def beside_the_start() -> torch.Tensor:
    """Rows orthogonal to every direction that the iteration starts from: its first projection is rounding alone."""
    basis = torch.linalg.qr(delta_lowrank.start(64, RANK)).Q
    d = displacement(SQUARE, 3).view(64, 64)
    return (d - (d @ basis) @ basis.T).reshape(-1)


def two_large_directions() -> torch.Tensor:
    """Two directions a hundred times above the rest, which a codec of two directions alone would send for ever."""
    g = torch.Generator().manual_seed(4)
    large = torch.randn(64, 2, generator=g) @ torch.randn(2, 64, generator=g)
    return (large * 1e-1).reshape(-1) + displacement(SQUARE, 5)


def one_value() -> torch.Tensor:
    d = torch.zeros(64 * 64)
    d[1234] = -3e-3
    return d


@pytest.mark.parametrize("make", [flat_spectrum, beside_the_start, two_large_directions, one_value])
@pytest.mark.parametrize("with_memory", [True, False], ids=["memory", "memory lost"])
def test_a_constant_displacement_drains_whatever_its_directions(make: Callable[[], torch.Tensor], with_memory: bool) -> None:
    """Also if the memory is lost at every publication. The payload is small (0.08 bytes a value), so it takes many."""
    d, memory = make(), CodecMemory()
    sizes = [float(d.norm())]
    for _ in range(70):
        published(d, SQUARE, 1.0, memory if with_memory else None)
        sizes.append(float(d.norm()))
    floor = 2 * SQUARE.segments[0].unit * SQUARE.size**0.5
    assert sizes[-1] <= 0.02 * sizes[0] + floor
    assert all(after <= before + floor for before, after in zip(sizes, sizes[1:], strict=False))


def test_what_two_directions_never_send_goes_with_the_largest_values() -> None:
    """Refilled in two directions at every interval, d keeps the rest of what it was only if nothing but factors is sent."""
    g = torch.Generator().manual_seed(7)
    refill = (torch.randn(64, 2, generator=g) @ torch.randn(2, 64, generator=g)).reshape(-1) * 1e-2
    rest = displacement(SQUARE, 8)
    with_values, factors_alone, memory, warm = rest.clone(), rest.clone(), CodecMemory(), delta_lowrank.start(64, RANK)
    s = SQUARE.segments[0]
    for _ in range(60):
        with_values += refill
        factors_alone += refill
        published(with_values, SQUARE, 1.0, memory)
        delta_lowrank.leak(s.matrix(factors_alone), *delta_lowrank.encode(s.matrix(factors_alone), 1.0, s.unit_exponent, warm), s.unit)
    assert float(factors_alone.norm()) > 0.8 * float(rest.norm())
    assert float(with_values.norm()) < 0.4 * float(rest.norm())


def test_the_memory_makes_later_publications_better() -> None:
    g = torch.Generator().manual_seed(9)
    spectrum = 0.9 ** torch.arange(64)
    d = ((torch.randn(64, 64, generator=g) * spectrum) @ torch.randn(64, 64, generator=g)).reshape(-1) * 1e-3
    memory = CodecMemory()

    def left(memory: CodecMemory | None) -> float:
        after = d.clone()
        CODEC.open(CODEC.encode(d, SQUARE, 1.0, memory), SQUARE).take_from(after)
        return float(after.norm())

    for _ in range(6):
        remembered = left(memory)
    assert remembered < left(None)


def test_a_memory_of_another_shape_is_not_used() -> None:
    memory = CodecMemory({0: torch.ones(3, 3)})
    assert CODEC.encode(displacement(), CHUNK, 0.5, memory) == CODEC.encode(displacement(), CHUNK, 0.5)


# -- spellings ---------------------------------------------------------------------------------------------------------


def refusal(payload: bytes) -> str:
    with pytest.raises(Refused) as caught:
        CODEC.open(payload, CHUNK)
    return caught.value.code


def changed(change: dict[int, int]) -> bytes:
    payload = bytearray(CODEC.encode(displacement(), CHUNK, 0.5))
    for place, byte in change.items():
        payload[place] = byte % 256
    return bytes(payload)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("packet-payload", {0: 10}),  # exponents above and below the range
        ("packet-payload", {1: -25}),
        ("packet-payload", {5: 0x80}),  # a factor that is no code
        ("packet-payload", {2 + at: 0 for at in range(RANK * 48)}),  # P of zeros beside Q that is not
        ("packet-payload", {2 + at: 0 for at in range(RANK * 80)}),  # a product of zeros whose exponent is not 0
        ("packet-scale", {FACTOR_BYTES: 0xFF, FACTOR_BYTES + 1: 0xFF}),  # parts of other codecs: a step
        ("packet-payload", {FACTOR_BYTES + GRID_BYTES: 0xFF}),  # ... and a Rice parameter
    ],
)
def test_what_no_encoder_writes_is_refused(code: str, change: dict[int, int]) -> None:
    assert refusal(changed(change)) == code


def test_products_above_the_largest_step_are_refused() -> None:
    codec = LowRankCodec("lowrank-4", 4)
    payload = bytearray(codec.encode(displacement(SQUARE), SQUARE, 0.5))
    payload[: 1 + 4 * 128] = bytes([8]) + bytes([127]) * (4 * 128)
    assert codec.open(bytes(payload), SQUARE).largest_step > max_step // 2
    payload[0] = 9
    with pytest.raises(Refused) as caught:
        codec.open(bytes(payload), SQUARE)
    assert caught.value.code == "packet-scale"


def test_payloads_of_another_size_are_refused() -> None:
    payload = CODEC.encode(displacement(), CHUNK, 0.5)
    for size in (0, 1, FACTOR_BYTES - 1, FACTOR_BYTES + GRID_BYTES - 1, FACTOR_BYTES + GRID_BYTES, len(payload) - 1):
        assert refusal(payload[:size]) == "packet-truncated"
    assert refusal(payload + b"\1") == "packet-oversized"
    assert refusal(payload + bytes(CODEC.max_payload_bytes(CHUNK))) == "packet-oversized"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 3000), st.integers(0, 255))
def test_anything_else_is_refused_or_decoded_within_bounds(noise: bytes, place: int, byte: int) -> None:
    whole = changed({})
    for payload in (noise, whole[: place % len(whole)] + noise, changed({place % len(whole): byte})):
        try:
            delta = CODEC.open(payload, CHUNK)
        except Refused:
            continue
        assert delta.largest_step <= 2 * max_step


# -- a run that uses them ----------------------------------------------------------------------------------------------

MODEL = (
    TensorSpec("embedding", 24, 32, -20),
    TensorSpec("layer", 48, 32, -22),
    TensorSpec("scale", 1, 32, -20),
    TensorSpec("final", 24, 32, -20),
)
CODECS_OF_RUNS = [
    ("int8", {}),
    ("int4", {}),
    ("lowrank-2", {}),
    ("lowrank-2", {"embedding": "int8"}),
    ("lowrank-2", {"embedding": "int8", "final": "int4"}),
]


def terms_of(codec: str, codec_for: dict[str, str]) -> Terms:
    names = [codec_for.get(spec.tensor_class, codec) for spec in MODEL]
    layout = Layout.build(MODEL, 1536, names)
    return Terms(RUN, layout, codec_named(codec), codec_for={of: codec_named(name) for of, name in codec_for.items()})


@pytest.mark.parametrize(
    ("codec", "codec_for"), CODECS_OF_RUNS, ids=lambda value: value if isinstance(value, str) else "+".join(value) or "all"
)
def test_replicas_of_a_run_are_equal_in_any_order(codec: str, codec_for: dict[str, str]) -> None:
    """Three authors train and publish; each receives the others' packets in an order of its own: the same bits, weights that follow."""
    terms = terms_of(codec, codec_for)
    exchanges = [new_exchange(number, t=terms) for number in range(1, 4)]
    generator = torch.Generator().manual_seed(2)
    for step in range(1, 5):
        bodies = []
        for exchange in exchanges:
            exchange.weights.add_(torch.randn(exchange.weights.shape, generator=generator) * 1e-3)
            exchange.mark_trained()
            bodies += exchange.publish(step, 1 / 3).packets
        for number, exchange in enumerate(exchanges):
            order = torch.randperm(len(bodies), generator=torch.Generator().manual_seed(10 * step + number)).tolist()
            receipts = exchange.receive(opened([bodies[at] for at in order], terms))
            assert {receipt.outcome for receipt in receipts} == {"applied", "duplicate"}
    assert len({exchange.replica.state() for exchange in exchanges}) == 1
    used = {packet.header.codec for packet in opened(bodies, terms)}
    assert used == {codec, *codec_for.values()}
    assert author(1).public_key in {packet.header.author for packet in opened(bodies, terms)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_device_adds_the_same() -> None:
    """An encoder of another device may find other factors; what it wrote is the same everywhere."""
    for payload in (CODEC.encode(displacement(), CHUNK, 0.37), CODEC.encode(displacement().cuda(), CHUNK, 0.37)):
        here, there = CODEC.open(payload, CHUNK), CODEC.open(payload, CHUNK)
        b, left = torch.arange(CHUNK.size, dtype=torch.int32), displacement()
        b_there, left_there = b.cuda(), left.cuda()
        here.add_to(b)
        here.take_from(left, 0.37)
        there.add_to(b_there)
        there.take_from(left_there, 0.37)
        assert torch.equal(b_there.cpu(), b)
        assert torch.equal(left_there.cpu(), left)
