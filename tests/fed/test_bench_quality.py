"""The quality bench: its text, its settings in words, its averages, its verdict, and a whole run at a tiny size."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch

from tscale_fed.bench.quality_run import Averages, Point, Trained
from tscale_fed.bench.quality_settings import Setting
from tscale_fed.bench.quality_table import goal_met, table_lines
from tscale_fed.bench.quality_text import QualityText
from tscale_fed.cli import main
from tscale_fed.optimizer.schedule import rate
from tscale_net.errors import Refused

CPU = torch.device("cpu")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.xz"
    path.write_bytes(lzma.compress(bytes(97 + (i * i + i // 7) % 23 for i in range(20_000))))
    return path


def test_fragments_follow_the_rule(text_file: Path) -> None:
    text = QualityText.open(text_file, CPU)
    assert text.train_bytes == 19_000 and text.vocab == len(text.ids.unique()) + 1
    positions = text.positions("random", seed=1, steps=3, fragments=4, tokens=16)
    batch, target = text.batch(positions[0], 16)
    assert (batch[:, 0] == text.vocab - 1).all() and (target[:, 0] == -1).all()
    assert torch.equal(batch[:, 2:], target[:, 1:-1])
    assert torch.equal(target[0, 1:], text.ids[positions[0, 0] + 2 : positions[0, 0] + 17].long())
    assert int(positions.max()) + 16 < text.train_bytes


def test_an_epoch_reads_every_byte_once(text_file: Path) -> None:
    text = QualityText.open(text_file, CPU)
    pieces = 19_000 // 16 - 2
    starts = text.positions("epoch", seed=1, steps=pieces, fragments=1, tokens=16).flatten()
    assert len(starts.unique()) == pieces and len((starts % 16).unique()) == 1
    further = text.positions("epoch", seed=1, steps=3 * pieces, fragments=1, tokens=16)
    assert len((further % 16).unique()) > 1, "the next epoch has another phase"
    assert int(further.max()) + 16 < text.train_bytes


def test_held_out_part_is_never_trained_on(text_file: Path) -> None:
    text = QualityText.open(text_file, CPU)
    assert len(text.whole_test(4, 16)) == (1_000 - 17) // 16 // 4 + (1 if (1_000 - 17) % 64 > 47 else 0)
    one, again = (text.evaluation("test", 2, 4, 16)[0][0] for _ in range(2))
    assert torch.equal(one, again)


def test_missing_text_says_how_to_build_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", "--device", "cpu"]) == 1
    assert "apt-get download dict-gcide" in capsys.readouterr().err


def test_words_make_a_setting_and_back() -> None:
    setting = Setting.parse("int8/fp8 qtail rate=0.02 ema=0.9,0.99 order=epoch")
    assert (setting.arithmetic, setting.rate, setting.ema, setting.order, setting.steps) == ("int8/fp8", 0.02, (0.9, 0.99), "epoch", 1500)
    assert Setting.parse(setting.name) == setting
    assert setting.name == "int8/fp8 qtail rate=0.02 order=epoch ema=0.9,0.99"
    for words in ("int8", "int8 fast", "int8 qtail speed=2", "int8 qtail rate=x", "int8 qtail order=none", "int8 qtail ema=1.5"):
        with pytest.raises(Refused):
            Setting.parse(words)


def test_schedules_are_those_of_the_original() -> None:
    constant, tail = Setting.parse("int8 qconst"), Setting.parse("int8 qtail")
    assert rate(constant.optimizer, 499, constant.steps) == pytest.approx(0.005)
    assert rate(constant.optimizer, 2799, constant.steps) == 0.01
    assert [round(rate(tail.optimizer, step, tail.steps), 5) for step in (99, 199, 750, 1125, 1499)] == [0.005, 0.01, 0.01, 0.005, 0.00001]


def test_averages() -> None:
    weights = torch.zeros(1)
    averages = Averages(Setting.parse("compiled qtail ema=0.5 mean=2"), weights)
    for step in range(1, 5):
        weights.fill_(step)
        averages.add(4 - step)
    found = averages.take()
    assert found["mean=2"].item() == 3.5
    assert 2.0 < found["ema=0.5"].item() < 4.0
    assert "mean=2" not in averages.take(), "the next even average starts anew"


def trained(arithmetic: str, schedule: str, steps: int, test: float, averaged: float) -> Trained:
    point = Point(steps, steps * 16384, test, test, {"ema=0.99": averaged})
    whole = {"last": test, "ema=0.99": averaged}
    return Trained(f"{arithmetic} {schedule} ema=0.99", arithmetic, schedule, [point], whole, 0.03, 10.0)


def test_goal_takes_the_best_weights_of_both_schedules() -> None:
    tail, constant = trained("int8/fp8", "qtail", 1500, 0.96, 0.95), trained("int8/fp8", "qconst", 2800, 0.929, 0.94)
    assert goal_met([tail, constant]) and not goal_met([tail])
    lines = "\n".join(table_lines([trained("compiled", "qtail", 1500, 0.955, 0.95), tail, constant]))
    assert "+0.52%" in lines and "0.9569" in lines and "qtail at 1500 steps: 0.9500" in lines


def test_whole_run_on_the_processor(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quality.json"
    sizes = ["--dims", "e128h1d2w16", "--fragments", "2", "--tokens", "16", "--device", "cpu", "--text", str(text_file), "--out", str(out)]
    runs = ["--run", "compiled32 qtail", "--run", "int8 qtail", "--run", "int9 qtail", "--also", "steps=3 ema=0.5 noise=2 keep=0.9"]
    assert main(["bench", "quality", *sizes, *runs]) == 1
    values = json.loads(out.read_text())
    first, second, failed = values["runs"]
    assert first["points"][0]["test"] == pytest.approx(second["points"][0]["test"], rel=0.01)
    assert set(second["whole_test"]) == {"last", "ema=0.5"} and failed["failure"]
    assert "not the text of the original" in capsys.readouterr().out
