"""Where a step's time goes on a GPU: one line per kernel name, from torch's profiler.

Enters: a function that does one step. Leaves: lines of text. Kernels inside CUDA graphs are seen one by one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch

STEPS = 3
NAME_CHARACTERS = 72


def kernel_lines(step: Callable[[], object], top: int) -> list[str]:
    """Time per step of the `top` slowest kernels, and what all kernels take of a step's time (which the profiler makes longer)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - started) / STEPS * 1e3
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    rows = sorted(((event.self_device_time_total / STEPS / 1e3, event.count / STEPS, event.key) for event in events), reverse=True)
    total = sum(milliseconds for milliseconds, _, _ in rows)
    lines = [f"kernels: {total:.1f} ms of {wall_ms:.1f} ms per step, {sum(count for _, count, _ in rows):.0f} launches"]
    lines += [f"{took:8.2f} ms {took / total:5.1%} {count:6.0f} x  {short_name(name)}" for took, count, name in rows[:top]]
    if len(rows) > top:
        rest = sum(took for took, _, _ in rows[top:])
        lines.append(f"{rest:8.2f} ms {rest / total:5.1%}           {len(rows) - top} others")
    return lines


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces and template arguments."""
    name = name.removeprefix("void ").replace("(anonymous namespace)", "")
    name = re.sub(r"[<(].*", "", name) or name
    return name.split("::")[-1][:NAME_CHARACTERS] if not name.endswith("::") else name[:NAME_CHARACTERS]
