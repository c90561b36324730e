"""`tscale data` as people type it: results on stdout, one sentence on stderr, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tscale_fed.cli import main


def test_import_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["data", "import", "builtin:demo", "--out", out, "--held-out", "0.1"]) == 0
    captured = capsys.readouterr()
    assert "vocabulary 258" in captured.out and "held out" in captured.out and "reading" in captured.err
    assert main(["data", "info", out]) == 0
    assert "not checked; --verify reads everything" in capsys.readouterr().out
    assert main(["data", "info", out, "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokenizer"]["kind"] == "bytes" and facts["train"]["tokens"] > 1_000_000
    assert facts["test"]["text_bytes"] == pytest.approx(0.1 * (facts["test"]["text_bytes"] + facts["train"]["text_bytes"]), rel=0.02)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["info", "{tmp}/none"], "No token data in {tmp}/none: make it with"),
        (["import", "{tmp}/none", "--out", "{tmp}/out"], "No file or folder {tmp}/none: check the path."),
        (["import", "builtin:demo", "--out", "{tmp}"], "was not made by an import"),
        (["import", "builtin:demo", "--out", "{tmp}/out", "--tokenizer", "gpt5"], 'No tokenizer "gpt5"'),
        (["import", "builtin:demo", "--out", "{tmp}/out", "--held-out", "5"], "must lie between 0 and 0.5"),
        (["import", "builtin:demo", "--out", "{tmp}/mine.txt/out"], "cannot be written"),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["data", *(word.format(tmp=tmp_path) for word in words)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert sentence.format(tmp=tmp_path) in captured.err


def test_wrong_command_line() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "import", "builtin:demo"])
    assert stopped.value.code == 2
