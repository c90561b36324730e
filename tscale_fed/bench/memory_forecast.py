"""What the engine should need, from its plan and its place: compared with what it takes by `bench memory`.

Enters: an engine. Leaves: JSON values: bytes forecast for the GPU and for host memory, bytes of host memory that it has.
"""

from __future__ import annotations

from typing import Any

from tscale_fed.engine.engine import Engine
from tscale_fed.engine.gradients import gradient_scratch_bytes
from tscale_fed.engine.host_engine import HostEngine, device_bytes
from tscale_fed.engine.host_memory import host_bytes
from tscale_fed.engine.host_parameters import HostParameters
from tscale_fed.engine.place import DEVICE_BYTES_PER_PARAMETER


def forecast(engine: Engine) -> dict[str, Any]:
    """gpu_bytes, host_bytes_forecast, host_bytes."""
    shape, plan, parameters = engine.parameters.shape, engine.plan, engine.parameters
    if isinstance(engine, HostEngine) and isinstance(parameters, HostParameters):
        return {
            "gpu_bytes": plan.bytes - gradient_scratch_bytes(shape) + device_bytes(shape),
            "host_bytes_forecast": host_bytes(shape, plan.sizes.precision.code, plan.micro_batches),
            "host_bytes": parameters.memory.bytes,
        }
    return {"gpu_bytes": plan.bytes + DEVICE_BYTES_PER_PARAMETER * shape.trained_parameters, "host_bytes_forecast": 0, "host_bytes": 0}
