"""The original TScale's checkpoint (eden_gpt_*.bin): enters a path, leaves its shape and where each matrix lies.

Layout, little-endian, without magic, version or checksum: model description; i64 layers, each i64 7 and seven matrices; i64 2, embedding
and final; output bias. A matrix is weights and momentum (each i64 inputs, i64 outputs, float32 rows), float32 sum of weights, a vector of
row dispersions (one, or one per row). A vector is i64 count and its items. The file is walked by its lengths: each is compared with what
the shape and the file's size allow before anything is read, so a cut or foreign file is named without taking memory.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tscale_net.errors import Refused

LAYER_MATRICES = ("query", "key", "gate", "value", "combiner", "ffn_up", "ffn_down")
END_MATRICES = ("embedding", "final")
MOST_LAYERS = 10_000
MOST_WIDTHS = 64
FLOAT_BYTES = 4
_KIND_BYTES = 16
"""One entry of the list of layers: float32 slope, 4 bytes of padding, i64 index into the widths."""
_DESCRIPTION = struct.Struct("<4qi2q")


class BadOriginal(Refused):
    """The file cannot be used; one sentence."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__("bad-checkpoint", f"{path}: not a whole eden_gpt_*.bin checkpoint of TScale: {why}")


@dataclass(frozen=True)
class MatrixPlace:
    """Where the float32 weights [rows, columns] of a matrix lie in the file."""

    name: str
    offset_bytes: int
    rows: int
    columns: int


@dataclass(frozen=True)
class OriginalCheckpoint:
    """What a checkpoint says about itself."""

    width: int
    heads: int
    ffn_multiple: int
    labels: int
    vocab: int
    layers: tuple[tuple[int, float], ...]
    """(attention width in tokens, slope) of each layer"""
    flags: int
    fragment_tokens: int
    matrices: tuple[MatrixPlace, ...]
    bias_offset_bytes: int

    @property
    def parameters(self) -> int:
        """All matrices and the output bias."""
        return sum(place.rows * place.columns for place in self.matrices) + self.vocab


def read_original(path: Path) -> OriginalCheckpoint:
    """Walk the file. Raises BadOriginal, or OSError when it cannot be opened."""
    with path.open("rb") as file:
        return _Walk(path, file, os.fstat(file.fileno()).st_size).checkpoint()


class _Walk:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size, self._at = path, file, size, 0

    def checkpoint(self) -> OriginalCheckpoint:
        width, _, _, heads, multiple, labels, vocab = _DESCRIPTION.unpack(self._take(_DESCRIPTION.size))
        if not (0 < width <= self._size and 0 < heads <= self._size and 0 < multiple <= self._size and 0 < vocab < labels <= self._size):
            raise BadOriginal(self._path, "its first bytes are no model description; it may be a file of another kind")
        widths = struct.unpack(f"<{(n := self._count('widths', MOST_WIDTHS))}q", self._take(8 * n))
        kinds = struct.iter_unpack("<f4xq", self._take(_KIND_BYTES * self._count("layers", MOST_LAYERS)))
        layers = tuple((self._width(widths, index), slope) for slope, index in kinds)
        flags, _, fragment = struct.unpack("<QQq", self._take(24))
        heads_width, ffn = 128 * heads, 128 * heads * multiple
        sizes = [(heads_width, width)] * 4 + [(width, 4 * heads_width), (ffn, width), (width, ffn)]
        self._exactly(len(layers), "number of layers")
        places: list[MatrixPlace] = []
        for layer in range(len(layers)):
            self._exactly(len(LAYER_MATRICES), f"number of matrices of layer {layer}")
            places += [self._matrix(f"layers.{layer}.{name}", *size) for name, size in zip(LAYER_MATRICES, sizes, strict=True)]
        self._exactly(len(END_MATRICES), "number of other matrices")
        places += [self._matrix(name, rows, width) for name, rows in zip(END_MATRICES, (labels, vocab), strict=True)]
        self._exactly(vocab, "length of the output bias")
        bias = self._at
        self._skip(vocab * FLOAT_BYTES)
        if self._at != self._size:
            raise BadOriginal(self._path, f"{self._size - self._at} bytes follow its end")
        return OriginalCheckpoint(width, heads, multiple, labels, vocab, layers, flags, fragment, tuple(places), bias)

    def _matrix(self, name: str, rows: int, columns: int) -> MatrixPlace:
        offset = 0
        for what in ("weights", "momentum"):
            self._exactly(columns, f"inputs of {name} ({what})")
            self._exactly(rows, f"outputs of {name} ({what})")
            offset = offset or self._at
            self._skip(rows * columns * FLOAT_BYTES)
        self._skip(FLOAT_BYTES)
        self._skip(FLOAT_BYTES * self._count(f"row dispersions of {name}", rows))
        return MatrixPlace(name, offset, rows, columns)

    def _width(self, widths: tuple[int, ...], index: int) -> int:
        if not 0 <= index < len(widths):
            raise BadOriginal(self._path, f"a layer has width number {index} of {len(widths)}")
        return widths[index]

    def _number(self) -> int:
        return int(struct.unpack("<q", self._take(8))[0])

    def _exactly(self, wanted: int, what: str) -> None:
        if (found := self._number()) != wanted:
            raise BadOriginal(self._path, f"{what} is {found}, its description needs {wanted}")

    def _count(self, what: str, most: int) -> int:
        if not 0 <= (found := self._number()) <= most:
            raise BadOriginal(self._path, f"{found} {what}, at most {most} are possible")
        return found

    def _take(self, size: int) -> bytes:
        start = self._at
        self._skip(size)
        self._file.seek(start)
        return self._file.read(size)

    def _skip(self, size: int) -> None:
        if self._at + size > self._size:
            raise BadOriginal(self._path, f"it is cut short at {self._size} bytes; copy it again")
        self._at += size
