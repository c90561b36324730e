"""`tscale train --gpus N` as processes: it starts its ranks, ends with them, and what it leaves goes on with any number of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tscale_fed.checkpoint import CheckpointStore
from tscale_fed.cli import main
from tscale_fed.parallel.launch import LAUNCHER, Launcher, free_port, rank_environments

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
[parallel]
gradients = "onebit"
check_every_steps = 5
"""
_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.wait()
        for child in children:
            child.kill()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"the peer and the swarm number {i}\n" for i in range(200)))
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path / "run.toml"


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "tscale_fed",
        "train",
        str(config),
        "--device",
        "cpu",
        "--home",
        str(config.parent / "home"),
        *arguments,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    _started.append(process)
    return process


def wait_for_steps(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if not any(re.search(r"step \d+ of", line) for line in process.stdout):
        pytest.fail(f"it ended before a step: {process.stderr.read() if process.stderr else ''}")


def store(config: Path) -> CheckpointStore:
    return CheckpointStore(config.parent / "home" / "alone" / "tiny-run" / "checkpoints", keep=3)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_one_sentence_and_a_good_checkpoint(config: Path) -> None:
    process = start(config, "--gpus", "2")
    wait_for_steps(process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
    out, err = process.communicate()
    assert process.returncode == 1
    assert err == ("tscale: rank 1 of 2 was ended by SIGKILL, so the others ended too: the same command goes on from the last checkpoint\n")
    assert "saved" in out and not any(rank.is_running() for rank in ranks)
    found, notes = store(config).latest()
    assert found is not None and not notes and found.facts["trainer"]["steps"] > 0


def test_flags_that_cannot_mean_anything_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "--gpus", "2", "--device", "cuda:1"]) == 1
    err = capsys.readouterr().err
    assert "names one GPU" in err and err.count("\n") == 1


# -- the launcher, with small programs in place of ranks ---------------------------------------------------------------

STAND_IN = """
import os, signal, sys
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "3" and os.environ["NCCL_NVLS_ENABLE"] == "0" and int(os.environ["TSCALE_LAUNCHER"]) == os.getppid()
def wait_for_a_signal(code):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    while True:
        signal.pause()
"""


def launched(program: str) -> tuple[int, str | None]:
    return Launcher([sys.executable, "-c", STAND_IN + program], 3, os.environ).run()


def test_all_ranks_end_well() -> None:
    assert launched("") == (0, None)


def test_a_killed_rank_is_named_and_the_others_are_asked_to_end() -> None:
    code, sentence = launched("os.kill(os.getpid(), 9) if rank == 2 else wait_for_a_signal(3)")
    assert code == 1 and sentence is not None and sentence.startswith("rank 2 of 3 was ended by SIGKILL, so the others ended too")


def test_a_rank_that_fails_tells_its_last_line_and_rank_0_speaks_for_itself(capfd: pytest.CaptureFixture[str]) -> None:
    fails = "print('a warning\\ntscale: the disk is full', file=sys.stderr); sys.exit(1)"
    assert launched(f"if rank == 1: {fails}\nwait_for_a_signal(3)") == (1, "rank 1 of 3: the disk is full")
    assert capfd.readouterr().err == ""
    assert launched(f"if rank == 0: {fails}\nwait_for_a_signal(3)") == (1, None)
    assert "the disk is full" in capfd.readouterr().err


def test_an_interrupt_is_passed_on_once(capfd: pytest.CaptureFixture[str]) -> None:
    asks = "if rank == 0: os.kill(os.getppid(), signal.SIGINT)\n"
    blocked = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"  # the signal may come before the handler stands
    ready = "signal.signal(signal.SIGINT, lambda *_: sys.exit(0)); signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\n"
    assert launched(blocked + asks + ready + "wait_for_a_signal(3)") == (0, None)
    assert capfd.readouterr().err == "finishing the step and saving; Ctrl+C again stops now\n"


@pytest.mark.slow
def test_two_then_three_then_one_and_an_interrupt(config: Path) -> None:
    for ranks, steps in (("2", "20"), ("3", "25"), ("1", "27")):
        process = start(config, "--gpus", ranks, "--steps", steps)
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
    assert "going on from checkpoint-0000000025, step 25" in out
    process = start(config, "--gpus", "2")
    wait_for_steps(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "finishing the step and saving; Ctrl+C again stops now\n")
    found, _ = store(config).latest()
    assert found is not None and "held_back_gradient" in found.tensors and found.facts["trainer"]["steps"] > 27


@pytest.mark.slow
def test_hosts_with_other_run_files_are_refused_by_one_sentence(config: Path) -> None:
    other = config.with_name("other.toml")
    other.write_text(CONFIG.replace("rate = 0.02", "rate = 0.01"))
    said = []
    for environment, file in zip(rank_environments(os.environ, 2, free_port()), (config, other), strict=True):
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), LAUNCHER: "0"}
        command = [sys.executable, "-m", "tscale_fed", "train", str(file), "--device", "cpu", "--home", str(file.with_suffix(""))]
        _started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    for process in list(_started):
        said.append(process.communicate()[1])
        assert process.returncode != 0
    assert said[0].startswith("tscale: rank 1 has another [optimizer] (") and said[1] == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_bit_loses_less_than_one_percent(ranks: int, tmp_path: Path) -> None:
    """The bench's own rows, 300 steps of a tiny model on the demo's text."""
    out = tmp_path / "found.json"
    sizes = ("--preset", "tiny", "--fragments", "8", "--tokens", "32", "--steps", "300")
    assert main(["bench", "parallel", "--gpus", str(ranks), *sizes, "--rows", "exact", "onebit", "--device", "cpu", "--out", str(out)]) == 0
    exact, onebit = json.loads(out.read_text())["rows"]
    assert onebit["held_out_loss"][-1][1] < exact["held_out_loss"][-1][1] * 1.01
    assert onebit["bytes_per_weight"] < exact["bytes_per_weight"] / 29
