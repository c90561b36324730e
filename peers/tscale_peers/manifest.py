"""The run manifest: what all peers of a run must agree on. Its hash names the run.

Enters: the fields, or their bytes from disk or from a stranger. Leaves: a checked, immutable manifest, its bytes and its 32-byte run id.
The encoding is MessagePack with sorted keys, so equal manifests have equal bytes; a joiner accepts the bytes only if their BLAKE3 hash is
the run id that the peer stated. The section `trainer` (model, data, optimizer) belongs to the room above and is opaque here.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import blake3
import msgspec

from tscale_net.errors import Refused
from tscale_net.limits import BULK_BODY_BYTES
from tscale_peers import limits as room_limits
from tscale_peers.codec import codec_fault, codec_named
from tscale_peers.layout import TENSOR_CLASSES, Layout, TensorSpec
from tscale_peers.packet import Terms

MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
"""A manifest lists every tensor (about 40 bytes each) and every data shard (about 100 bytes each)."""
MAX_PARAMETERS = 1 << 37
"""Half a terabyte of int32: larger is a lie or a mistake, refused before anything is allocated."""
UNIT_EXPONENT_RANGE = (-40, 0)
CHUNK_PARAMS_RANGE = (1 << 10, 1 << 21)
"""1 bit each: 128 B to 256 KiB. What the codec adds must still fit in a frame, which is checked packet by packet."""
MAX_CHUNKS = 1 << 16
"""1.5 billion weights make 1500. Each chunk is an object here, and a number per author stream."""
MAX_STREAM_CHUNKS = 1 << 28
"""Streams times chunks, 8 bytes each: 2 GiB of packet numbers at the very worst."""
MAX_TENSORS = 1 << 16
MAX_NAME_CHARACTERS = 64
MAX_TENSOR_NAME_CHARACTERS = 200
MAX_TRAINER_SECTIONS = 64
MAX_ADMIN_KEYS = 64
MAX_AVERAGE_WINDOW_S = 30 * 86400.0
MAX_AVERAGE_CUTS = 1024
"""Sums of so many basepoints fit 64 bits a billion times over; more cuts only cost time."""
MAX_COUNT = 1 << 53
"""Batches and steps: exact in JSON."""


_LATER_FIELDS: dict[str, Any] = {
    "codec_for": {},
    "spread": "auto",
    "sum_codec": "",
    "average_window_s": room_limits.average_window_s,
    "average_cuts": room_limits.average_cuts,
}
"""Fields younger than the first manifests, with their defaults: left out of the bytes where they have them, so that a run made before
keeps its id, and an older program refuses only runs that use them."""


class RuleSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The outer rule: publish with c = share_scale * share; what the author does with its own displacement and momentum.

    Sum rule (1-bit deltas, short intervals): own_leak = momentum_keep = "share". Averaging rule (long intervals, sparse deltas): both
    "one".
    Only share_scale changes what others see; measured safe up to 1 (8 diverges), and with
    own_leak "one" and top-k codecs better at 2.
    """

    share_scale: float = 1.0
    own_leak: Literal["share", "one"] = "share"
    momentum_keep: Literal["share", "one"] = "share"


class RunLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds that every receiver checks, the same for all."""

    max_coefficient: float = 1.0
    """Largest c in a packet."""
    max_streams: int = 4096
    """Author streams (one per home directory of a peer) that the applied set may hold."""
    displacement_max_age_batches: int = 2000
    """A returning peer drops its private displacement if the swarm has done more batches than this since."""


class RunManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. Construct, then `check()`; `decode` does both for bytes from outside."""

    name: str
    tensors: list[TensorSpec]
    start_hash: bytes
    """BLAKE3 basepoint hash of the start weights on the grid."""
    created_unix: float
    trainer: dict[str, Any]
    codec: str = "sign"
    chunk_params: int = 1 << 20
    publish_every_steps: int = 5
    budget_batches: int = 10_000
    rule: RuleSpec = RuleSpec()
    limits: RunLimits = RunLimits()
    admin_keys: list[bytes] = []
    """Ed25519 keys that may sign tombstones and certificates; never implied by being a seed."""
    codec_for: dict[str, str] = {}
    """Codecs by tensor class, where they differ from `codec`: names of layout.TENSOR_CLASSES to names of codecs."""
    sum_codec: str = ""
    """Codec of owners' sums, of tensors that `codec_for` does not name; empty: `codec`."""
    spread: Literal["auto", "flood", "owners"] = "auto"
    """How work reaches the others (spreading.py): packets to everybody ("flood"), contributions to the owners of chunks ("owners"), or the
    second as soon as there are enough peers."""
    average_window_s: float = room_limits.average_window_s
    """Time of one running average of the basepoint (average.py)."""
    average_cuts: int = room_limits.average_cuts
    """Basepoints in one average."""
    version: int = MANIFEST_VERSION

    def encode(self) -> bytes:
        """Canonical bytes: equal manifests give equal bytes."""
        fields = msgspec.structs.asdict(self)
        for name, default in _LATER_FIELDS.items():
            if fields[name] == default:
                del fields[name]
        return msgspec.msgpack.encode(fields, order="sorted")

    @property
    def run_id(self) -> bytes:
        """32 bytes that name the run."""
        return blake3.blake3(self.encode()).digest()

    def layout(self) -> Layout:
        """Where each tensor lies in the flat vector, and how that is cut into chunks."""
        return Layout.build(self.tensors, self.chunk_params, [self.codec_for.get(t.tensor_class, self.codec) for t in self.tensors])

    def terms(self) -> Terms:
        """What every packet of the run must satisfy. Raises Refused("packet-codec") if a codec is not known here."""
        codec_for = {tensor_class: codec_named(name) for tensor_class, name in self.codec_for.items()}
        sums = codec_named(self.sum_codec) if self.sum_codec else None
        return Terms(self.run_id, self.layout(), codec_named(self.codec), self.limits.max_coefficient, codec_for, sums)

    def check(self) -> RunManifest:
        """Return self, or raise Refused("bad-manifest") naming the field and the fix."""
        _check_version(self.version)
        for wrong, sentence in _faults(self):
            if wrong:
                raise Refused("bad-manifest", f"run manifest: {sentence}")
        self._check_packets()
        return self

    def _check_packets(self) -> None:
        """Every packet of the run must fit in one message. Only now is a layout built: its size is bounded."""
        largest = self.terms().max_packet_bytes
        if largest > BULK_BODY_BYTES:
            raise Refused(
                "bad-manifest",
                f"run manifest: packets of up to {largest} bytes do not fit in messages of {BULK_BODY_BYTES}; use a smaller chunk_params",
            )

    @staticmethod
    def decode(data: bytes, run_id: bytes | None = None) -> RunManifest:
        """Strict decoding. With `run_id`, the bytes must hash to it.

        Raises Refused("bad-manifest").
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise Refused("bad-manifest", f"run manifest: {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}")
        if run_id is not None and blake3.blake3(data).digest() != run_id:
            raise Refused("bad-manifest", "run manifest: its hash is not the run id that the peer stated; ask another peer")
        try:
            _check_version(msgspec.msgpack.decode(data, type=_Head).version)  # first: a newer one has fields that are not known here
            manifest = msgspec.msgpack.decode(data, type=RunManifest)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise Refused("bad-manifest", f"run manifest: {error}") from None
        if run_id is not None and manifest.encode() != data:
            raise Refused("bad-manifest", "run manifest: not in canonical form")
        return manifest.check()


class _Head(msgspec.Struct, frozen=True):
    """What every version of a manifest states; other fields are not looked at."""

    version: int = MANIFEST_VERSION


def _check_version(version: int) -> None:
    if version != MANIFEST_VERSION:
        sentence = f"version {version} is not spoken here but {MANIFEST_VERSION}; update the older side"
        raise Refused("bad-manifest", f"run manifest: {sentence}")


def _faults(m: RunManifest) -> list[tuple[bool, str]]:
    low, high = UNIT_EXPONENT_RANGE
    least, most = CHUNK_PARAMS_RANGE
    shapes_ok = all(t.rows > 0 and t.cols > 0 and t.cols % 8 == 0 and t.cols <= m.chunk_params for t in m.tensors)
    total = sum(t.rows * t.cols for t in m.tensors) if shapes_ok else 0
    chunks = sum(-(-t.rows // (m.chunk_params // t.cols)) for t in m.tensors) if shapes_ok else 0
    return [
        (not _is_name(m.name, MAX_NAME_CHARACTERS), f"name must be 1 to {MAX_NAME_CHARACTERS} printable characters"),
        (not m.tensors, "lists no tensors"),
        (len(m.tensors) > MAX_TENSORS, f"lists more than {MAX_TENSORS} tensors"),
        (
            not all(_is_name(t.name, MAX_TENSOR_NAME_CHARACTERS) for t in m.tensors),
            f"tensor names must be 1 to {MAX_TENSOR_NAME_CHARACTERS} printable characters",
        ),
        (not shapes_ok, "every tensor needs rows > 0 and columns that are a multiple of 8 and fit in one chunk"),
        (total > MAX_PARAMETERS, f"{total} parameters are more than {MAX_PARAMETERS}"),
        (chunks > MAX_CHUNKS, f"{chunks} chunks are more than {MAX_CHUNKS}; use a larger chunk_params"),
        (len({t.name for t in m.tensors}) != len(m.tensors), "two tensors have one name"),
        (any(not low <= t.unit_exponent <= high for t in m.tensors), f"unit exponents must lie in {low}..{high}"),
        (not least <= m.chunk_params <= most, f"chunk_params must lie in {least}..{most}"),
        *_codec_faults(m),
        (len(m.start_hash) != 32, "start_hash must be 32 bytes"),
        (not math.isfinite(m.created_unix), "created_unix must be a number"),
        (not 1 <= m.publish_every_steps <= MAX_COUNT, "publish_every_steps must be at least 1"),
        (not 1 <= m.budget_batches <= MAX_COUNT, "budget_batches must be at least 1"),
        (not _within(m.average_window_s, 0.0, MAX_AVERAGE_WINDOW_S), f"average_window_s must lie in (0, {MAX_AVERAGE_WINDOW_S:.0f}]"),
        (not 1 <= m.average_cuts <= MAX_AVERAGE_CUTS, f"average_cuts must lie in 1..{MAX_AVERAGE_CUTS}"),
        (
            not _within(m.rule.share_scale, 0.0, 2.0 if m.rule.own_leak == "one" else 1.0),
            'rule.share_scale must lie in (0, 1], or in (0, 2] with own_leak = "one": above it the swarm diverges',
        ),
        (not _within(m.limits.max_coefficient, 0.0, 1.0), "limits.max_coefficient must lie in (0, 1]: no author leaks more than all"),
        (not 1 <= m.limits.max_streams <= 1 << 16, "limits.max_streams must lie in 1..65536"),
        (
            m.limits.max_streams * chunks > MAX_STREAM_CHUNKS,
            f"limits.max_streams times {chunks} chunks is more than {MAX_STREAM_CHUNKS}; allow fewer streams or use a larger chunk_params",
        ),
        (
            not 0 <= m.limits.displacement_max_age_batches <= MAX_COUNT,
            "limits.displacement_max_age_batches must be a number of batches, 0 or more",
        ),
        (len(m.trainer) > MAX_TRAINER_SECTIONS, f"trainer has more than {MAX_TRAINER_SECTIONS} sections"),
        (
            len(m.admin_keys) > MAX_ADMIN_KEYS or any(len(key) != 32 for key in m.admin_keys),
            f"admin_keys must be at most {MAX_ADMIN_KEYS} Ed25519 keys of 32 bytes",
        ),
    ]


def _codec_faults(m: RunManifest) -> list[tuple[bool, str]]:
    unknown = [tensor_class for tensor_class in m.codec_for if tensor_class not in TENSOR_CLASSES]
    if unknown:
        return [(True, f"codec_for: {unknown[0][:32]!r} is no tensor class; there are {', '.join(TENSOR_CLASSES)}")]
    faults = [codec_fault(name) for name in (m.codec, *m.codec_for.values(), *([m.sum_codec] if m.sum_codec else []))]
    return [
        *((fault is not None, fault or "") for fault in faults),
        (m.codec in m.codec_for.values(), f"codec_for names {m.codec!r}, which all tensors have anyway; leave that class out"),
    ]


def _is_name(text: str, most: int) -> bool:
    return 1 <= len(text) <= most and text.isprintable()


def _within(value: float, above: float, most: float) -> bool:
    return math.isfinite(value) and above < value <= most
