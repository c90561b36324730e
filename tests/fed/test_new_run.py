"""How a new run's weights are cut into chunks."""

from __future__ import annotations

import pytest

from tscale_fed.new_run import LARGEST_CHUNK, USUAL_CHUNK, with_chunks
from tscale_net.errors import Refused
from tscale_peers.layout import TensorSpec
from tscale_peers.manifest import RunManifest

LARGE = [TensorSpec(f"layers.{i}.ffn_up", 1 << 15, 1280, -22) for i in range(16)]
SMALL = [TensorSpec("layers.0.ffn_up", 1 << 12, 256, -22)]


def manifest(tensors: list[TensorSpec], **options: object) -> RunManifest:
    values: dict[str, object] = {"name": "chunks", "tensors": tensors, "start_hash": bytes(32), "created_unix": 0.0, "trainer": {}}
    return RunManifest(**{**values, "admin_keys": [bytes(32)], **options})  # type: ignore[arg-type]


def test_large_models_get_the_largest_chunks() -> None:
    assert with_chunks(manifest(LARGE), 0).chunk_params == LARGEST_CHUNK
    assert with_chunks(manifest(SMALL), 0).chunk_params == USUAL_CHUNK


@pytest.mark.parametrize("codec", ["int8", "exact"])
def test_chunks_shrink_until_a_packet_of_the_codec_fits(codec: str) -> None:
    chosen = with_chunks(manifest(LARGE, codec=codec), 0).chunk_params
    assert chosen < LARGEST_CHUNK
    with pytest.raises(Refused, match="do not fit"):
        with_chunks(manifest(LARGE, codec=codec), 2 * chosen)


def test_what_is_asked_for_is_kept_or_refused() -> None:
    assert with_chunks(manifest(SMALL), 4096).chunk_params == 4096
    with pytest.raises(Refused, match="do not fit"):
        with_chunks(manifest(LARGE, codec="exact"), 1 << 20)


def test_a_fault_of_another_kind_is_told_as_it_is() -> None:
    with pytest.raises(Refused, match="no-such"):
        with_chunks(manifest(SMALL, codec="no-such"), 0)
    with pytest.raises(Refused, match="name must be"):
        with_chunks(manifest(SMALL, name=""), 0)
