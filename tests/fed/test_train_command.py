"""`tscale train` as a process: it learns, saves, goes on, and obeys Ctrl+C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

CONFIG = """
[run]
name = "tiny run"
[model]
dims = "e128h1d2w16"
[data]
sources = ["text.txt"]
held_out = 0.2
[batch]
fragments = 2
length = 16
[optimizer]
rate = 0.02
warmup_batches = 4
[swarm]
budget_batches = 100000
[eval]
fragments = 2
batches = 2
[device]
threads = 1
"""
PROGRAM = "import sys; from tscale_fed.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"the peer and the swarm number {i}\n" for i in range(200)))
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path / "run.toml"


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", PROGRAM, "train", str(config), "--device", "cpu", "--home", str(config.parent / "home"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    _started.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out, err


def wait_for(stream: IO[str] | None, pattern: str) -> None:
    assert stream is not None
    if not any(re.search(pattern, line) for line in stream):
        pytest.fail(f"the program ended without a line like {pattern!r}")


def checkpoints(config: Path) -> list[str]:
    return sorted(path.name for path in (config.parent / "home" / "alone" / "tiny-run" / "checkpoints").glob("*"))


def losses(out: str) -> list[float]:
    return [float(text) for text in re.findall(r"held-out loss ([0-9.]+) nats", out)]


def test_it_learns_saves_and_goes_on(config: Path) -> None:
    code, out, err = finish(start(config, "--steps", "20"))
    assert (code, err) == (0, "")
    assert "cpu: asked for" in out and "step 20 of 20" in out
    before, after = losses(out)
    assert after < before - 0.5
    assert checkpoints(config) == ["checkpoint-0000000020"]

    code, out, _ = finish(start(config, "--steps", "25"))
    assert code == 0 and "going on from checkpoint-0000000020" in out
    assert losses(out)[0] == after
    assert checkpoints(config) == ["checkpoint-0000000020", "checkpoint-0000000025"]

    code, out, _ = finish(start(config, "--steps", "25"))
    assert code == 0 and "nothing to do" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_saves_and_ends_in_order(config: Path, number: signal.Signals) -> None:
    process = start(config)
    wait_for(process.stdout, r"step \d+ of")
    process.send_signal(number)
    code, _, err = finish(process)
    assert (code, err) == (0, "finishing the step and saving; Ctrl+C again stops now\n")
    assert len(checkpoints(config)) == 1


def test_two_interrupts_stop_now(config: Path) -> None:
    (config.parent / "run.toml").write_text(CONFIG.replace("fragments = 2\nlength = 16", "fragments = 64\nlength = 512"))
    process = start(config)
    wait_for(process.stdout, r"step \d+ of")
    process.send_signal(signal.SIGINT)
    wait_for(process.stderr, "finishing the step")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    # A step may have ended in between: then the first interrupt was enough.
    assert (code, "stopped" in err) in ((130, True), (0, False))


def test_a_changed_model_is_refused_and_a_changed_rate_is_said(config: Path) -> None:
    assert finish(start(config, "--steps", "2"))[0] == 0
    config.write_text(CONFIG.replace("rate = 0.02", "rate = 0.01"))
    code, out, _ = finish(start(config, "--steps", "3"))
    assert code == 0 and "[optimizer] has changed" in out
    config.write_text(CONFIG.replace("w16", "w32"))
    code, _, err = finish(start(config, "--steps", "4"))
    assert code == 1 and "another model" in err and "--home" in err and err.count("\n") == 1


def test_a_damaged_checkpoint_is_said_and_passed_over(config: Path) -> None:
    assert finish(start(config, "--steps", "2"))[0] == 0
    assert finish(start(config, "--steps", "4"))[0] == 0
    newest = config.parent / "home" / "alone" / "tiny-run" / "checkpoints" / "checkpoint-0000000004" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    code, out, _ = finish(start(config, "--steps", "5"))
    assert code == 0 and "damaged" in out and "going on from checkpoint-0000000002" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("[batch]", "[bach]"), ["run.toml, line", "bach", '"batch"']),
        (lambda text: text.replace("text.txt", "nowhere.txt"), ["nowhere.txt"]),
        (lambda text: text.replace("e128h1d2w16", "e100h1d2w16"), ["e100", "e128"]),
        (lambda text: text.replace("length = 16", "length = 100000"), ["too few for a fragment"]),
    ],
)
def test_a_wrong_run_file_is_one_sentence(config: Path, change, words: list[str]) -> None:  # type: ignore[no-untyped-def]
    config.write_text(change(CONFIG))
    code, _, err = finish(start(config))
    assert code == 1 and err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_missing_gpu_is_one_sentence(config: Path) -> None:
    code, _, err = finish(start(config, "--device", "cuda:77"))
    assert code == 1 and "cuda:77" in err and err.count("\n") == 1
