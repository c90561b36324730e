"""The same run on every rank: what must be equal before the first step, and a checksum that shows that replicas still are.

Facts are told as JSON texts and compared by every rank against rank 0's, so all end with the same sentence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tscale_fed.parallel.group import Group
from tscale_fed.parallel.limits import CHECKSUM_ELEMENTS
from tscale_net.errors import Refused

_ODD = 0x9E3779B1
"""Odd, so that multiplying by it loses no bits; positions are spread by it."""


def agree(group: Group, facts: Mapping[str, Any], topic: str = "run") -> None:
    """Refuse unless every rank states the same facts, JSON values by a name that people know. Collective.

    Raises Refused("parallel-differs") naming the first rank that differs and in what.
    """
    ranks = range(group.world.size)
    group.tell(f"facts/{topic}/{group.world.rank}", json.dumps(facts, sort_keys=True))
    said = [json.loads(group.hear(f"facts/{topic}/{rank}")) for rank in ranks]
    for rank in ranks:
        different = sorted(name for name in said[0].keys() | said[rank].keys() if said[0].get(name) != said[rank].get(name))
        if different:
            name = different[0]
            values = f"{_short(said[rank].get(name))} there, {_short(said[0].get(name))} on rank 0"
            what = f"rank {rank} has another {' and another '.join(different)} ({values})"
            raise Refused("parallel-differs", f"{what}: give every host the same run file, text and program")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checksum(tensors: Iterable[Tensor]) -> int:
    """64 bits of the exact content of float32 tensors and where it stands; the same on every device. Not against forgers."""
    total = 0
    for tensor in tensors:
        words = tensor.detach().reshape(-1).view(torch.int32)
        for start in range(0, words.numel(), CHECKSUM_ELEMENTS):
            part = words[start : start + CHECKSUM_ELEMENTS].to(torch.int64)
            place = torch.arange(start, start + part.numel(), device=part.device)
            mixed = (part ^ (part >> 15)) * (2 * place * _ODD + 1)  # wraps: whole numbers, so the order of the sum cannot matter
            total = (total * 3 + int(mixed.sum())) & (2**63 - 1)
    return total


def check_replicas(group: Group, step: int, tensors: Iterable[Tensor]) -> None:
    """Refuse unless all ranks hold the same bits. Collective. Raises Refused("replicas-differ")."""
    own = torch.tensor([checksum(tensors)], dtype=torch.int64)
    found = torch.zeros(group.world.size, dtype=torch.int64)
    group.gather(found, own)
    differ = (found != found[0]).nonzero().flatten().tolist()
    if differ:
        detail = (
            f"after step {step}, rank {differ[0]} holds other weights than rank 0: a fault of memory, driver or a GPU of another kind; "
            "start again to go on from the last checkpoint, without that GPU if it recurs"
        )
        raise Refused("replicas-differ", detail)
