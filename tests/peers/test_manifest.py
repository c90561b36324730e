"""The manifest: equal content gives equal bytes and one run id; lies and mistakes are refused with the field named."""

from __future__ import annotations

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tscale_net.errors import Refused
from tscale_net.limits import BULK_BODY_BYTES
from tscale_peers.assembly import RunTerms
from tscale_peers.layout import TensorSpec
from tscale_peers.manifest import MAX_MANIFEST_BYTES, RuleSpec, RunLimits, RunManifest


def make(**changes: object) -> RunManifest:
    base = RunManifest(
        name="demo",
        tensors=[TensorSpec("embedding", 10, 128, -22), TensorSpec("final", 9, 128, -22)],
        start_hash=b"h" * 32,
        created_unix=1.5,
        trainer={"model": {"dims": "e128h1d2w64"}, "seed": 7, "b": 1, "a": [1, 2.5, None, True]},
        chunk_params=1 << 12,
    )
    return msgspec.structs.replace(base, **changes)


def test_round_trip_and_run_id() -> None:
    manifest = make()
    assert RunManifest.decode(manifest.encode(), manifest.run_id) == manifest
    reordered = make(trainer={"b": 1, "seed": 7, "a": [1, 2.5, None, True], "model": {"dims": "e128h1d2w64"}})
    assert reordered.run_id == manifest.run_id
    assert make(budget_batches=10_001).run_id != manifest.run_id


def test_bytes_of_another_run_are_refused() -> None:
    with pytest.raises(Refused) as refusal:
        RunManifest.decode(make().encode(), make(name="other").run_id)
    assert refusal.value.code == "bad-manifest" and "run id" in refusal.value.detail


def test_a_newer_manifest_is_refused_for_its_version_whatever_else_is_in_it() -> None:
    plain = {**msgspec.msgpack.decode(make().encode()), "version": 2, "a_later_field": {"x": 1}, "limits": "of another form"}
    data = msgspec.msgpack.encode(plain)
    with pytest.raises(Refused, match="version 2 is not spoken here"):
        RunManifest.decode(data, blake3(data).digest())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"version": 2}, "version 2"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"tensors": []}, "no tensors"),
        ({"tensors": [TensorSpec("a", 1, 12, -22)]}, "multiple of 8"),
        ({"tensors": [TensorSpec("a", 0, 128, -22)]}, "rows"),
        ({"tensors": [TensorSpec("a", 1 << 35, 128, -22)]}, "parameters"),
        ({"tensors": [TensorSpec("a", 1, 8192, -22)]}, "fit in one chunk"),
        ({"tensors": [TensorSpec("a", 1, 128, -22), TensorSpec("a", 1, 128, -22)]}, "one name"),
        ({"tensors": [TensorSpec("a", 1, 128, 3)]}, "unit exponents"),
        ({"chunk_params": 1 << 22}, "chunk_params"),
        ({"start_hash": b"x"}, "start_hash"),
        ({"rule": RuleSpec(share_scale=1.5)}, "share_scale"),
        ({"rule": RuleSpec(share_scale=2.5, own_leak="one", momentum_keep="one")}, "share_scale"),
        ({"publish_every_steps": 0}, "publish_every_steps"),
        ({"sum_codec": "none"}, "codec"),
        ({"budget_batches": 0}, "budget_batches"),
        ({"rule": RuleSpec(share_scale=float("nan"))}, "share_scale"),
        ({"admin_keys": [b"short"]}, "admin_keys"),
        ({"admin_keys": [b"k" * 32] * 65}, "admin_keys"),
        ({"tensors": [TensorSpec("\x1b[2J", 1, 128, -22)]}, "tensor names"),
        ({"tensors": [TensorSpec("a" * 201, 1, 128, -22)]}, "tensor names"),
        ({"tensors": [TensorSpec("a", 1 << 22, 128, -22)], "chunk_params": 1 << 10}, "chunks are more"),
        ({"limits": RunLimits(max_streams=1 << 16), "tensors": [TensorSpec("a", 1 << 18, 128, -22)]}, "allow fewer streams"),
        ({"limits": RunLimits(displacement_max_age_batches=-1)}, "displacement_max_age_batches"),
        ({"budget_batches": 1 << 60}, "budget_batches"),
        ({"created_unix": float("inf")}, "created_unix"),
        ({"codec": "gzip" * 1000}, "codec 'gzip"),
        ({"codec_for": {"final": "gzip"}}, "codec 'gzip"),
        ({"codec_for": {"head": "exact"}}, "'head' is no tensor class; there are embedding, final, matrix"),
        ({"codec_for": {"final": "sign"}}, "leave that class out"),
        ({"trainer": {str(n): n for n in range(65)}}, "trainer"),
        ({"codec": "exact", "chunk_params": 1 << 20, "tensors": [TensorSpec("a", 1 << 13, 128, -22)]}, "do not fit"),
        ({"chunk_params": 1 << 21, "tensors": [TensorSpec("narrow", 1 << 18, 8, -22)]}, "do not fit"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, object], word: str) -> None:
    with pytest.raises(Refused) as refusal:
        RunManifest.decode(make(**changes).encode())
    assert word in refusal.value.detail


def test_the_largest_chunk_of_signs_fits_in_a_frame() -> None:
    manifest = RunManifest.decode(make(chunk_params=1 << 21, tensors=[TensorSpec("a", 1 << 15, 128, -22)]).encode())
    assert RunTerms.of(manifest).terms.max_packet_bytes <= BULK_BODY_BYTES


def test_each_tensor_class_has_its_codec() -> None:
    manifest = make(codec_for={"final": "exact"})
    terms = RunTerms.of(RunManifest.decode(manifest.encode(), manifest.run_id)).terms
    assert [terms.codec_of(chunk).name for chunk in terms.layout.chunks] == ["sign", "exact"]
    assert terms.max_packet_bytes > 9 * 128 * 4


def test_a_field_that_older_runs_lack_is_spelt_only_where_it_is_used() -> None:
    raw = make().encode()
    assert b"codec_for" not in raw and b"codec_for" in make(codec_for={"final": "exact"}).encode()
    spelt_out = msgspec.msgpack.encode(msgspec.structs.asdict(make()), order="sorted")
    with pytest.raises(Refused, match="canonical"):
        RunManifest.decode(spelt_out, blake3(spelt_out).digest())


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(Refused):
        RunManifest.decode(data)


@given(st.data())
def test_any_changed_byte_is_refused_against_the_run_id(data: st.DataObject) -> None:
    manifest = make()
    raw = bytearray(manifest.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Refused):
        RunManifest.decode(bytes(raw), manifest.run_id)


def test_oversized_is_refused_before_decoding() -> None:
    with pytest.raises(Refused) as refusal:
        RunManifest.decode(b"\x00" * (MAX_MANIFEST_BYTES + 1))
    assert "limit" in refusal.value.detail
