"""This machine: versions, device, memory, disk.

Enters: numbers that `measure_*` found. Leaves: lines.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import time
from pathlib import Path

from tscale_fed import __version__
from tscale_fed.doctor import limits
from tscale_fed.doctor.report import Line


def machine_lines(home: Path) -> list[Line]:
    """All of this group. `home` need not exist yet."""
    import psutil

    place = _existing(home)
    return [
        version_line(platform.python_version(), _version("torch"), _version("triton")),
        device_line(*measure_device()),
        memory_line(psutil.virtual_memory().available),
        disk_line(home, psutil.disk_usage(str(place)).free, measure_disk(place)),
    ]


def version_line(python: str, torch: str | None, triton: str | None) -> Line:
    """Versions, None for a package that is not installed."""
    found = f"tscale-fed {__version__}, Python {python}, torch {torch or 'missing'}, triton {triton or 'missing'}"
    if torch is None:
        return Line("versions", "fail", found, "install tscale-fed again: pip install -e . in its folder")
    return Line("versions", "ok", found)


def device_line(gpu: str | None, problem: str | None) -> Line:
    """`gpu`: name and memory of the first GPU that torch can use; `problem`: why there is a GPU that it cannot use."""
    if gpu is not None:
        return Line("gpu", "ok", gpu)
    if problem is not None:
        return Line("gpu", "warn", problem, "install the build of torch that fits the driver (https://pytorch.org), or update the driver")
    return Line("gpu", "warn", "none: training runs on the processor", "nothing, for small models; large ones need a GPU")


def memory_line(available_bytes: int) -> Line:
    found = f"{available_bytes / limits.GIB:.1f} GiB available"
    if available_bytes < limits.MEMORY_FAIL_BYTES:
        return Line("memory", "fail", found, "close other programs, or use a machine with more memory")
    if available_bytes < limits.MEMORY_WARN_BYTES:
        return Line("memory", "warn", found, "only small models fit; close other programs")
    return Line("memory", "ok", found)


def disk_line(home: Path, free_bytes: int, bytes_per_s: float | None) -> Line:
    """`bytes_per_s`: None if the place cannot be written."""
    elsewhere = "put the home elsewhere with --home DIR"
    if bytes_per_s is None:
        return Line("disk", "fail", f"{home} cannot be written", elsewhere)
    found = f"{free_bytes / limits.GIB:.1f} GiB free at {home}, writes {bytes_per_s / limits.MIB:.0f} MiB/s"
    if free_bytes < limits.DISK_FAIL_BYTES:
        return Line("disk", "fail", found, f"free some space, or {elsewhere}")
    if free_bytes < limits.DISK_WARN_BYTES:
        return Line("disk", "warn", found, f"enough for small models; for large ones {elsewhere}")
    if bytes_per_s < limits.DISK_SLOW_BYTES_PER_S:
        return Line("disk", "warn", found, f"checkpoints will be slow; {elsewhere}")
    return Line("disk", "ok", found)


def measure_device() -> tuple[str | None, str | None]:
    """Name of the first GPU, or why it cannot be used."""
    if _version("torch") is None:
        return None, None
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm"
        return f"{properties.name}, {properties.total_memory / limits.GIB:.0f} GiB, {runtime}", None
    if Path("/proc/driver/nvidia/version").exists():
        return None, f"an NVIDIA driver is loaded, but torch {torch.__version__} finds no device"
    return None, None


def measure_disk(place: Path) -> float | None:
    """Bytes per second of a synced write, None if the place cannot be written. The file is removed again."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            started = time.perf_counter()
            file.write(bytes(limits.DISK_SAMPLE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return limits.DISK_SAMPLE_BYTES / max(time.perf_counter() - started, 1e-9)
    except OSError:
        return None


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above that exists."""
    path = path.absolute()
    return next((each for each in (path, *path.parents) if each.is_dir()), Path("/"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
