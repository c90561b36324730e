"""Make .venv with everything that running and testing tscale-fed needs; a second run with nothing changed ends at once.

Enters: pyproject.toml and this machine (is there an NVIDIA GPU?). Leaves: .venv, with tscale-fed installed in place (editable).
With a GPU torch comes from PyPI as it is, with CUDA. Without one, on Linux, the CPU build is asked for first, since PyPI's build would
bring gigabytes of CUDA libraries that could not be used; its public index is used only if it answers. With `--tests`, a machine without a
GPU also gets Triton (1 GB), whose interpreter checks the kernels there; a GPU's torch brings its own. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
STAMP = ENVIRONMENT / "set_up.stamp"

OLDEST_PYTHON = (3, 11)
CPU_TORCH = "torch==2.13.0"
ANY_TORCH = "torch>=2.11"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 4.0
NVIDIA_SMI_SECONDS = 20.0
"""nvidia-smi can take several seconds on a machine with many GPUs that were idle."""


class SetUpError(Exception):
    """One sentence for the user."""


def main(words: Sequence[str] = ()) -> int:
    if sys.version_info < OLDEST_PYTHON:
        print(f"set-up: Python 3.11 or newer is needed, this is {platform.python_version()}", file=sys.stderr)
        return 1
    started = time.monotonic()
    gpu = has_nvidia_gpu()
    tests = "--tests" in words
    enough = {fingerprint(gpu, True)} if tests else {fingerprint(gpu, True), fingerprint(gpu, False)}
    if STAMP.is_file() and STAMP.read_text() in enough and runs(PYTHON):
        return 0
    try:
        make_environment()
        install_torch(gpu)
        say("installing tscale-fed and its tests' tools")
        pip("install", "-e", ".[test,interp]" if tests and not gpu else ".[test]")
    except SetUpError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    STAMP.write_text(fingerprint(gpu, tests))
    say(f"ready after {time.monotonic() - started:.0f} s: {ENVIRONMENT.name}/bin holds tscale-peer, tscale-status and tscale")
    return 0


def say(sentence: str) -> None:
    print(f"set-up: {sentence}", flush=True)


def fingerprint(gpu: bool, tests: bool) -> str:
    """Changes when the environment must be made again."""
    parts = [platform.python_version(), str(gpu), str(tests), str(ROOT)]
    parts += [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "scripts/set_up.py")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def has_nvidia_gpu() -> bool:
    """The driver is loaded, or nvidia-smi finds a GPU."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def runs(python: Path) -> bool:
    """False if the environment is missing, or its Python has gone (an upgrade, a moved folder)."""
    try:
        return subprocess.run([python, "-c", "pass"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make_environment() -> None:
    if runs(PYTHON):
        return
    say(f"making {ENVIRONMENT} with Python {platform.python_version()}")
    try:
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
    except (subprocess.CalledProcessError, ImportError) as error:
        raise SetUpError("this Python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv") from error
    except OSError as error:
        raise SetUpError(f"{error.filename or ENVIRONMENT}: {error.strerror}") from error


def install_torch(gpu: bool) -> None:
    """Nothing to do if a fitting build is there; a CPU build is replaced once the machine has a GPU."""
    installed = installed_torch()
    if gpu and installed is not None and installed.endswith("+cpu"):
        say("this machine has an NVIDIA GPU now: replacing the CPU build of torch")
        pip("uninstall", "--yes", "torch")
    elif installed is not None:
        return
    if gpu or sys.platform != "linux":
        say("installing torch" + (" with CUDA: an NVIDIA GPU was found" if gpu else ""))
        pip("install", ANY_TORCH)
        return
    index = ["--extra-index-url", CPU_INDEX] if answers(f"{CPU_INDEX}/torch/") else []
    say("installing torch for CPUs: no NVIDIA GPU was found" + ("" if index else f"; {CPU_INDEX} does not answer, so from pip's own index"))
    try:
        pip("install", *index, CPU_TORCH)
    except SetUpError:
        say(f"{CPU_TORCH} is not to be had for this Python; taking the newest")
        pip("install", *index, ANY_TORCH)


def installed_torch() -> str | None:
    """The version in .venv, without importing it."""
    program = "import importlib.metadata as m\ntry: print(m.version('torch'))\nexcept m.PackageNotFoundError: pass"
    return subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=True).stdout.strip() or None


def answers(url: str) -> bool:
    """Whether a web address can be read within a few seconds."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS):
            return True
    except (OSError, urllib.error.URLError):
        return False


def pip(*words: str) -> None:
    """Run pip in .venv; its progress shows on a terminal, its errors always. Raises SetUpError."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [str(PYTHON), "-m", "pip", *words[:1], "--disable-pip-version-check", *quiet, *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}, check=False)
    if done.returncode != 0:
        raise SetUpError(f"`pip {' '.join(words)}` failed, its message is above: check network and free disk space, then run this again")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
