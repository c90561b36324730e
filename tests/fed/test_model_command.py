"""`tscale model`: exit codes and what is printed."""

from pathlib import Path

import numpy as np
import pytest
from golden_cases import print_golden

from tscale_fed.cli import main


def test_conform_exits_with_0_and_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = print_golden("e128h1d1w8", steps=1, config="drop0.8ch1lr0.02slow2reg50")
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, **arrays)  # type: ignore[arg-type]
    np.savez(bad, **arrays | {"after/final": arrays["init/final"]})  # type: ignore[arg-type]
    assert main(["model", "conform", str(good)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "conforms" and "layers.0.ffn_down" in out
    assert main(["model", "conform", str(bad)]) == 1
    assert "does NOT conform: final" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing.npz", "."])
def test_conform_without_a_usable_file(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "conform", str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error


def test_shape_prints_the_published_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "shape", "e512h3d50w1024"]) == 0
    out = capsys.readouterr().out
    assert "149.835M" in out and "8 x width 1, 21 x width 64, 21 x width 1024" in out
    assert main(["model", "shape", "e500"]) == 1
    assert "use e512" in capsys.readouterr().err
