"""Where the swarm's basepoint is kept: on the device of the weights, or in the machine's memory.

Beside the weights a peer of a swarm needs the basepoint (int32), a buffer in which publications are captured, scratch memory, and what was
uploaded ahead. On the device, exchange costs launches instead of copies of the model over the bus. Rule for "auto": on the device if the
weights are there, and if the micro-batch then stays as large as it would be otherwise, or has ROWS_ENOUGH tokens.
On a processor, and where weights are in host memory (CPU offload), there is nothing to choose: the basepoint is where the weights are.
"""

from __future__ import annotations

from tscale_fed.engine.memory_plan import ROWS_ENOUGH, choose_plan
from tscale_fed.engine.place import DEVICE_BYTES_PER_PARAMETER, Place, choose_place
from tscale_fed.engine.precision import Precision
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused
from tscale_peers import limits
from tscale_peers.drafting import draft_values

BASEPOINT_BYTES_PER_PARAMETER = 4
_VALUE_BYTES = 4
DECODED_BYTES_PER_PACKET_BYTE = 8
"""A pick of a sparse delta takes 8 bytes when it is decoded, and about one on the wire; a one-bit delta stays as large as it is."""
DECODED_VALUES_PER_BYTE = 8
"""An own publication while it is being made: a bit per value, and as much for 64 picks of 4096."""


def workspace_bytes(parameters: int) -> int:
    """What the exchange takes on the device beside the basepoint."""
    scratch = min(parameters, limits.span_values)
    uploaded = DECODED_BYTES_PER_PACKET_BYTE * limits.inbox_bytes + parameters // DECODED_VALUES_PER_BYTE
    return _VALUE_BYTES * (draft_values(parameters) + scratch) + uploaded + limits.reading_copies_bytes


def swarm_bytes(parameters: int) -> int:
    """All of it."""
    return BASEPOINT_BYTES_PER_PARAMETER * parameters + workspace_bytes(parameters)


def choose_swarm_place(
    requested: str,
    shape: ModelShape,
    *,
    fragments: int,
    tokens: int,
    precision: Precision,
    free: int | None,
    optimizer_memory: str = "auto",
    micro_batch: int = 0,
) -> Place:
    """`requested`: auto, device or host. free: bytes on the device before anything of the run is there, None for a processor.

    Raises Refused("bad-config") for "device" where it cannot be, ValueError for another word.
    """
    if requested not in ("auto", "device", "host"):
        raise ValueError(f"swarm memory {requested!r}: write auto, device or host")
    if free is None:
        return "device"
    if requested == "host":
        return "host"
    left = free - swarm_bytes(shape.trained_parameters)
    if not precision.kernels:
        fits = left >= free // 2 and left >= 2 * DEVICE_BYTES_PER_PARAMETER * shape.trained_parameters
        return "device" if fits or requested == "device" else "host"

    def weights_place(room: int) -> Place:
        sizes = {"fragments": fragments, "tokens": tokens, "precision": precision, "free": room, "micro_batch": micro_batch}
        return choose_place(optimizer_memory, shape, **sizes)  # type: ignore[arg-type]

    if requested == "device":
        if weights_place(left) == "host":
            what = f"{swarm_bytes(shape.trained_parameters) / 1e9:.1f} GB for it leave too little for weights on the device"
            if weights_place(free) == "host":
                what = "the weights are kept in the machine's memory ([device] optimizer_memory)"
            raise Refused("bad-config", f'[device] swarm_memory = "device": {what}; write "auto" or "host"')
        return "device"
    if weights_place(free) == "host" or weights_place(left) == "host":
        return "host"

    def at_once(room: int) -> int:
        """Fragments of the micro-batch; 0 if none fits."""
        try:
            free_bytes = room - DEVICE_BYTES_PER_PARAMETER * shape.trained_parameters
            plan = choose_plan(
                shape, fragments=fragments, tokens=tokens, precision=precision, free_bytes=free_bytes, micro_batch=micro_batch
            )
        except Refused:
            return 0
        return plan.sizes.fragments

    with_it = at_once(left)
    return "device" if with_it and (with_it >= at_once(free) or with_it * tokens >= ROWS_ENOUGH) else "host"
