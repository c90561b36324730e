"""Finding files, reading pieces, cutting long documents, holding pieces out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_fed.data import limits, sources
from tscale_fed.data.gpt2 import load_gpt2
from tscale_fed.data.held_out import HeldOut
from tscale_fed.data.sources import DEMO, Piece, SourceFile, find_sources, piece_bytes_for, read_pieces
from tscale_net.errors import Refused

GPT2 = load_gpt2()
PIECE_BYTES = 64


def pieces_of(path: Path, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    seen = bytearray()
    pieces = list(read_pieces(SourceFile(path, path.name, path.stat().st_size), piece_bytes, seen.extend))
    assert bytes(seen) == path.read_bytes()
    return pieces


def refusal(path: Path) -> Refused:
    with pytest.raises(Refused) as refused:
        pieces_of(path)
    return refused.value


def test_short_document_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"line\n\n" * 40)
    assert pieces_of(path) == [Piece(b"line\n\n" * 40, True)]


WORDS = ["cat", "It's", "naïve", "🐈🐈", "12", "?!", " ", "  ", "\n", "\n\n", " \n\n\n", "\r\n", "\t"]
prose = st.lists(st.sampled_from(WORDS), max_size=400)


@settings(max_examples=60, deadline=None)
@given(words=prose, block=st.integers(1, 700))
def test_cut_gives_the_ids_of_the_uncut_text(tmp_path_factory: pytest.TempPathFactory, words: list[str], block: int) -> None:
    text = "".join(words).encode()
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "READ_BLOCK_BYTES", block)
        pieces = pieces_of(path)
    assert b"".join(piece.text for piece in pieces) == text
    assert [piece.starts_document for piece in pieces] == [True, *[False] * (len(pieces) - 1)][: len(pieces)]
    assert all(len(piece.text) <= limits.WHOLE_PIECES * PIECE_BYTES for piece in pieces)
    if any(word.isspace() for word in words) and max(map(len, text.split() or [b""])) < PIECE_BYTES:
        ids = [i for piece in pieces for i in GPT2.encode(piece.text).tolist()]
        assert ids == GPT2.encode(text).tolist()


def test_cuts_prefer_blank_lines(tmp_path: Path) -> None:
    paragraph = b"a few words here\nand there\n\n"
    path = tmp_path / "a.txt"
    path.write_bytes(paragraph * 40)
    pieces = pieces_of(path)
    assert len(pieces) > 10
    assert all(piece.text.startswith(b"\na few") for piece in pieces[1:])


def test_unbroken_text_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("🐈" * 200, encoding="utf-8")
    pieces = pieces_of(path)
    assert len(pieces) > 1
    assert "".join(piece.text.decode() for piece in pieces) == "🐈" * 200
    path.write_bytes(b"\x80" * 1000)
    assert b"".join(piece.text for piece in pieces_of(path)) == b"\x80" * 1000


def test_jsonl_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n  \n{"id": 2, "text": "zwei\\n\\u00fc"}\r\n{"text": ""}\n{"text": "last"}')
    assert pieces_of(path) == [Piece(b"one", True), Piece("zwei\nü".encode(), True), Piece(b"last", True)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', "is not valid JSON"),
        (b'{"text": "\xff"}', "is not valid JSON"),
        (b'{"text": "\\ud800"}', "is not valid JSON"),
        (b'{"body": "x"}', 'string field "text"'),
        (b'{"text": 3}', 'string field "text"'),
        (b'["text"]', 'string field "text"'),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    refused = refusal(path)
    assert refused.code == "bad-line"
    assert f"{path} line 2 " in refused.detail and words in refused.detail


def test_endless_jsonl_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "much too long for this limit"}')
    assert "line 1 is longer than" in refusal(path).detail


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.jsonl", ".hidden.txt", ".git/c.txt", "picture.png", "a/UPPER.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.name for file in find_sources([tmp_path])] == ["a.jsonl", "a/UPPER.TXT", "a/z.md", "b.txt"]


def test_demo_text_ships() -> None:
    files = find_sources([DEMO])
    assert [file.name for file in files] == ["alice.txt", "persuasion.txt", "sense_and_sensibility.txt"]
    assert 1_000_000 < sum(file.size for file in files) < 2_000_000
    for file in files:
        text = file.path.read_text("utf-8")
        assert "gutenberg" not in text.lower() and "\r" not in text and not text.startswith("[")


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "data.gz").write_bytes(b"x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    cases = {
        "nothing": ("no-source", f"No file or folder {tmp_path / 'nothing'}: check the path."),
        "empty.txt": ("empty-source", "holds no text"),
        "data.gz": ("packed-source", "unpack it"),
        "pictures": ("no-source", "has no text files (.jsonl .markdown .md"),
    }
    for name, (code, words) in cases.items():
        with pytest.raises(Refused) as refused:
            find_sources([tmp_path / name])
        assert refused.value.code == code and words in refused.value.detail
    with pytest.raises(Refused, match="The list of sources holds no text"):
        find_sources([])


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    gone = SourceFile(tmp_path / "gone.txt", "gone.txt", 3)
    with pytest.raises(Refused, match=r"gone.txt cannot be read \(No such file"):
        list(read_pieces(gone, PIECE_BYTES, lambda _block: None))


def test_piece_size_follows_the_sources() -> None:
    assert piece_bytes_for(1) == limits.MIN_PIECE_BYTES
    assert piece_bytes_for(1_300_000) == 4096
    assert piece_bytes_for(1 << 40) == limits.MAX_PIECE_BYTES


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=300), fraction=st.sampled_from([0.0, 0.01, 0.05, 0.5]))
def test_held_out_follows_the_fraction(sizes: list[int], fraction: float) -> None:
    rule = HeldOut(fraction)
    held = [rule.decide(size) for size in sizes]
    held_bytes = sum(size for size, is_held in zip(sizes, held, strict=True) if is_held)
    assert abs(held_bytes - fraction * sum(sizes)) <= max(sizes)
    assert not held[0]
    assert any(held) == (fraction > 0 and len(sizes) > 1)


def test_folder_behind_a_link_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert [file.name for file in sources.find_sources([tmp_path])] == ["a.txt"]
