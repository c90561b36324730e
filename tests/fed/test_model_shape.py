"""Shapes: dims strings, layers, matrices, and the parameter counts that are published for TScale models."""

import pytest

from tscale_fed.model.shape import ModelShape, ShapeError


@pytest.mark.parametrize(
    ("dims", "noise_rows", "millions"),
    [
        ("e512h3d50w1024", 32, 149.835),
        ("e1280h20d42w1024", 32, 1505.0),
        ("e1536h12d60w1024", 32, 1570.1),
    ],
)
def test_parameter_counts_are_the_published_ones(dims: str, noise_rows: int, millions: float) -> None:
    shape = ModelShape.parse(dims, vocab=50258, noise_rows=noise_rows)
    assert shape.parameters / 1e6 == pytest.approx(millions, abs=0.0005 if millions < 1000 else 0.06)
    width, heads_width, depth = shape.width, shape.heads_width, len(shape.layers())
    formula = depth * width * heads_width * 10 + width * shape.embedding_rows + width * 50258 + 50258
    assert shape.parameters == formula


@pytest.mark.parametrize(
    ("depth", "previous", "local", "wide"), [(50, 8, 21, 21), (42, 6, 18, 18), (60, 10, 25, 25), (4, 2, 1, 1), (3, 2, 1, 1), (2, 2, 0, 0)]
)
def test_layers_by_width(depth: int, previous: int, local: int, wide: int) -> None:
    layers = ModelShape.parse(f"e128d{depth}w512", vocab=10).layers()
    assert layers == [(1, 0.0)] * previous + [(64, 0.5), (512, 0.0)] * local
    assert len(layers) == previous + local + wide


def test_depth_one_is_one_wide_layer_with_a_slope() -> None:
    assert ModelShape.parse("e128d1w256", vocab=10).layers() == [(256, 0.1)]


def test_defaults_and_order_of_letters() -> None:
    assert ModelShape.parse("", vocab=10) == ModelShape.parse("d60w64relu1h1e256", vocab=10)
    assert ModelShape.parse("e256h2d36w256", vocab=10).dims == "e256h2d36w256relu1"
    assert ModelShape.parse("relu3h2e256", vocab=5, noise_rows=2).ffn_width == 3 * 2 * 128


def test_matrices_in_canonical_order() -> None:
    shape = ModelShape.parse("e256h2d2relu3", vocab=11, noise_rows=5)
    assert shape.tensors()[:9] == [
        ("embedding", 17, 256),
        ("final", 11, 256),
        ("layers.0.query", 256, 256),
        ("layers.0.key", 256, 256),
        ("layers.0.gate", 256, 256),
        ("layers.0.value", 256, 256),
        ("layers.0.combiner", 256, 1024),
        ("layers.0.ffn_up", 768, 256),
        ("layers.0.ffn_down", 256, 768),
    ]
    assert all(columns % 128 == 0 for _, _, columns in shape.tensors())


@pytest.mark.parametrize(
    ("dims", "word"),
    [
        ("e512tt128d39", "'tt'"),
        ("e100", "e128"),
        ("e256e256", "twice"),
        ("e256d", "'d'"),
        ("256", "'256'"),
        ("d0", "d0"),
        ("h-2", "'h-2'"),
        ("e1.5", "'.5'"),
        ("d" + "9" * 5000, "out of range"),
        ("E256", "'E256'"),
    ],
)
def test_bad_dims_are_refused_in_one_sentence(dims: str, word: str) -> None:
    with pytest.raises(ShapeError) as refused:
        ModelShape.parse(dims, vocab=10)
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bad_vocabulary_and_noise_rows_are_refused() -> None:
    with pytest.raises(ShapeError, match="vocabulary"):
        ModelShape.parse("e128", vocab=0)
    with pytest.raises(ShapeError, match="noise"):
        ModelShape.parse("e128", vocab=10, noise_rows=-1)
