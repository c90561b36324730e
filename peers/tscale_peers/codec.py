"""Which codecs there are: from the name in a manifest to the codec.

Enters: a name such as "sign" or "topk-sign-256". Leaves: a `Codec`, or the refusal that lists what is known.
A family of codecs may take one whole number, written after a dash; without it the family's default holds, and the default itself is not
written out, so that a codec has one name. What all codecs promise: codec_contract.py; each family has a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tscale_net.errors import Refused
from tscale_peers import limits
from tscale_peers.codec_contract import Codec, CodecMemory, Delta
from tscale_peers.codec_exact import ExactCodec
from tscale_peers.codec_grid import INT4, INT8, GridCodec
from tscale_peers.codec_lowrank import LowRankCodec
from tscale_peers.codec_sign import SignCodec
from tscale_peers.codec_topk import TopkCodec
from tscale_peers.errors import refuse

__all__ = ["FAMILIES", "Codec", "CodecMemory", "Delta", "Family", "codec_fault", "codec_named", "known_codecs"]


@dataclass(frozen=True, slots=True)
class Family:
    """Codecs of one kind. `make(name, parameter)`; families without a parameter have no bounds and ignore it."""

    make: Callable[[str, int], Codec]
    default: int = 0
    bounds: tuple[int, int] | None = None
    letter: str = ""
    """What stands for the parameter where people are told of the family."""


FAMILIES: dict[str, Family] = {
    "sign": Family(lambda name, _: SignCodec(name)),
    "exact": Family(lambda name, _: ExactCodec(name)),
    "topk-sign": Family(lambda name, k: TopkCodec(name, k), limits.topk_default, limits.topk_bounds, "K"),
    "topk-2bit": Family(lambda name, k: TopkCodec(name, k, two_sizes=True), limits.topk_default, limits.topk_bounds, "K"),
    "int4": Family(lambda name, _: GridCodec(name, INT4)),
    "int8": Family(lambda name, _: GridCodec(name, INT8)),
    "lowrank": Family(LowRankCodec, limits.lowrank_default, limits.lowrank_bounds, "R"),
}


def known_codecs() -> str:
    """All names, for people: "exact, sign, topk-sign[-K], ..."."""
    return ", ".join(f"{name}[-{family.letter}]" if family.bounds else name for name, family in sorted(FAMILIES.items()))


def codec_named(name: str) -> Codec:
    """The codec that a manifest names. Raises Refused("packet-codec") saying what is wrong with the name, and listing those known."""
    family = FAMILIES.get(name)
    if family is not None:
        return family.make(name, family.default)
    stem, _, digits = name.rpartition("-")
    family = FAMILIES.get(stem)
    if family is None or family.bounds is None or not re.fullmatch(r"[1-9][0-9]{0,8}", digits):
        raise refuse("packet-codec", f"codec {name[:32]!r} is not known here; known: {known_codecs()}")
    parameter, (least, most) = int(digits), family.bounds
    if not least <= parameter <= most:
        raise refuse("packet-codec", f"codec {name!r}: {family.letter} must lie in {least}..{most}")
    if parameter == family.default:
        raise refuse("packet-codec", f"codec {name!r} is written {stem!r}: {parameter} is what it means without a number")
    return family.make(name, parameter)


def codec_fault(name: str) -> str | None:
    """What is wrong with a name, in one sentence; None if `codec_named` knows it."""
    try:
        codec_named(name)
    except Refused as refusal:
        return refusal.detail
    return None
