"""Which processor trains, and why: the answer is shown at start, so nobody wonders why a GPU idles.

Enters: `--device` (auto, cpu, cuda, cuda:1) and [device] precision. Leaves: a `Device` with its reason in words, or one sentence that says
what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tscale_net.errors import Refused

BFLOAT16_CAPABILITY = (8, 0)
"""First NVIDIA generation with bfloat16 matrix units (Ampere)."""


@dataclass(frozen=True, slots=True)
class Device:
    """A chosen processor."""

    torch_device: torch.device
    precision: torch.dtype
    """Of matrix products: torch.float32 or torch.bfloat16."""
    reason: str
    """For people: what it is and why it was chosen."""


def choose_device(request: str = "auto", precision: str = "auto") -> Device:
    """Pick the processor. `request` is auto, cpu, cuda or cuda:N; `precision` is auto, float32 or bfloat16.

    Raises Refused("no-device") if what was asked for is not there, naming what is.
    """
    device, reason = _find(request)
    wanted, remark = _precision(device, precision)
    return Device(device, wanted, f"{reason}, {remark}")


def out_of_memory(device: torch.device, what: str) -> Refused:
    """The one sentence for a GPU whose memory is full; `what` names the work, such as 'a step of 16 fragments of 1024 tokens'."""
    return Refused(
        "out-of-memory",
        f"{device}: not enough GPU memory for {what}; halve fragments and double accumulate in [batch] (the arithmetic stays the same), "
        "or free the GPU",
    )


def _find(request: str) -> tuple[torch.device, str]:
    if request == "cpu":
        return torch.device("cpu"), "cpu: asked for"
    if request == "auto":
        missing = _why_no_gpu()
        return (torch.device("cpu"), f"cpu: {missing}") if missing else (torch.device("cuda:0"), f"cuda:0: {_gpu_name(0)}, found")
    if request != "cuda" and not (request.startswith("cuda:") and request[5:].isdecimal()):
        raise Refused("no-device", f"--device {request}: is not a device; write auto, cpu, cuda or cuda:1 (the second GPU)")
    missing = _why_no_gpu()
    if missing:
        raise Refused("no-device", f"--device {request}: {missing}; leave --device out to train on the processor")
    index = int(request[5:] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        raise Refused("no-device", f"--device {request}: this machine shows {count} GPU(s), the last is cuda:{count - 1}")
    return torch.device(f"cuda:{index}"), f"cuda:{index}: {_gpu_name(index)}, asked for"


def _why_no_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no usable NVIDIA GPU (check that `nvidia-smi` lists one and that its driver is new enough)"
    return None


def _gpu_name(index: int) -> str:
    memory_gib = torch.cuda.get_device_properties(index).total_memory / 2**30
    return f"{torch.cuda.get_device_name(index)} {memory_gib:.0f} GiB"


def _precision(device: torch.device, wanted: str) -> tuple[torch.dtype, str]:
    if wanted == "float32":
        return torch.float32, "float32 (asked for)"
    if device.type != "cuda":
        if wanted == "bfloat16":
            raise Refused("no-device", '[device] precision = "bfloat16" needs a GPU; write "auto"')
        return torch.float32, "float32"
    if torch.cuda.get_device_capability(device) < BFLOAT16_CAPABILITY:
        if wanted == "bfloat16":
            raise Refused("no-device", f'[device] precision = "bfloat16": {torch.cuda.get_device_name(device)} has none; write "auto"')
        return torch.float32, "float32 (this GPU has no bfloat16)"
    return torch.bfloat16, "bfloat16 matrix products, float32 weights"
