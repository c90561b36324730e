"""The host update in C: built once with the system's compiler, kept in the user's cache, never required.

C, not C++: Triton needs a C compiler anyway, so a machine with a GPU has one.
Enters: host_update.c, a cache folder. Leaves: a `HostLibrary`, or the reason why there is none; callers then use torch, with the same
results. The name of the built file holds a hash of source, flags, compiler and processor, so a changed one is built anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("host_update.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-std=c11")
"""-ffp-contract=off: no fused multiply-add, which rounds once where torch rounds twice."""
BUILD_LIMIT_S = 120.0

_POINTER, _INT64, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "tscale_update": [_POINTER] * 5 + [_INT64] * 2 + [_FLOAT] * 4 + [_INT],
    "tscale_weight_squares": [_POINTER] * 2 + [_INT64, _INT],
    "tscale_encode_int8": [_POINTER] * 2 + [_INT64, _FLOAT, _INT],
    "tscale_add_gradient": [_POINTER] * 2 + [_INT64, _INT],
    "tscale_row_squares": [_POINTER] * 2 + [_INT64] * 2 + [_INT],
}


@dataclass(frozen=True, slots=True)
class HostLibrary:
    """The loaded functions, or None, and the sentence that says why."""

    functions: ctypes.CDLL | None
    reason: str


@cache
def host_library(cache_folder: Path | None = None) -> HostLibrary:
    """Load the library, building it if the cache (default: ~/.cache/tscale-fed) lacks it. Never raises: whatever fails is the reason."""
    folder = Path.home() / ".cache" / "tscale-fed" if cache_folder is None else cache_folder
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return HostLibrary(None, f"no C compiler ({', '.join(COMPILERS)}) found: the host update runs in torch, several times slower")
    try:
        path = folder / f"host_update-{_fingerprint(compiler)}.so"
        if not path.exists():
            _build(compiler, path)
        if path.stat().st_uid != os.getuid():
            return HostLibrary(None, f"{path} belongs to another user and is not loaded: the host update runs in torch")
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        return HostLibrary(library, f"built by {compiler}")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [str(error)]
        return HostLibrary(None, f"{compiler} failed ({lines[0][:200]}): the host update runs in torch, several times slower")
    except (OSError, subprocess.TimeoutExpired, AttributeError) as error:
        return HostLibrary(None, f"the host update in C cannot be used ({error}): it runs in torch, several times slower")


def _build(compiler: str, path: Path) -> None:
    """Into a temporary file first: two processes may build at the same time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
        made.replace(path)


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=BUILD_LIMIT_S).stdout
    parts = (SOURCE.read_text(), " ".join(FLAGS), compiler, version, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native goes by: a home directory may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
