"""`tscale tokenizer`: train, show, convert; nothing half-written, one sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tscale_fed.cli import main
from tscale_fed.data.tokenizer import load_tokenizer

TEXT = "The cat saw the other cats, and the other cats saw the cat. " * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("kind", ["bpe", "word", "greedy-capital"])
def test_train_then_import_with_it(kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "own.json"
    assert main(["tokenizer", "train", str(text), "--kind", kind, "--size", "300", "--out", str(out)]) == 0
    tokenizer = load_tokenizer(out)
    assert tokenizer.encode(TEXT).size < len(TEXT) / 2 and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT.encode()
    assert main(["data", "import", str(text), "--tokenizer", str(out), "--out", str(tmp_path / "data"), "--held-out", "0"]) == 0
    assert main(["data", "info", str(tmp_path / "data"), "--verify"]) == 0
    assert tokenizer.hash[:12] in capsys.readouterr().out


def test_show_and_convert(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, original, back = tmp_path / "own.json", tmp_path / "own.bin", tmp_path / "back.json"
    assert main(["tokenizer", "train", str(text), "--kind", "greedy-capital", "--size", "50", "--out", str(out)]) == 0
    assert main(["tokenizer", "convert", str(out), "--out", str(original)]) == 0
    assert main(["tokenizer", "convert", str(original), "--out", str(back)]) == 0
    assert back.read_bytes() == out.read_bytes()
    capsys.readouterr()
    assert main(["tokenizer", "show", str(original), "The cats"]) == 0
    shown = capsys.readouterr().out
    assert "greedy-capital" in shown and "comes back exactly" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "TEXT", "--out", "TEXT"], "is there already"),
        (["train", "TEXT", "--kind", "bpe", "--size", "10", "--out", "OUT"], "too small for BPE"),
        (["train", "TEXT", "--size", "0", "--out", "OUT"], "must lie in"),
        (["train", "nowhere.txt", "--out", "OUT"], "No file or folder"),
        (["show", "nowhere"], "No tokenizer"),
        (["convert", "OUT", "--out", "x.bin"], "No tokenizer"),
    ],
)
def test_refusals(words: list[str], sentence: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"TEXT": str(text), "OUT": str(tmp_path / "out.json")}
    assert main(["tokenizer", *(places.get(word, word) for word in words)]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]
