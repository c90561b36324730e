"""Which of how many processes this is.

Enters: the environment that torchrun, or `tscale train --gpus N`, gives to each process. Leaves: a `World`, or None for a lone process, or
one sentence about what does not fit together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tscale_net.errors import Refused

RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"


@dataclass(frozen=True, slots=True)
class World:
    """One process among `size`; `local_rank` of `local_size` on its own host, which chooses its GPU."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def leader(self) -> bool:
        """Whether this process speaks, decides and saves for all."""
        return self.rank == 0

    def data_key(self, name: str) -> str:
        """What this rank draws its text by: rank 0 as a lone process would, every other one its own."""
        return name if self.leader else f"{name}/rank-{self.rank}"


def world_from(environment: Mapping[str, str]) -> World | None:
    """None unless both RANK and WORLD_SIZE are set.

    Raises Refused("bad-world") naming the variable that is missing or does not fit.
    """
    if RANK not in environment and SIZE not in environment:
        return None
    rank, size = _number(environment, RANK), _number(environment, SIZE)
    local_rank = _number(environment, LOCAL_RANK) if LOCAL_RANK in environment else rank
    local_size = _number(environment, LOCAL_SIZE) if LOCAL_SIZE in environment else size
    for name in (ADDRESS, PORT):
        if not environment.get(name):
            raise Refused("bad-world", f"{name} is not set beside {RANK} and {SIZE}: start with torchrun, or with --gpus N alone")
    if size < 1 or rank >= size:
        raise Refused("bad-world", f"{RANK}={rank} is not below {SIZE}={size}: ranks count from 0; give every host the same {SIZE}")
    if local_size < 1 or local_rank >= local_size or local_size > size:
        detail = f"{LOCAL_RANK}={local_rank} and {LOCAL_SIZE}={local_size} do not fit {SIZE}={size}: leave them to torchrun"
        raise Refused("bad-world", detail)
    return World(rank, size, local_rank, local_size)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdecimal()):
        said = f"{name}={text!r} is no whole number" if text else f"{name} is not set"
        raise Refused("bad-world", f"{said}: start with torchrun, or with --gpus N alone")
    return int(text)
