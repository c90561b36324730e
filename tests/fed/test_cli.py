"""The command line: flags, exit codes, errors as sentences, and that `--help` loads nothing heavy."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tscale_fed import cli
from tscale_fed.commands.peer_arguments import check_peer_arguments, peer_parser
from tscale_net.errors import Refused

HEAVY = ("torch", "zmq", "multiaddr", "textual", "numpy", "msgspec", "asyncio", "cryptography", "rich")


def parse(*words: str) -> argparse.Namespace:
    parser = peer_parser()
    arguments = parser.parse_args(words)
    check_peer_arguments(parser, arguments)
    return arguments


def test_defaults() -> None:
    assert vars(parse()) == {
        "role": "peer", "bootstrap": [], "config": None, "listen": None, "home": None, "device": "auto", "data_dir": None, "name": None,
        "max_upload": None, "max_download": None, "solo": False, "advertise": [], "require_id": False, "seconds": None,
        "threads": None, "json_log": False, "debug": False,
    }  # fmt: skip


def test_flags() -> None:
    found = parse(
        *"--bootstrap a:1 --bootstrap id@b:2 --listen 7800 --home h --device cuda:1 --data-dir d --name me --max-upload 20M".split(),
        *"--max-download 5MB/s --advertise 192.0.2.1:7800 --require-id --seconds 1.5 --threads 2 --json-log --debug".split(),
    )
    assert (found.bootstrap, found.listen, found.home, found.device) == (["a:1", "id@b:2"], "0.0.0.0:7800", Path("h"), "cuda:1")
    assert (found.max_upload, found.max_download, found.seconds, found.threads) == (2.5e6, 5e6, 1.5, 2)
    assert found.advertise == ["192.0.2.1:7800"]
    assert parse("--listen", "[::]:7700").listen == "[::]:7700" and parse("--listen", ":0").listen == "0.0.0.0:0"
    assert parse("--role", "seed", "--config", "x.toml").config == Path("x.toml")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--listen", "7700x"], "is not HOST:PORT"),
        (["--listen", "host:70000"], "is not HOST:PORT"),
        (["--listen", "::1:7700"], "in brackets"),
        (["--device", "gpu"], "use auto, cpu, cuda or cuda:N"),
        (["--max-upload", "fast"], "write for example 20M"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "nan"], "above 0"),
        (["--threads", "-1"], "at least 1"),
        (["--name", "a b"], "letters, digits"),
        (["--role", "king"], "invalid choice"),
        (["--boot", "a:1"], "unrecognized"),
        (["--home", ""], "the path is empty"),
        (["--solo", "--bootstrap", "a:1"], "--solo trains without connections"),
        (["--config", "x.toml"], "needs --role seed"),
    ],
)
def test_wrong_flags_exit_2_with_a_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def loaded_by(words: list[str]) -> set[str]:
    """Modules in sys.modules after a program printed its help, in a fresh interpreter."""
    program = (
        "import sys\nfrom tscale_fed import cli\n"
        f"try: cli.{words[0]}({words[1:]!r})\nexcept SystemExit as stopped: assert stopped.code == 0\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    paths = ":".join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, env={"PYTHONPATH": paths}, check=True)
    assert "usage:" in done.stdout
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [["peer_main", "--help"], ["main", "--help"], ["status_main", "--help"], ["peer_main", "-h"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    assert loaded_by(words).isdisjoint(HEAVY)


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """A command module whose `run` raises what the test puts in."""
    box: dict[str, BaseException] = {}
    module = ModuleType("tscale_fed.commands.raising")

    def run(arguments: argparse.Namespace) -> int:
        if "error" in box:
            raise box["error"]
        return 0

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tscale_fed.commands.raising", module)
    return box


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Refused("no-source", "nobody has the snapshot: check --bootstrap"), 1, "nobody has the snapshot: check --bootstrap"),
        (FileNotFoundError(errno.ENOENT, "x", "a.toml"), 1, "a.toml: no such file"),
        (IsADirectoryError(errno.EISDIR, "x", "dir"), 1, "dir: this is a directory"),
        (PermissionError(errno.EACCES, "x", "id"), 1, "id: permission denied"),
        (OSError(errno.ENOSPC, "x"), 1, "the disk is full"),
        (OSError(errno.EADDRINUSE, "x"), 1, "the port is in use"),
        (OSError(errno.EIO, "Input/output error", "f"), 1, "f: Input/output error"),
        (ModuleNotFoundError("No module named 'zmq'", name="zmq"), 1, "the Python package 'zmq' is missing"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "out of memory"),
        (ExceptionGroup("tasks", [ValueError("x"), ExceptionGroup("inner", [Refused("a", "the inner reason")])]), 1, "the inner reason"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_one_sentence(
    raising: dict[str, BaseException], error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raising["error"] = error
    assert cli.run_command("tscale-peer", "raising", argparse.Namespace(debug=False)) == code
    told = capsys.readouterr().err
    assert told.startswith("tscale-peer: ") and words in told and told.count("\n") == 1 and "Traceback" not in told


def test_a_bug_keeps_its_traceback_in_a_file(
    raising: dict[str, BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    raising["error"] = ZeroDivisionError("division by zero\nsecond line")
    assert cli.run_command("tscale", "raising", argparse.Namespace()) == cli.EXIT_BUG
    told = capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert str(kept) in told and told.count("\n") == 1 and "ZeroDivisionError" in kept.read_text()
    with pytest.raises(ZeroDivisionError):
        cli.run_command("tscale", "raising", argparse.Namespace(debug=True))


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = (
        "import sys, types, argparse\nfrom tscale_fed import cli\nmodule = types.ModuleType('m')\n"
        "def run(arguments):\n    for _ in range(100000): print('x' * 100)\n    return 0\n"
        "module.run = run\nsys.modules['tscale_fed.commands.m'] = module\nsys.exit(cli.run_command('tscale', 'm', argparse.Namespace()))"
    )
    paths = ":".join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": paths}
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_success_is_0(raising: dict[str, BaseException]) -> None:
    assert cli.run_command("tscale", "raising", argparse.Namespace()) == 0


def test_tscale_lists_its_commands_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fly"])
    assert stopped.value.code == 2 and "fly" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [["step"], ["quality", "--run", "int8 qtail"], ["memory"], ["rules", "--size", "5m"], ["exchange"]])
def test_a_bench_without_its_gpu_says_so(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 1
    assert "GPU" in (error := capsys.readouterr().err) or "CUDA" in error
    assert "a bug" not in error and error.count("\n") == 1
