"""Donor state: the optimizer's second moments and step count, which a joiner adopts from a peer that has trained already.

Enters: small float tensors and a step count, or bytes from a stranger. Leaves: safetensors bytes, or the tensors after every check. Without
it a joiner's first steps would be far too uneven: TScale divides each gradient by its running size, and its momentum grows with the steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError

from tscale_net.errors import Refused

OWN_STEPS = "own_steps"
HEADER_BYTES_PER_TENSOR = 256
"""Name, type, shape and offsets in the safetensors header, generously."""
HEADER_BYTES = 4096
MAX_OWN_STEPS = 10**7
"""Nobody makes more steps than this; there momentum averages 6000 steps, and a larger count is a lie that would freeze it."""


def encode(second_moments: Mapping[str, torch.Tensor], own_steps: int) -> bytes:
    """Bytes for a joiner: the tensors (any device) and the count."""
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in second_moments.items()}
    return safetensors.torch.save({**tensors, OWN_STEPS: torch.tensor([own_steps], dtype=torch.int64)})


def max_bytes(like: Mapping[str, torch.Tensor]) -> int:
    """Most bytes that donor state shaped `like` may have: the limit to fetch it with."""
    content = sum(tensor.numel() * tensor.element_size() for tensor in like.values())
    return content + HEADER_BYTES + HEADER_BYTES_PER_TENSOR * len(like)


def decode(data: bytes, like: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """Check a donor's bytes against this peer's own second moments and return (tensors on the CPU, own steps).

    Names, shapes and dtypes must be the same, all values finite and not negative.
    Raises Refused("bad-donor-state").
    """
    if len(data) > max_bytes(like):
        raise _refused(f"{len(data)} bytes, at most {max_bytes(like)} fit this model")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _refused(f"not a safetensors file ({error})") from None
    own_steps = _own_steps(tensors.pop(OWN_STEPS, None))
    if tensors.keys() != like.keys():
        odd = sorted(tensors.keys() ^ like.keys())
        raise _refused(f"its tensors are not those of this model, for example {odd[0][:80]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            wanted, got = (like[name].dtype, tuple(like[name].shape)), (tensor.dtype, tuple(tensor.shape))
            raise _refused(f"{name} is {got[0]} {got[1]}, this model needs {wanted[0]} {wanted[1]}")
        if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
            raise _refused(f"{name} holds values that are negative or not finite")
    return tensors, own_steps


def _own_steps(count: torch.Tensor | None) -> int:
    if count is None or count.dtype != torch.int64 or count.shape != (1,):
        raise _refused(f"{OWN_STEPS} is missing or not one whole number")
    if not 0 <= int(count[0]) <= MAX_OWN_STEPS:
        raise _refused(f"{OWN_STEPS} {int(count[0])} is outside 0 to {MAX_OWN_STEPS}")
    return int(count[0])


def _refused(what: str) -> Refused:
    return Refused("bad-donor-state", f"optimizer state of the donor: {what}; another donor is asked")
