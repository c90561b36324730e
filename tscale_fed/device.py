"""Which processor trains, and why: the answer is shown at start, so nobody wonders why a GPU idles.

Enters: `--device` (auto, cpu, cuda, cuda:1) and [device] precision and attention. Leaves: a `Device` with its reason in words, or one
sentence that says what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tscale_fed.config import DeviceSection
from tscale_fed.engine.precision import Precision, choose_precision
from tscale_net.errors import Refused


@dataclass(frozen=True, slots=True)
class Device:
    """A chosen processor."""

    torch_device: torch.device
    precision: Precision
    """Of matrix products and attention; whether steps go through the engine or the autograd model."""
    reason: str
    """For people: what it is and why it was chosen."""
    settings: DeviceSection = DeviceSection()
    """How the run file of this machine wants memory used."""


def choose_device(request: str = "auto", settings: DeviceSection | None = None) -> Device:
    """Pick the processor. `request` is auto, cpu, cuda or cuda:N; `settings` is [device] of the run file, None for its defaults.

    Raises Refused("no-device") if what was asked for is not there, naming what is.
    """
    settings = settings or DeviceSection()
    device, reason = _find(request)
    chosen, remark = choose_precision(device, settings.precision, settings.attention)
    return Device(device, chosen, f"{reason}, {remark}", settings)


def torch_device(request: str) -> torch.device:
    """The processor named by auto, cpu, cuda or cuda:N, if it is there. Raises Refused("no-device")."""
    return _find(request)[0]


def out_of_memory(device: torch.device, what: str) -> Refused:
    """The one sentence for a GPU whose memory is full; `what` names the work, such as 'a step of one fragment of 1024 tokens'."""
    return Refused(
        "out-of-memory",
        f"{device}: not enough GPU memory for {what}; free the GPU, or take shorter fragments (length in [batch]) or a smaller model",
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
