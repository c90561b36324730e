"""What figures were measured on, and the file that keeps them.

Enters: the device of a run, its figures. Leaves: one JSON file: command, date, versions, processor and GPU beside the figures, so that a
figure never travels without its machine.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS_FOLDER = Path("docs/bench")
"""Where result files go when a bench is run in the project's folder."""


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def resident_bytes() -> int:
    """Memory of this process that is in RAM, pinned memory included; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def machine_facts(device: str, unix_time: float) -> dict[str, Any]:
    """Processor, GPU (None without one), versions and UTC date, as JSON values. `device`: cpu, cuda or cuda:N."""
    import torch

    from tscale_fed import __version__

    gpu = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None
    return {
        "date": datetime.fromtimestamp(unix_time, UTC).isoformat(timespec="seconds"),
        "processor": _processor_name(),
        "cores": usable_cores(),
        "gpu": gpu,
        "versions": {"tscale-fed": __version__, "torch": torch.__version__, **_triton_version(), "python": platform.python_version()},
    }


def command_text(arguments: Sequence[str] | None = None) -> str:
    """The command line as it can be typed again on any machine: without --out, and of absolute paths only the file's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = words if words[:1] == ["bench"] else ["bench", *words]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    words = [word for word in words if not word.startswith("--out=")]
    return shlex.join(["tscale", *(Path(word).name if word.startswith("/") else word for word in words)])


def result_path(name: str, wanted: Path | None) -> Path:
    """`wanted`, or NAME.json in the project's folder of results, or here if this is not the project's folder."""
    if wanted is not None:
        return wanted
    return (RESULTS_FOLDER if RESULTS_FOLDER.parent.is_dir() else Path()) / f"{name}.json"


def write_result(path: Path, values: Mapping[str, Any]) -> None:
    """One JSON file, replaced as a whole. Raises OSError, which the command line turns into a sentence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _triton_version() -> dict[str, str]:
    """Empty without Triton."""
    try:
        return {"triton": metadata.version("triton")}
    except metadata.PackageNotFoundError:
        return {}


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
