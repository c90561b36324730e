"""Checkpoints of the original: a synthetic file is walked; cut and foreign ones are named."""

import struct
from pathlib import Path

import pytest

from tscale_fed.cli import main
from tscale_fed.export.original import read_original
from tscale_net.errors import Refused

WIDTH, HEADS, VOCAB, LABELS = 128, 1, 5, 6


def matrix(rows: int, columns: int, value: float) -> bytes:
    head = struct.pack("<2q", columns, rows)
    floats = struct.pack("<f", value) * (rows * columns)
    return head + floats + head + bytes(len(floats)) + struct.pack("<fqf", 1.0, 1, 0.5)


def synthetic() -> bytes:
    out = struct.pack("<4qi2q", WIDTH, 128, 128, HEADS, 1, LABELS, VOCAB)
    out += struct.pack("<q4q", 4, 0, 1, 64, 32) + struct.pack("<qf4xq", 1, 0.5, 2) + struct.pack("<QQq", 0x20, 0, 32)
    out += struct.pack("<2q", 1, 7)
    sizes = [(128, WIDTH)] * 4 + [(WIDTH, 512), (128, WIDTH), (WIDTH, 128)]
    out += b"".join(matrix(rows, columns, float(i)) for i, (rows, columns) in enumerate(sizes))
    out += struct.pack("<q", 2) + matrix(LABELS, WIDTH, 7.0) + matrix(VOCAB, WIDTH, 8.0)
    return out + struct.pack("<q5f", VOCAB, *range(VOCAB))


def test_shape_and_places(tmp_path: Path) -> None:
    path = tmp_path / "eden_gpt_1k.bin"
    path.write_bytes(content := synthetic())
    found = read_original(path)
    assert found.layers == ((64, 0.5),) and (found.flags, found.fragment_tokens) == (0x20, 32)
    assert [struct.unpack_from("<f", content, place.offset_bytes)[0] for place in found.matrices] == [float(i) for i in range(9)]
    assert struct.unpack_from("<5f", content, found.bias_offset_bytes) == (0, 1, 2, 3, 4)
    assert found.parameters == 10 * 128 * 128 + (VOCAB + LABELS) * WIDTH + VOCAB


def test_cut_at_any_place_is_named(tmp_path: Path) -> None:
    content, path = synthetic(), tmp_path / "cut.bin"
    for size in (0, 1, 50, 60, 100, 200, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(Refused, match="cut short|no model description"):
            read_original(path)


@pytest.mark.parametrize("junk", [b"\xff" * 500, b"PK\x03\x04" * 200, bytes(500)])
def test_foreign_files_are_named(tmp_path: Path, junk: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "foreign.bin").write_bytes(junk)
    assert main(["model", "info", str(path)]) == 1
    error = capsys.readouterr().err
    assert "foreign.bin" in error and error.count("\n") == 1


def test_info_prints_the_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "eden_gpt_1k.bin").write_bytes(synthetic())
    assert main(["model", "info", str(path)]) == 0
    assert "1 layers" in capsys.readouterr().out
    path.write_bytes(synthetic() + b"x")
    assert main(["model", "info", str(path)]) == 1
    assert "1 bytes follow" in capsys.readouterr().err
