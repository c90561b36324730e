"""Where weights and momentum are kept: on the device, or in host memory (CPU offload). Builds either engine.

Rule for "auto": on the device, if its memory then still takes the whole step at once or a micro-batch of ROWS_ENOUGH tokens; else in host
memory, if that makes the micro-batch larger. On a processor there is one memory, so everything is "on the device".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tscale_fed.engine.engine import Engine, free_bytes
from tscale_fed.engine.host_engine import HostEngine, device_bytes
from tscale_fed.engine.host_parameters import HostParameters
from tscale_fed.engine.host_tensors import HostTensors
from tscale_fed.engine.memory_plan import ROWS_ENOUGH, choose_plan
from tscale_fed.engine.precision import Precision
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer, OptimizerSettings
from tscale_kernels.dispatch import BackendName
from tscale_net.errors import Refused

Place = Literal["device", "host"]
DEVICE_BYTES_PER_PARAMETER = 12
"""fp32 weights, gradient and momentum."""


def choose_place(
    requested: str, shape: ModelShape, *, fragments: int, tokens: int, precision: Precision, free: int | None, micro_batch: int = 0
) -> Place:
    """`requested`: auto, device or host. free: bytes on the device, None for a processor. Raises ValueError for another word."""
    if requested not in ("auto", "device", "host"):
        raise ValueError(f"optimizer memory {requested!r}: write auto, device or host")
    if requested == "host":
        return "host"
    if requested == "device" or free is None:
        return "device"

    def at_once(room: int) -> int:
        """Fragments of the micro-batch that would be taken; 0 if none fits."""
        try:
            plan = choose_plan(shape, fragments=fragments, tokens=tokens, precision=precision, free_bytes=room, micro_batch=micro_batch)
        except Refused:
            return 0
        return plan.sizes.fragments

    on_device = at_once(free - DEVICE_BYTES_PER_PARAMETER * shape.trained_parameters)
    if on_device >= (micro_batch or fragments) or on_device * tokens >= ROWS_ENOUGH:
        return "device"
    return "host" if at_once(free - device_bytes(shape)) > on_device else "device"


def make_engine(
    shape: ModelShape,
    weights: Tensor,
    bias2: Tensor | None,
    *,
    device: torch.device,
    precision: Precision,
    settings: OptimizerSettings,
    fragments: int,
    tokens: int,
    doc_start_token: int | None,
    optimizer_memory: str = "auto",
    micro_batch: int = 0,
    plan: str = "auto",
    stream: torch.dtype = torch.float32,
    graphs: bool | None = None,
    backend: BackendName | None = None,
    say: Callable[[str], None] = lambda line: None,
    engine_type: Callable[..., Engine] = Engine,
) -> Engine:
    """An engine at step 0 that starts from `weights` (fp32 [parameters], copied). Arguments as in `build.build_engine`.

    engine_type: makes the engine on the device from the arguments of `Engine`: a group of processes has one of its own.

    Raises Refused("out-of-memory"), torch.OutOfMemoryError for what no plan can change.
    """
    place = choose_place(
        optimizer_memory, shape, fragments=fragments, tokens=tokens, precision=precision, free=free_bytes(device), micro_batch=micro_batch
    )
    if place == "device":
        parameters = Parameters(shape, device).load(weights)
        return engine_type(
            parameters, Optimizer(parameters, settings), bias2, precision=precision, fragments=fragments, tokens=tokens,
            doc_start_token=doc_start_token, micro_batch=micro_batch, plan=plan, stream=stream, graphs=graphs, backend=backend, say=say,
        )  # fmt: skip
    masters = HostParameters(shape, HostTensors(pin=device.type == "cuda"))
    masters.load(weights)
    return HostEngine(
        masters, Optimizer(masters, settings), bias2, device=device, precision=precision, fragments=fragments, tokens=tokens,
        doc_start_token=doc_start_token, micro_batch=micro_batch, plan=plan, stream=stream, graphs=graphs, backend=backend, say=say,
    )  # fmt: skip
