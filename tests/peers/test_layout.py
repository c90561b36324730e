"""Flat vector, chunks of whole rows, units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tscale_net.errors import Refused
from tscale_peers.layout import Layout, TensorSpec

shapes = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([8, 16, 64, 128])), min_size=1, max_size=8)


@given(shapes, st.integers(128, 2000))
def test_chunks_cover_the_vector_once_in_whole_rows(shapes: list[tuple[int, int]], chunk_params: int) -> None:
    specs = [TensorSpec(f"t{i}", rows, cols, -20 - i) for i, (rows, cols) in enumerate(shapes)]
    layout = Layout.build(specs, chunk_params)
    assert layout.size == sum(spec.size for spec in specs)
    assert [c.index for c in layout.chunks] == list(range(len(layout.chunks)))
    at = 0
    rows_of = {i: 0 for i in range(len(specs))}
    for chunk in layout.chunks:
        assert chunk.start == at and 0 < chunk.size <= chunk_params
        value = row = 0
        for s in chunk.segments:
            assert (s.start, s.row) == (value, row)
            assert s.first_row == rows_of[s.tensor] and s.cols == specs[s.tensor].cols and s.unit == 2.0**s.unit_exponent
            rows_of[s.tensor] += s.rows
            value, row = s.stop, row + s.rows
        assert (chunk.size, chunk.rows) == (value, row)
        at = chunk.stop
    assert at == layout.size and all(rows_of[i] == spec.rows for i, spec in enumerate(specs))


def test_views_are_the_tensors_in_order() -> None:
    specs = [TensorSpec("a", 2, 8, -20), TensorSpec("b", 3, 16, -20)]
    layout = Layout.build(specs, 64)
    flat = torch.arange(layout.size)
    views = layout.views(flat)
    assert views["b"].shape == (3, 16) and int(views["b"][0, 0]) == 16
    chunk = layout.chunks[0]
    assert torch.equal(torch.cat([s.matrix(chunk.of(flat)).reshape(-1) for s in chunk.segments]), chunk.of(flat))


@pytest.mark.parametrize(
    "spec", [TensorSpec("t", 0, 8, -20), TensorSpec("t", 3, 12, -20), TensorSpec("t", 3, 0, -20), TensorSpec("t", 1, 256, -20)]
)
def test_tensors_that_cannot_be_cut_are_refused_by_name(spec: TensorSpec) -> None:
    with pytest.raises(Refused, match="tensor t:") as caught:
        Layout.build([spec], 128)
    assert caught.value.code == "bad-layout"


def test_no_tensors_is_refused() -> None:
    with pytest.raises(Refused):
        Layout.build([], 128)


def test_no_chunk_holds_tensors_of_two_codecs() -> None:
    names = ["a", "b", "c", "d"]
    specs = [TensorSpec(name, 4, 16, -20) for name in names]
    one = Layout.build(specs, 1024)
    assert len(one.chunks) == 1 and Layout.build(specs, 1024, ["x"] * 4).chunks == one.chunks
    cut = Layout.build(specs, 1024, ["x", "x", "y", "x"])
    assert [sorted({s.tensor for s in chunk.segments}) for chunk in cut.chunks] == [[0, 1], [2], [3]]
    assert [chunk.index for chunk in cut.chunks] == [0, 1, 2]
    assert [(chunk.start, chunk.stop) for chunk in cut.chunks] == [(0, 128), (128, 192), (192, 256)]
    assert [s.row for chunk in cut.chunks for s in chunk.segments] == [0, 4, 0, 0]
    full = Layout.build(specs, 64, ["x", "y", "x", "x"])
    assert [chunk.size for chunk in full.chunks] == [64] * 4, "a chunk that is full anyway is not cut twice"
